"""The result table and the HTML page, from states of every kind."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import binomtest

from tests.reports import fleet, full_stats, make_run, migrated, states, write_many, write_rows, write_synthetic
from translora.report.html import read_samples, write_report
from translora.report.table import interval, note, notes, percent, render_table, summary, wilson
from translora.run.state import AdapterState

VOID = {"meta", "br", "line", "polyline", "img", "input", "hr", "link"}


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


def test_an_interval_is_wilsons_and_never_without_width() -> None:
    """Reference: scipy.stats.binomtest(k, n).proportion_ci(method="wilson")."""
    for right, count in ((0, 5), (3, 8), (21, 24), (50, 50), (431, 1000)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-9)
    for count in range(1, 200):
        assert interval(0.0, count).startswith("0–") and interval(1.0, count).endswith("–100"), "whatever rounding does"
    assert interval(0.875, 24) == "69–96" and interval(1.0, 12) == "76–100" and interval(0.0, 12) == "0–24"


def test_the_table_says_the_figures_of_each_adapter() -> None:
    text = printed(states())
    line = next(line for line in text.splitlines() if "routing" in line)
    assert line.split() == (
        "routing migrated 120 144/200 (72%) 12% → 88% (69–96) 10% → 90% (79–96) 20% → 84% (71–92)".split()  # noqa: SIM905
    )
    assert "1 of 4 migrated, 1 failed gate, 1 quarantined, 1 pending" in text
    assert "in synthesis" in text
    assert max(map(len, text.splitlines())) <= 110
    assert notes(states())[0] == "tone: failed gate: agreement 0.40 is below 0.60"


def test_accuracy_columns_appear_only_with_real_data() -> None:
    assert "accuracy" in printed(states()) and "accuracy" not in printed(states()[1:])


def test_an_empty_fleet_has_a_table_too() -> None:
    assert summary([]) == "0 of 0 migrated"
    assert "0 of 0 migrated" in printed([])


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
        "(69–96, n=24)",
    ):
        assert text in page
    for reason, count in migrated().synthesis.dropped.items():
        assert re.search(rf'<div class="bar"><span>{reason}</span>.*<span>{count}</span></div>', page), "why it dropped"
    assert page.count('<tr><td class="plain">') == 4 + 1  # four kept samples, and the refused one
    assert page.count("<details") == len(states()) + 1


def test_agreement_by_answers_and_by_tokens_have_means_of_their_own(tmp_path: Path) -> None:
    state = migrated()
    assert state.gate is not None
    gate = state.gate.model_copy(update={"unit": "tokens", "agreement_base": 0.5, "agreement_student": 0.9})
    adapters = [state, state.model_copy(update={"name": "letters", "gate": gate})]
    page = write_report(make_run(tmp_path / "run", adapters)).read_text()
    for means, unit in (("12% → 88%", "answers"), ("50% → 90%", "tokens")):
        assert f"<b>{means}</b><span>mean agreement with the teacher, by {unit}</span>" in page


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
    assert read_samples(broken) == [] and read_samples(tmp_path / "none") == []
    assert "From the synthetic set" not in write_report(run_dir).read_text()


def test_the_page_draws_accuracies_and_screen_scores(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", fleet())
    for seed, state in enumerate(fleet()[:-1]):
        write_many(run_dir, state.name, seed)
    page = write_report(run_dir).read_text()
    Outline(page)
    assert page.count('<figure class="card scatter">') == 1 and page.count('class="bare"') == 5
    for number, state in enumerate(fleet()[:-1], 1):
        assert state.accuracy is not None
        assert re.search(rf'<a href="#a{number}" aria-label="{state.name} \(', page)
    assert page.count('<figure class="scores">') == 5 and "<h2>Screen scores (log-odds)</h2>" in page
    assert "1 of 5 lie on or above it" in page


def test_the_page_says_how_the_synthetic_set_was_made(tmp_path: Path) -> None:
    state = migrated().model_copy(update={"synthesis": full_stats()})
    assert state.gate is not None
    state.gate.loglik_base, state.gate.loglik_student = -2.345, -0.5
    page = write_report(make_run(tmp_path / "run", [state])).read_text()
    assert "Acceptance 72%; screen: discriminator; " in page and "distinct-1 0.31, distinct-2 0.73" in page
    assert "<h2>3 different answers of the teacher</h2>" in page
    assert re.search(r'title="billing">billing</span>.*width:100.0%.*<span>70</span>', page)
    assert '<p class="reason quarantined"><span>two answers of three are billing</span></p>' in page
    assert note(state) == "two answers of three are billing"
    assert "target base → migrated: −2.35 → −0.50." in page


def test_a_state_of_an_older_run_has_no_empty_parts(tmp_path: Path) -> None:
    old = migrated()
    old.accuracy = None
    run_dir = make_run(tmp_path / "run", [old])
    path = run_dir / "adapters" / "routing" / "state.json"
    raw = json.loads(path.read_text())
    for part, fields in (
        ("synthesis", ("screen", "distinct", "classes", "warning")),
        ("gate", ("loglik_student", "loglik_base")),
    ):
        for field in fields:
            del raw[part][field]
    path.write_text(json.dumps(raw))
    write_synthetic(run_dir, "routing", score=None)
    page = write_report(run_dir).read_text()
    Outline(page)
    assert "Acceptance 72%." in page and "From the synthetic set" in page
    for absent in ("screen: ", "diversity", "different answer", "log-likelihood", "<figure class=", 'class="bare"'):
        assert absent not in page.partition("<body>")[2].replace('<figure class="loss">', ""), absent


@pytest.mark.parametrize(("screen", "fate"), [("discriminator", "refused"), ("realness", "outranked")])
def test_the_page_says_what_chance_would_do_and_why_an_example_was_left_out(
    tmp_path: Path, screen: str, fate: str
) -> None:
    one = migrated()
    one.synthesis.screen = screen
    assert one.gate is not None
    measured = {"p_value": 0.0123, "commonest": 0.5, "chance": "likelihood"}
    run_dir = make_run(tmp_path / "run", [one.model_copy(update={"gate": one.gate.model_copy(update=measured)})])
    kept = {"sample_id": 0, "input": "dogs", "answer": "billing", "score": 3.0, "split": "train"}
    over = {"sample_id": 1, "input": "cats", "answer": "billing", "score": 1.0, "split": "refused"}
    write_rows(run_dir, "routing", [kept, over, {**over, "sample_id": 2, "input": "mice", "score": -1.0}])
    page = write_report(run_dir).read_text()
    assert (
        "One answer to every input would have 50%; the teacher&#39;s answers, dealt out by chance, are as likely to it "
        "with p = 0.012." in page
    )
    assert "<h2>Screen scores (log-odds)</h2>" in page
    rows = [row.split("</tr>")[0] for row in page.split("<tr>")]
    for text, why in (("dogs", "train"), ("cats", "outranked"), ("mice", fate)):
        assert any(why in row and text in row for row in rows), text
