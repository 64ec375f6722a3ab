"""Coordinates of the report's charts."""

from __future__ import annotations

import pytest

from tests.reports import fleet, migrated, states
from translora.report.charts import histogram, loss_curve, scatter
from translora.run.state import Accuracy


@pytest.mark.parametrize("losses", [[], [1.0], [float("nan")] * 3, [float("inf"), 1.0]])
def test_a_curve_needs_two_finite_values(losses: list[float]) -> None:
    assert loss_curve(losses) is None


def test_a_long_curve_is_thinned_and_stays_in_its_frame() -> None:
    curve = loss_curve([5.0 if step % 2 else 0.0 for step in range(5000)] + [float("nan")])
    assert curve is not None and curve["num_steps"] == 5001
    points = [tuple(map(float, point.split(","))) for point in curve["points"].split()]
    assert 100 <= len(points) <= 160
    assert all(curve["left"] <= x <= curve["width"] and 0 <= y <= curve["height"] for x, y in points)
    assert [point[0] for point in points] == sorted(point[0] for point in points)
    flat = loss_curve([0.0, 0.0])
    assert flat is not None and flat["levels"][-1][1] == "3"


@pytest.mark.parametrize("scores", [[], [None, None], [float("nan")]])
def test_without_a_screen_there_is_no_histogram(scores: list[float | None]) -> None:
    assert histogram(scores, []) is None


def test_no_bar_mixes_both_sides_of_the_threshold() -> None:
    kept, refused = [0.01, 0.3, 2.0, 7.9, 7.9], [0.0, -0.2, -3.3]
    chart = histogram([*kept, None], refused)
    assert chart is not None and (chart["num_kept"], chart["num_refused"]) == (5, 3)
    for bar in chart["bars"]:
        assert bar["x"] + bar["width"] <= chart["zero"] or bar["kept"][1] > 0, "refused ones lie left of zero"
        assert bar["x"] >= chart["zero"] or bar["kept"][1] == 0, "kept ones lie right of it"
        assert chart["left"] <= bar["x"] <= bar["x"] + bar["width"] <= chart["width"]
    assert chart["bars"][0]["title"] == "−3.5 to −3: 0 kept, 1 left out"
    assert chart["bars"][-1]["title"] == "7.5 to 8: 2 kept, 0 left out"
    assert [label for _, label in chart["ends"]] == ["−3.5", "8"]


def test_kept_and_left_out_are_stacked_where_a_screen_has_another_threshold() -> None:
    chart = histogram([3.0] * 3, [3.0] * 2 + [1.0] * 3)
    assert chart is not None
    low, high = chart["bars"]
    assert low["kept"][1] == 0 and low["refused"][1] == high["kept"][1] > 0, "three of a kind are as high"
    assert high["refused"][0] + high["refused"][1] == pytest.approx(high["kept"][0], abs=0.11)
    assert high["title"].endswith("3 kept, 2 left out")
    assert [label for _, label in chart["levels"]] == ["0", "2", "4", "6"], "samples are counted in whole numbers"


@pytest.mark.parametrize("score", [0.0, 5.0, -5.0, 1e-9])
def test_one_score_has_a_histogram_too(score: float) -> None:
    chart = histogram([score], [])
    assert chart is not None and len(chart["bars"]) == 1
    assert chart["left"] <= chart["zero"] <= chart["width"]


def accurate(name: str, source: float, moved: float, bare: float = 0.0) -> object:
    accuracy = Accuracy(num_items=9, source_base=0.5, source_adapter=source, target_base=bare, migrated=moved)
    return migrated(name).model_copy(update={"accuracy": accuracy})


def test_the_scatter_waits_for_accuracies() -> None:
    assert scatter([]) is None and scatter(states()[1:]) is None


def test_the_scatter_sets_the_migrated_against_the_source_adapter() -> None:
    chart = scatter([states()[2], accurate("same", 0.8, 0.8), accurate("worse", 0.9, 0.6, 0.5)])
    assert chart is not None
    same, worse = chart["points"]
    assert (same["section"], worse["section"]) == (2, 3), "sections are counted with those that have no accuracy"
    assert same["x"] - chart["left"] == pytest.approx(chart["bottom"] - same["y"]), "equal means on the diagonal"
    assert worse["x"] - chart["left"] > chart["bottom"] - worse["y"] > chart["bottom"] - worse["base"] > 0
    assert same["base"] == chart["bottom"], "a bare base of 0 % lies on the axis"
    assert worse["title"] == "worse (migrated): source adapter 90%, migrated 60%, bare target base 50%"
    assert (chart["num_level"], chart["mean"]) == (1, "85% → 70%")


@pytest.mark.parametrize("value", [0.0, 0.05, 0.5, 0.97, 1.0])
def test_equal_accuracies_leave_the_axes_a_range(value: float) -> None:
    chart = scatter([accurate("one", value, value, value)])
    assert chart is not None
    (point,) = chart["points"]
    assert chart["left"] <= point["x"] <= chart["right"] and chart["top"] <= point["y"] <= chart["bottom"]
    assert len({label for _, _, label in chart["ticks"]}) == len(chart["ticks"]) == 3


def test_the_axes_show_what_is_there() -> None:
    chart = scatter([accurate("one", 0.92, 0.81, 0.74)])
    assert chart is not None
    assert [label for _, _, label in chart["ticks"]] == ["100%", "90%", "80%", "70%"]
    whole = scatter(fleet())
    assert whole is not None and [label for _, _, label in whole["ticks"]] == [f"{p}%" for p in range(100, -1, -20)]
    assert whole["statuses"] == {"migrated": "migrated", "failed_gate": "failed gate"}
