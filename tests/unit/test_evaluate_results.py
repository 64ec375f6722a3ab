"""From right and wrong answers to tables, JSON, Markdown and plot."""

from __future__ import annotations

import dataclasses
import importlib
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.gate import read_points, to_svg
from benchmarks.gate import to_markdown as gate_page
from translora.cli import main
from translora.errors import InputError
from translora.evaluate.answers import inputs_trained_on
from translora.evaluate.items import ItemScores, TaskItems
from translora.evaluate.plot import draw_calibration
from translora.evaluate.render import read_results, to_markdown, write_results
from translora.evaluate.results import BaseSize, Migration, Results, Setup, join, summarise
from translora.evaluate.statistics import Separation
from translora.run.files import write_parquet
from translora.run.state import GateResult, SynthesisStats
from translora.synthesis.quality import num_seen

SEEDS = [0, 1]
NUM_TEST = 50
ARMS: dict[str, dict[str, Any]] = {"plain": {}, "other": {"synthesis": {"batch_size": 3}}}
SVG = "{http://www.w3.org/2000/svg}"


def setup() -> Setup:
    training = {
        "lora": {"rank": 4, "target_modules": ["q_proj"]},
        "epochs": 2.0,
        "learning_rate": 1e-3,
        "batch_size": 8,
    }
    return Setup(
        source=BaseSize(name="old-base", num_parameters=135_000_000),
        target=BaseSize(name="new-base", num_parameters=268_000_000),
        seeds=SEEDS,
        num_samples=100,
        arms=ARMS,
        train=training,
        distill=training,
        gate={"min_agreement": 0.6},
        num_replicates=2000,
        versions={"torch": "2.13", "python": "3.12"},
    )


def items(name: str, majority: float = 0.5, **counts: int) -> TaskItems:
    """A task whose arms answer the first `count` items right, in both seeds."""
    right = {arm: [float(index < count) for index in range(NUM_TEST)] for arm, count in counts.items()}
    commonest = [float(index >= round((1 - majority) * NUM_TEST)) for index in range(NUM_TEST)]
    return TaskItems(name, 60, NUM_TEST, [item_scores(name, seed, commonest, right) for seed in SEEDS])


def item_scores(name: str, seed: int, commonest: list[float], right: dict[str, list[float]]) -> ItemScores:
    """One repetition, no input of which is in another."""
    inputs = [f"{seed}-{index}" for index in range(len(commonest))]
    return ItemScores(task=name, seed=seed, inputs=inputs, commonest=commonest, chance=0.25, correct=right)


SKILL = items("skill", source_base=10, source_adapter=40, target_base=10, real=45, plain=38, other=24)
TRIVIAL = items("trivial", 0.7, source_base=0, source_adapter=35, target_base=0, real=36, plain=35, other=35)
NO_GAIN = items("no-gain", source_base=10, source_adapter=40, target_base=40, real=40, plain=40, other=41)


def migration(task: str, arm: str, seed: int, agreement: float, accuracy: float | None, note: str = "") -> Migration:
    gate = GateResult(num_heldout=20, agreement_student=agreement, agreement_base=0, passed=agreement >= 0.6)
    return Migration(
        task=task,
        seed=seed,
        arm=arm,
        note=note,
        synthesis=SynthesisStats(generated=200, accepted=100, needed=100),
        gate=gate if accuracy is not None else None,
        accuracy=accuracy,
        source_accuracy=0.8,
    )


MIGRATIONS = [
    migration("skill", "plain", 0, 0.9, 0.76),
    migration("skill", "plain", 1, 0.8, 0.74),
    migration("skill", "other", 0, 0.5, 0.5),
    migration("trivial", "other", 0, 0.55, 0.45),
    migration("trivial", "plain", 0, 0.95, 0.8),
]


@pytest.fixture(scope="module")
def results() -> Results:
    return summarise(setup(), [SKILL, TRIVIAL, NO_GAIN], MIGRATIONS)


def test_a_task_counts_where_the_source_adapter_beats_the_majority_class(results: Results) -> None:
    assert {task.name: task.counted for task in results.tasks} == {"skill": True, "trivial": False, "no-gain": True}
    skill, trivial, _ = results.tasks
    assert skill.accuracy["source_adapter"].value == 0.8
    assert skill.accuracy["source_adapter"].low > 0.7
    assert trivial.accuracy["source_adapter"].value == pytest.approx(0.7), "no better than the majority"


def test_retention_by_task_and_its_mean(results: Results) -> None:
    skill, _, no_gain = results.tasks
    kept, lost = skill.retention["plain"], skill.retention["other"]
    assert kept is not None and kept.value == pytest.approx(28 / 35) and kept.low < kept.value < kept.high
    assert lost is not None and lost.value == pytest.approx(14 / 35)
    assert no_gain.retention == {"source_adapter": None, "plain": None, "other": None} and no_gain.gain.low <= 0
    copy = skill.retention["source_adapter"]
    assert copy is not None and copy.value == pytest.approx(30 / 35), "of a student that answers as its teacher does"
    assert results.copy_retention is not None and results.copy_retention.value == pytest.approx(30 / 35)
    plain = results.arms["plain"]
    assert plain.retention is not None and plain.retention.value == pytest.approx(28 / 35)
    assert plain.num_defined == 1


def test_retention_above_the_majority_class_is_nothing_for_one_answer_to_everything() -> None:
    """A base that does not know the answers' form: an adapter that learnt the form alone keeps half by rho."""
    task = items("form", source_base=0, source_adapter=45, target_base=0, real=50, plain=25, other=45)
    found = summarise(setup(), [task], [])
    (line,) = found.tasks
    for arm, rho, skill in (("plain", 0.5, 0.0), ("other", 0.9, 0.8), ("source_adapter", 0.9, 0.8)):
        kept, above = line.retention[arm], line.skill[arm]
        assert kept is not None and above is not None
        assert (kept.value, above.value) == (pytest.approx(rho), pytest.approx(skill))
    mean, copy = found.arms["other"].skill, found.copy_skill
    assert mean is not None and copy is not None and mean.value == copy.value == pytest.approx(0.8)
    better = items("known", source_base=0, source_adapter=45, target_base=35, real=50, plain=25, other=45)
    (line,) = summarise(setup(), [better], []).tasks
    assert line.skill == line.retention, "the base is above the majority class itself"


def test_means_are_over_the_tasks_that_count(results: Results) -> None:
    found = results.references["real"]
    assert found is not None and found.value == pytest.approx((45 + 40) / 100)
    plain, other = results.arms["plain"], results.arms["other"]
    assert plain.accuracy is not None and plain.accuracy.value == pytest.approx((38 + 40) / 100)
    assert (plain.num_not_below_source, other.num_not_below_source) == (1, 1)
    assert plain.against_first is None
    lost = other.against_source
    assert lost is not None and lost.value == pytest.approx(
        other.accuracy.value - results.references["source_adapter"].value
    )
    assert other.against_first is not None and other.against_first.value == pytest.approx((24 + 41 - 38 - 40) / 100)


def test_each_pair_of_arms_is_compared() -> None:
    counts = {"a": 40, "b": 35, "c": 20}
    task = items("skill", source_base=0, source_adapter=40, target_base=5, real=45, **counts)
    found = summarise(setup().model_copy(update={"arms": {arm: {} for arm in counts}}), [task], [])
    text = to_markdown(found, "results")
    assert "| accuracy | b |" in text and re.search(r"\| c \| -30\.0 \[", text), "b and c against a are a column above"
    assert "row minus column" not in to_markdown(found.model_copy(update={"items": []}), "results")


def test_the_answers_of_soft_labels_are_told_by_arm() -> None:
    soft = [
        migration("skill", "plain", seed, 0.9, 0.8).model_copy(update={"answers_per_sample": count})
        for seed, count in enumerate((1.5, 2.5, None))
    ]
    text = to_markdown(summarise(setup(), [SKILL], [*soft, migration("skill", "other", 0, 0.9, 0.8)]), "results")
    assert "Answers a sample that were learnt as soft labels, in the mean: 2.0 by 2 of 3 students (plain)." in text


def test_the_gate_is_calibrated_on_the_tasks_that_count() -> None:
    more = [migration("skill", "other", 1, 0.7, 0.5), migration("trivial", "other", 1, 0.1, 0.8)]
    found = summarise(setup(), [SKILL, TRIVIAL, NO_GAIN], [*MIGRATIONS, *more]).calibration
    agreement, likelihood = found.signals["agreement"], found.signals["likelihood"]
    assert (agreement.num_points, found.num_kept, found.num_lost) == (4, 2, 2), "0.72 of 0.8; the trivial task apart"
    assert found.best is not None and found.best.threshold == pytest.approx(0.75) and found.best == found.best_alone
    assert found.best.balanced_accuracy == 1, "the verdict let one that was lost pass"
    assert found.configured == found.alone == Separation(0.6, 0.75)
    assert agreement.within_tasks == agreement.with_difference.value if agreement.with_difference else False
    assert agreement.with_accuracy is not None and agreement.with_accuracy.interval is None, "one task"
    assert agreement.with_accuracy.value == pytest.approx(0.95, abs=0.01)
    assert likelihood.num_points == 0 and likelihood.with_accuracy is None
    rated = [one.model_copy(deep=True) for one in (*MIGRATIONS, *more)]
    for one, loglik in zip(rated, (-3.0, -2.0, -1.0, 0.0, 0.0, -0.5, 0.0), strict=True):
        assert one.gate is not None
        one.gate.loglik_student = loglik
    found = summarise(setup(), [SKILL, TRIVIAL, NO_GAIN], rated).calibration
    against = found.signals["likelihood"].with_accuracy
    assert against is not None and against.value < -0.9 and found.signals["likelihood"].num_points == 4
    refused = migration("skill", "other", 1, 0.7, 0.5)
    assert refused.gate is not None
    refused.gate.passed = False
    found = summarise(setup(), [SKILL, TRIVIAL, NO_GAIN], [*MIGRATIONS, refused]).calibration
    assert found.configured is not None and found.configured.balanced_accuracy == 1, "whatever it rests on"
    assert found.alone == Separation(0.6, 0.75)


def test_the_limits_of_the_whole_gate_are_apart_from_agreement() -> None:
    """One that kept its accuracy agrees well, and no better than by chance: the threshold is not what fails it."""
    unlucky, lost = migration("skill", "plain", 1, 0.7, 0.8), migration("skill", "other", 1, 0.3, 0.2)
    assert unlucky.gate is not None
    unlucky.gate.passed, unlucky.gate.p_value = False, 0.1
    found = summarise(setup(), [SKILL], [migration("skill", "plain", 0, 0.9, 0.8), unlucky, lost]).calibration
    assert found.configured == Separation(0.6, 0.75) and found.alone == Separation(0.6, 1.0)
    assert found.best == Separation(0.5, 0.75) and found.best_alone == Separation(0.5, 1.0)


def test_accuracies_that_differ_by_rounding_alone_are_ties() -> None:
    pairs = [(0.9, 0.7), (0.8, 0.5), (0.7, 0.6), (0.6, 0.1 + 0.2 + 0.1)]
    rows = [
        migration("skill", "plain", index, agreement, accuracy) for index, (agreement, accuracy) in enumerate(pairs)
    ]
    rows = [one.model_copy(update={"source_accuracy": (one.accuracy or 0) + 1 / 150}) for one in rows]
    assert len({(one.accuracy or 0) - one.source_accuracy for one in rows}) > 1, "to the last bit"
    found = summarise(setup(), [SKILL], rows).calibration.signals["agreement"]
    assert found.with_difference is None and found.within_tasks is None, "all lost one item of 150"


def test_one_answer_to_everything_counts_one_time_in_forty_at_most() -> None:
    """An adapter as good as the majority answer, and independent of it, has no skill: the share that counts."""
    rng, counted = np.random.default_rng(3), 0
    for trial in range(200):
        commonest, right = ((rng.random(80) < 0.8).astype(float).tolist() for _ in range(2))
        arms = dict.fromkeys(("source_base", "source_adapter", "target_base", "real"), right)
        task = TaskItems(f"trial {trial}", 60, 80, [item_scores(f"trial {trial}", 0, commonest, arms)])
        counted += task.result([]).counted
    assert counted <= 11, "5 of 200 are expected, and more than 11 come one time in a hundred"


def test_an_adapter_that_was_not_made_counts_as_the_bare_base() -> None:
    """Otherwise an arm that gives its hard tasks up would look best."""
    easy = items("easy", source_base=0, source_adapter=48, target_base=0, real=49, plain=48, other=48)
    hard = items("hard", source_base=0, source_adapter=40, target_base=4, real=40, plain=30)
    found = summarise(setup(), [easy, hard], [migration("hard", "other", seed, 0, None) for seed in SEEDS])
    plain, other = found.arms["plain"], found.arms["other"]
    assert plain.accuracy is not None and plain.accuracy.value == pytest.approx((48 + 30) / 100)
    assert other.accuracy is not None and other.accuracy.value == pytest.approx((48 + 4) / 100)
    assert other.retention is not None and other.retention.value == pytest.approx(48 / 49 / 2)
    text = to_markdown(found, "results")
    assert "counted as the bare target base, which their owners are left with: 2 adapters of other." in text
    assert "is left undefined" not in text


def test_an_arm_without_an_adapter_in_a_seed_is_the_base_there() -> None:
    first, second = SKILL.seeds
    rest = {arm: right for arm, right in first.correct.items() if arm != "other"}
    task = dataclasses.replace(SKILL, seeds=[first.model_copy(update={"correct": rest}), second])
    found = summarise(setup(), [task], [migration("skill", "other", 0, 0, None, note="too few samples")])
    other = found.arms["other"]
    assert other.accuracy is not None and other.accuracy.value == pytest.approx((24 + 10) / 100)
    text = to_markdown(found, "results")
    assert "| other | 0 of 1 |" in text.replace('`other` | `{"synthesis": {"batch_size": 3}}`', "other")
    assert "| skill | 0 | other | – | too few samples |" in text


def test_the_page_says_what_was_measured(results: Results) -> None:
    text = to_markdown(results, "results")
    assert (
        "**old-base (135 M parameters) → new-base (268 M parameters), 3 tasks, 2 seeds (0, 1), \\|D_syn\\| = 100.**"
        in text
    )
    more = setup().model_copy(update={"arms": {"plain": {}, "other": {"num_samples": 200}}})
    assert "\\|D_syn\\| = 100 unless an arm says otherwise.**" in to_markdown(
        results.model_copy(update={"setup": more}), "results"
    )
    assert "60 training rows and 50 test items" in text and "real-data adapter on the target" in text
    dora = {"peft_type": "LORA", "use_dora": True}
    other = setup().model_copy(update={"train": {**setup().train, "peft": dora}})
    page = to_markdown(results.model_copy(update={"setup": other}), "results")
    assert (
        "Source adapter and real-data adapter: peft_type LORA, use_dora True" in page and "real-data LoRA" not in page
    )
    assert "2 of 3 tasks count" in text
    headline = text.split("## Headline")[1].split("## Task by task")[0]
    assert "| migrated: plain | 78.0 [" in headline and "| 0.80 [" in headline and "| 1 of 2 |" in headline
    assert "The mean is of 1 task, above the majority class of 1." in headline
    assert "0, by definition" in headline and "ρ is left undefined where" in headline
    counted, apart = text.split("## Task by task")[1].split("## Tasks listed apart")
    assert "| skill | 25.0 | 50.0 | 20.0 [" in counted and "| trivial |" not in counted
    apart = apart.split("## The arms")[0]
    assert "| trivial | 25.0 | 70.0 |" in apart and "| skill |" not in apart
    assert "| no-gain | +0.0 [+0.0, +0.0] | undefined | undefined | undefined |" in counted
    assert "3 migrated adapters of the tasks that count" in text
    assert "1 did not" in text and "| whole, as configured | 0.60 | 100 % |" in text
    widths = [line.count(" | ") for line in counted.splitlines() if line.startswith("| skill")]
    assert widths == [8, 4, 4], "chance, majority, four references, two arms; twice gain, source adapter, two arms"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "docs").glob("results*.json")), ids=str)
def test_a_page_of_the_docs_is_what_its_figures_say(path: Path) -> None:
    path = path.with_suffix(".md")
    assert to_markdown(read_results(path), path.stem) == path.read_text(encoding="utf-8")


def test_the_page_of_the_gate_is_what_the_figures_of_all_pages_say() -> None:
    docs = Path(__file__).parents[2] / "docs"
    found = read_points(sorted(docs.glob("results*.json")))
    assert gate_page(found, "gate.svg") == (docs / "gate.md").read_text(encoding="utf-8")
    assert to_svg(found) == (docs / "gate.svg").read_text(encoding="utf-8")


def test_a_migration_that_two_pages_have_is_counted_once(results: Results, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_results(results, tmp_path / f"{name}.md")
    found = read_points([tmp_path / "a.json", tmp_path / "b.json"])
    assert len(found) == len(results.points) and {page for page, _ in found} == {"a"}
    assert {point.task for _, point in found} == {"skill, seed 0", "skill, seed 1"}, "a task of a seed is a group"


def test_test_items_that_were_invented_are_named(results: Results, tmp_path: Path) -> None:
    assert "invented word for word" not in to_markdown(results, "results")
    rows = [one.model_copy(update={"num_seen": index}) for index, one in enumerate(MIGRATIONS[:2])]
    text = to_markdown(results.model_copy(update={"migrations": rows}), "results")
    assert "invented word for word, and trained on: 1 of 50 of skill (seed 1, plain)." in text
    columns = {"input": ["A  b", "c", "d"], "split": ["train", "heldout", "train"]}
    write_parquet(tmp_path / "synthetic.parquet", pa.table(columns))
    trained = inputs_trained_on(tmp_path / "synthetic.parquet")
    assert num_seen(trained, [{"input": text} for text in ("a B", "c", "d", "e")]) == 2
    assert num_seen(inputs_trained_on(tmp_path / "none.parquet"), [{"input": "a"}]) == 0


def test_without_a_task_that_counts_there_is_no_headline() -> None:
    found = summarise(setup(), [TRIVIAL], MIGRATIONS[-1:])
    assert set(found.references.values()) == {None} and found.arms["plain"].retention is None
    text = to_markdown(found, "results")
    assert "0 of 1 task count: no source adapter beats" in text and "## Task by task" not in text
    assert "no threshold of agreement can be told from these" in text


def test_the_plot_is_whole_and_has_a_point_for_each_migrated_adapter(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path / "results.md")
    root = ElementTree.parse(tmp_path / "results.svg").getroot()
    marks = [group for group in root.findall(f"{SVG}g") if group.find(f"{SVG}title") is not None]
    assert len(marks) == 5
    assert sum("apart" in (group.get("class") or "") for group in marks) == 2
    tips = [title.text for group in marks if (title := group.find(f"{SVG}title")) is not None]
    assert "skill, seed 0, other: agreement 0.50, accuracy -0.30" in tips
    circles = [circle for group in marks for circle in group.findall(f"{SVG}circle")]
    assert len(circles) == 3, "the arms differ in shape, not in colour alone"
    for shape in circles:
        assert 62 <= float(shape.get("cx", 0)) <= 624 and 34 <= float(shape.get("cy", 0)) <= 374
    assert "prefers-color-scheme:dark" in (tmp_path / "results.svg").read_text()


def test_thirteen_arms_can_be_told_apart_and_their_legend_stays_on_the_page() -> None:
    arms = {f"an-arm-called-{letter}": {} for letter in "abcdefghijklm"}
    root = ElementTree.fromstring(draw_calibration(summarise(setup().model_copy(update={"arms": arms}), [SKILL], [])))
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    marks = [group for group in root.findall(f"{SVG}g") if (group.get("class") or "").startswith("arm")]
    looks = {(group.get("class"), group[0].tag, _outline(group[0])) for group in marks}
    assert len(marks) == len(looks) == 13
    names = [text for text in root.findall(f"{SVG}text") if (text.text or "") in arms]
    assert len(names) == 13
    for name in names:
        assert float(name.get("x", 0)) + 7.5 * len(name.text or "") < width and float(name.get("y", 0)) < height


def _outline(shape: ElementTree.Element) -> str:
    """A shape, wherever it stands."""
    corners = [tuple(map(float, corner.split(","))) for corner in shape.get("points", "").split()]
    return str([(round(x - corners[0][0], 1), round(y - corners[0][1], 1)) for x, y in corners])


def test_the_report_is_written_again_from_its_json_alone(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        "run_dir: run\noutput: results.md\nsource: {model: ./a}\ntarget: {model: ./b}\n"
        "tasks: [{name: skill, data: skill.jsonl}]\narms: {plain: {}}\n"
    )
    assert main(["evaluate", str(config), "--report-only"]) == 2
    assert (
        "results.json: cannot be read (No such file or directory); run the evaluation again" in capsys.readouterr().err
    )
    write_results(results, tmp_path / "results.md")
    assert read_results(tmp_path / "results.md") == results
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    for name in ("results.md", "results.svg"):
        (tmp_path / name).unlink()
    assert main(["evaluate", str(config), "--report-only"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == written
    assert summarise(setup(), [SKILL, TRIVIAL, NO_GAIN], MIGRATIONS) == results, "the bootstrap is seeded"
    (tmp_path / "results.json").write_text('{"schema_version": 1}')
    assert main(["evaluate", str(config), "--report-only"]) == 2
    assert "written by another version of translora: schema 1, and this one reads 3 and 4" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"schema_version": 3}')
    assert main(["evaluate", str(config), "--report-only"]) == 2
    assert "results.json: cannot be read (damaged); run the evaluation again" in capsys.readouterr().err


def test_an_adapter_that_did_not_migrate_shows_in_the_exit_code(results: Results, tmp_path: Path) -> None:
    lost = results.model_copy(update={"migrations": [*MIGRATIONS, migration("skill", "other", 1, 0, None)]})
    write_results(lost, tmp_path / "results.md")
    (tmp_path / "evaluate.yaml").write_text(
        "run_dir: run\noutput: results.md\nsource: {model: ./a}\ntarget: {model: ./b}\n"
        "tasks: [{name: skill, data: skill.jsonl}]\narms: {plain: {}}\n"
    )
    assert main(["evaluate", str(tmp_path / "evaluate.yaml"), "--report-only"]) == 1


def part(seed: int, tasks: list[TaskItems]) -> Results:
    """What a machine with one of the seeds writes."""
    alone = [dataclasses.replace(one, seeds=[own for own in one.seeds if own.seed == seed], drawn={}) for one in tasks]
    own = [one for one in MIGRATIONS if one.seed == seed]
    found = summarise(setup().model_copy(update={"seeds": [seed]}), alone, own)
    return Results.model_validate_json(found.model_dump_json())


def test_seeds_that_were_measured_apart_make_the_page_of_all() -> None:
    tasks = [SKILL, TRIVIAL, items("harness", source_base=10, source_adapter=40, target_base=10, real=45, plain=38)]
    tasks[2].seeds[1].correct["plain"][3] = 1 / 3
    whole = summarise(setup(), tasks, sorted(MIGRATIONS, key=lambda one: one.seed))
    other = part(1, tasks)
    own = other.setup.versions | {"python": "3.11"}  # decides no result
    other = other.model_copy(update={"setup": other.setup.model_copy(update={"versions": own})})
    joined = join([("a", part(0, tasks)), ("b", other)])
    assert to_markdown(joined, "results") == to_markdown(whole, "results")
    assert joined.tasks == whole.tasks and joined.arms == whole.arms
    assert join([("b", other), ("a", part(0, tasks))]).tasks == whole.tasks, "in whatever order"
    assert part(0, tasks).tasks[0].accuracy != whole.tasks[0].accuracy, "an interval of fewer items is wider"


def test_what_was_measured_otherwise_is_not_joined() -> None:
    first, second = (part(seed, [SKILL, TRIVIAL]) for seed in SEEDS)
    with pytest.raises(InputError, match=r"seeds \[0, 0\]: one was measured twice"):
        join([("a.md", first), ("a.md", first)])
    longer = [task.model_copy(update={"num_train": 500}) for task in second.tasks]
    bfloat16 = second.setup.source.model_copy(update={"dtype": "bfloat16"})
    for field, changed in (
        ("num_samples 40, in a.md 100", second.setup.model_copy(update={"num_samples": 40})),
        ("source", second.setup.model_copy(update={"source": bfloat16})),
        ("versions", second.setup.model_copy(update={"versions": {"torch": "3.0"}})),
    ):
        with pytest.raises(InputError, match=rf"b\.md: {field}.*; join equal ones"):
            join([("a.md", first), ("b.md", second.model_copy(update={"setup": changed}))])
    for tasks in (second.tasks[:1], longer, [*second.tasks, second.tasks[0].model_copy(update={"name": "more"})]):
        with pytest.raises(InputError, match=r"b\.md: tasks"):
            join([("a.md", first), ("b.md", second.model_copy(update={"tasks": tasks}))])
    rows = [one.setup.model_copy(update={"data": {"skill": digest}}) for one, digest in ((first, "a"), (second, "b"))]
    first, other = (one.model_copy(update={"setup": own}) for one, own in zip((first, second), rows, strict=True))
    with pytest.raises(InputError, match=r"b\.md: other data than in a\.md: skill; join seeds of the same rows"):
        join([("a.md", first), ("b.md", other)])
    assert join([("a.md", first), ("b.md", second)]).setup.seeds == SEEDS, "of rows that an older version did not note"
    with pytest.raises(InputError, match=r"b\.md: written by an older version, without the items' scores"):
        join([("a.md", first), ("b.md", second.model_copy(update={"items": []}))])


@pytest.mark.parametrize("program", ["benchmarks.join", "benchmarks.gate"])
def test_a_page_that_cannot_be_read_or_written_is_named(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, fault in (("out.md", "nothing.json: cannot be read"), ("out.json", "out.json does not end in .md")):
        monkeypatch.setattr("sys.argv", [program, str(tmp_path / "nothing.json"), "--out", str(tmp_path / out)])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(program).main()
        assert ended.value.code == 2 and fault in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_page_says_what_the_arms_were_trained_on_where_it_differs(results: Results) -> None:
    assert "AUC" not in to_markdown(results, "results"), "nobody asked a discriminator"
    kept = {0: {"yes": 60, "no": 40}, 1: {"yes": 80, "no": 20}}
    changes = [{"classes": kept[row.seed], "screen": "discriminator"} for row in MIGRATIONS[:2]]
    stats = MIGRATIONS[0].synthesis
    rows = [
        row.model_copy(update={"synthesis": stats.model_copy(update=change)})
        for row, change in zip(MIGRATIONS[:2], changes, strict=True)
    ]
    items = [item.model_copy(update={"auc": 0.6 + item.seed / 10}) for item in results.items if item.task == "skill"]
    page = to_markdown(results.model_copy(update={"migrations": rows, "items": items}), "results")
    assert "| skill | 0.65 | 50 %; 1.0; 70 % | – |" in page and "| no-gain | – | – | – |" in page
    alike = setup().model_copy(update={"arms": {"plain": {}, "other": {"distill": {"epochs": 1}}}})
    assert "## What they were trained on" not in to_markdown(results.model_copy(update={"setup": alike}), "results")
