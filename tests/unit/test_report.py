"""The result table and the HTML page, from states of every kind."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from translora.report.html import loss_curve, samples, write_report
from translora.report.table import gain, notes, percent, render_table, summary, to_markdown
from translora.run.state import Accuracy, AdapterState, GateResult, SynthesisStats, save_state

VOID = {"meta", "br", "line", "polyline", "img", "input", "hr", "link"}
HOSTILE = "<script>alert('x')</script> | a\nb"


def migrated(name: str = "routing") -> AdapterState:
    return AdapterState(
        name=name,
        bundle=f"bundles/{name}",
        task_name="tickets",
        phase="done",
        status="migrated",
        num_samples=120,
        synthesis=SynthesisStats(
            rounds=3, generated=200, accepted=144, needed=144, dropped={"refused": 50, "duplicate": 6}
        ),
        step=40,
        num_steps=40,
        losses=[2.0 / step for step in range(1, 41)],
        gate=GateResult(num_heldout=24, agreement_student=0.875, agreement_base=0.125, passed=True),
        accuracy=Accuracy(num_items=50, source_base=0.1, source_adapter=0.9, target_base=0.2, migrated=0.84),
        seconds={"synthesis": 61.7},
        output=f"bundles/{name}",
    )


def states() -> list[AdapterState]:
    failed = migrated("tone").model_copy(
        update={"status": "failed_gate", "reason": "agreement 0.40 is below 0.60", "accuracy": None}
    )
    broken = AdapterState(name="old", bundle="bundles/old", status="quarantined", reason=f"old: {HOSTILE}")
    waiting = AdapterState(name="later", bundle="bundles/later", phase="synthesis")
    return [migrated(), failed, broken, waiting]


def make_run(path: Path, adapters: list[AdapterState]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"source": {"model": "/m/old"}, "target": {"model": "org/new"}}))
    for state in adapters:
        save_state(path, state)
    return path


def write_synthetic(run_dir: Path, name: str) -> None:
    rows = [
        {
            "adapter": name,
            "sample_id": index,
            "input": f"{HOSTILE} {index}",
            "answer": "billing",
            "score": 1.5,
            "split": split,
        }
        for index, split in enumerate(["train"] * 6 + ["heldout"])
    ]
    rows += [{"adapter": name, "sample_id": 90, "input": "cats", "answer": None, "score": -2.0, "split": "refused"}]
    pq.write_table(pa.Table.from_pylist(rows), run_dir / "adapters" / name / "synthetic.parquet")


class Outline(html.parser.HTMLParser):
    """Checks that tags close in order and collects attributes that would load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loads += [str(value) for key, value in attrs if key in ("src", "href") and not str(value).startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def printed(adapters: list[AdapterState], width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_table(adapters))
    return capture.get()


def test_percentages_do_not_round_to_all_or_nothing() -> None:
    assert [percent(share) for share in (0.0, 0.001, 0.5, 0.999, 1.0, None)] == ["0%", "1%", "50%", "99%", "100%", "–"]
    assert gain(0.125, 0.875) == "+76" and gain(0.5, 0.25) == "-25" and gain(0.001, 0.999) == "+98"


def test_the_table_says_the_figures_of_each_adapter() -> None:
    text = printed(states())
    line = next(line for line in text.splitlines() if "routing" in line)
    assert line.split() == (
        "routing migrated 120 144/200 (72%) 12% → 88% (+76, n=24) 10% → 90% 20% → 84%".split()  # noqa: SIM905
    )
    assert "1 of 4 migrated, 1 failed gate, 1 quarantined, 1 pending" in text
    assert "in synthesis" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "12% → 88% (+76, n=24)" in to_markdown(states())
    assert notes(states())[0] == "tone: failed gate: agreement 0.40 is below 0.60"


def test_accuracy_columns_appear_only_with_real_data() -> None:
    assert "accuracy" in printed(states()) and "accuracy" not in printed(states()[1:])
    assert "accuracy" in to_markdown(states()) and "accuracy" not in to_markdown(states()[1:])


def test_an_empty_fleet_has_a_table_too() -> None:
    assert summary([]) == "0 of 0 migrated"
    assert "0 of 0 migrated" in printed([]) and "0 of 0" in to_markdown([])


def test_markdown_keeps_its_columns_whatever_a_reason_says() -> None:
    lines = to_markdown(states()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(states())
    assert {line.replace("\\|", "").count("|") for line in table} == {11}
    assert lines[-1] == "1 of 4 migrated, 1 failed gate, 1 quarantined, 1 pending."


def test_the_page_is_whole_escaped_and_loads_nothing(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", states())
    write_synthetic(run_dir, "routing")
    path = write_report(run_dir)
    page = path.read_text()
    outline = Outline(page)
    assert path == run_dir / "report.html"
    assert outline.loads == [] and "http://" not in page and "https://" not in page
    assert outline.scripts == 1 and "<script>alert" not in page and "&lt;script&gt;alert" in page
    for text in (
        "old → org/new",
        "Training loss over 40 steps",
        "2.000 → 0.050",
        "agreement 0.40 is below 0.60",
        "cats",
        "(+76, n=24)",
    ):
        assert text in page
    for reason, count in migrated().synthesis.dropped.items():
        assert re.search(rf'<div class="bar"><span>{reason}</span>.*<span>{count}</span></div>', page), "why it dropped"
    assert page.count('<tr><td class="plain">') == 4 + 1  # four kept samples, and the refused one
    assert page.count("<details") == len(states()) + 1


@pytest.mark.parametrize("adapters", [[], states()[2:]])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path, adapters: list[AdapterState]) -> None:
    page = write_report(make_run(tmp_path / "run", adapters)).read_text()
    Outline(page)
    assert ("No adapter has been started yet" in page) == (not adapters)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run directory"):
        write_report(tmp_path)


def test_a_broken_synthetic_set_does_not_cost_the_page(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", [migrated()])
    broken = run_dir / "adapters" / "routing" / "synthetic.parquet"
    broken.write_bytes(b"PAR1 half a file")
    assert samples(broken) == [] and samples(tmp_path / "none") == []
    assert "From the synthetic set" not in write_report(run_dir).read_text()


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
