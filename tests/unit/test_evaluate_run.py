"""The evaluation's own steps without its trainings: what is refused at once, shared, asked and recorded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.tiny import make_base, make_bundle
from translora.bundle import inspect_base
from translora.config import BaseModelConfig
from translora.distill.job import TrainJob
from translora.evaluate import run
from translora.evaluate.answers import Repetition, answer, item_rows, migrations, task_items, write_items
from translora.evaluate.config import EvaluateConfig
from translora.evaluate.data import Split
from translora.evaluate.run import evaluate, share_blocks, without_places
from translora.gate import questions
from translora.run.rundir import open_run
from translora.run.state import AdapterState, GateResult, SynthesisStats

COLOURS = ["red", "blue", "green", "black", "white", "grey", "pink"]
RIGHT = {"source_base": 0, "source_adapter": 6, "target_base": 1, "real": 5, "plain": 4, "hot": 3}
"""Of seven items, how many each arm answers right: all different, so that no two can be swapped."""
SPLITS = {
    "paint": Split(
        train=[{"input": f"train {word}", "target": word} for word in COLOURS],
        test=[{"input": f"real {word}", "target": word.upper()} for word in COLOURS],
    )
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    root = tmp_path_factory.mktemp("evaluate")
    make_base(root / "source", "llama", 1)
    make_base(root / "target", "gemma3", 2)
    rows = [row for part in (SPLITS["paint"].train, SPLITS["paint"].test) for row in part]
    (root / "paint.json").write_text(json.dumps({"examples": rows}))
    config = EvaluateConfig.model_validate(
        {
            "run_dir": root / "run",
            "output": root / "results.md",
            "source": {"model": str(root / "source")},
            "target": {"model": str(root / "target")},
            "tasks": [{"name": "paint", "data": str(root / "paint.json"), "num_train": 7, "num_test": 7}],
            "seeds": [3],
            "arms": {"plain": {}, "hot": {"gate": {"min_agreement": 0.9}}},
        }
    )
    make_bundle(config.bundle_dir(3, "paint"), root / "source", "paint")
    return config


@pytest.fixture
def answers(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> questions.Answers:
    """Six models, known by base and slot, that answer different numbers of items right."""
    slots = {
        (config.source.model, None): "source_base",
        (config.source.model, "source_adapter/paint"): "source_adapter",
        (config.target.model, None): "target_base",
        **{(config.target.model, f"{arm}/paint"): arm for arm in ("real", "plain", "hot")},
    }
    passes: list[tuple[str, set[str]]] = []

    def run_rows(_: str, rows: list[dict[str, Any]], __: object, *, base: BaseModelConfig, **rest: Any) -> list[Any]:
        passes.append((base.model, {row["arm"] for row in rows}))
        found = []
        for row in reversed(rows):
            arm = slots[base.model, row["slot"]]
            assert row["arm"] == arm
            assert row["template"] == ("chat" if base.model == config.source.model else "auto")
            assert (row["stop"] is None) == (row["slot"] is not None)
            if row["slot"] is not None:
                place = config.bundle_dir(3, "paint") if arm == "source_adapter" else Path(arm)
                assert rest["adapters"][row["slot"]] == str(place)
            right = row["index"] < RIGHT[arm]
            # Of the wrong ones, the last has the right words and does not end.
            text = COLOURS[row["index"]] if right or row["index"] == 6 else "no idea"
            found.append({**row, "answer": text, "finished": row["index"] < 6, "loglik": None})
        return found

    monkeypatch.setattr(questions, "run_rows", run_rows)
    adapters = {f"{arm}/paint": Path(arm) for arm in ("real", "plain", "hot")}
    source, target = inspect_base(config.source.model), inspect_base(config.target.model)
    found, logliks = answer(config, 3, SPLITS, adapters, source, target)
    assert not logliks, "of tasks of choices alone"
    on_source, on_target = ("source_base", "source_adapter"), ("target_base", "real", "plain", "hot")
    assert passes == [(config.source.model, {arm}) for arm in on_source] + [
        (config.target.model, {arm}) for arm in on_target
    ], "each arm by itself, and no base is left and come back to"
    return found


def gate(student: float, base: float = 0.0, **more: Any) -> GateResult:
    return GateResult(num_heldout=20, agreement_student=student, agreement_base=base, passed=True, **more)


def repetition(answers: questions.Answers, **states: AdapterState) -> Repetition:
    return Repetition(3, SPLITS, {arm: [state] for arm, state in states.items()}, answers)


def state(**fields: Any) -> AdapterState:
    return AdapterState(name="paint", bundle="paint", **fields)


def test_each_arm_is_answered_by_its_own_model(config: EvaluateConfig, answers: questions.Answers) -> None:
    whole = repetition(answers)
    assert {arm: sum(whole.correct("paint", arm) or []) for arm in RIGHT} == RIGHT
    assert whole.correct("paint", "no such arm") is None
    items = task_items(config, "paint", [whole])
    (one,) = items.seeds
    assert one.seed == 3 and {arm: sum(right) for arm, right in one.correct.items()} == RIGHT
    assert (items.majority, items.chance) == (1 / 7, 1 / 7)


def test_the_items_file_holds_every_answer(config: EvaluateConfig, answers: questions.Answers, tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet", repetition(answers))
    rows = pq.read_table(tmp_path / "items.parquet").to_pylist()
    assert len(rows) == 6 * 7 and {row["seed"] for row in rows} == {3}
    assert {arm: sum(row["correct"] for row in rows if row["arm"] == arm) for arm in RIGHT} == RIGHT
    cut = [row for row in rows if row["index"] == 6]
    assert {row["answer"] for row in cut} == {None} and {row["target"] for row in cut} == {"PINK"}
    first = rows[0]
    write_items(tmp_path / "again.parquet", repetition(answers))
    assert first["input"] == "real red"
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "items.parquet").read_bytes()


def test_the_verdict_is_that_of_each_arms_own_thresholds(config: EvaluateConfig, answers: questions.Answers) -> None:
    moved = gate(0.8, loglik_student=-0.1, loglik_base=-2.0)
    whole = repetition(answers, plain=state(gate=moved), hot=state(gate=moved))
    plain, hot = migrations(config, whole)
    assert plain.gate == moved.model_copy(update={"min_agreement": 0.6})
    assert hot.gate is not None and not hot.gate.passed
    assert hot.gate.reason == "agreement 0.80 < gate.min_agreement 0.90"
    assert (plain.accuracy, hot.accuracy, plain.source_accuracy) == (4 / 7, 3 / 7, 6 / 7)


def test_a_teacher_of_one_answer_passes_no_gate(config: EvaluateConfig, answers: questions.Answers) -> None:
    stats = SynthesisStats(classes={"red": 40}, warning="one answer")
    (found,) = migrations(config, repetition(answers, plain=state(gate=gate(1.0, only_answer="red"), synthesis=stats)))
    assert found.gate is not None and not found.gate.passed and "answers 'red' to every sample" in found.gate.reason
    assert found.accuracy == 4 / 7 and found.note == "one answer"


def test_a_quarantined_adapter_has_a_reason_and_no_accuracy(config: EvaluateConfig, answers: questions.Answers) -> None:
    without = {key: value for key, value in answers.items() if key[1] != "hot"}
    whole = repetition(without, plain=state(gate=gate(0.8)), hot=state(status="quarantined", reason="too few samples"))
    _, hot = migrations(config, whole)
    assert (hot.accuracy, hot.gate, hot.note) == (None, None, "too few samples")
    assert "hot" not in task_items(config, "paint", [whole]).seeds[0].correct


def test_blocks_of_an_earlier_arm_are_shared_where_there_is_none_of_its_own(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    names = [
        "rounds/000-generate-aa/000000.parquet",
        "rounds/000-generate-aa/000001.parquet",
        "rounds/000-label-bb/000000.parquet",
        "gate/answers-cc/000000.parquet",
    ]
    for name in (*names, "rounds/outcome-dd.json", "adapters/a-task/synthetic.parquet"):
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (first / name).write_text(name)
    own = second / "rounds/000-generate-aa/000001.parquet"
    own.parent.mkdir(parents=True)
    own.write_text("its own")
    share_blocks([tmp_path / "none", first], second)
    share_blocks([first], second)
    found = {path.relative_to(second).as_posix(): path.read_text() for path in second.rglob("*.*")}
    assert found == {name: name for name in names} | {"rounds/000-generate-aa/000001.parquet": "its own"}
    assert (second / names[0]).samefile(first / names[0])


def test_without_hard_links_blocks_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = tmp_path / "first/rounds/000-generate-aa/000000.parquet"
    block.parent.mkdir(parents=True)
    block.write_text("generated")

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr("translora.evaluate.run.os.link", refuse)
    share_blocks([tmp_path / "first"], tmp_path / "second")
    assert (tmp_path / "second/rounds/000-generate-aa/000000.parquet").read_text() == "generated"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"model": "{root}/source"}}, "source and target are the same base"),
        ({"train": {"lora": {"target_modules": ["qkv_proj"]}}}, "train.lora.target_modules: qkv_proj not in source"),
        ({"arms": {"wide": {"distill": {"lora": {"target_modules": ["qkv_proj"]}}}}}, "distill.lora.target_modules"),
        ({"distill": {"ds_config": "zero4.json"}}, "zero4.json is no file and not in ds_configs/"),
        ({"tasks": [{"name": "a", "data": "{root}/paint.json"}]}, "14 different inputs, but num_train + num_test of a"),
        ({"tasks": [{"name": "a", "data": "{root}/none.json"}]}, "none.json: cannot be read"),
        ({"output": "{root}/paint.json/results.md"}, "results.md: cannot be written (File exists); change `output`"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(
    config: EvaluateConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    here = json.dumps(changes).replace("{root}", str(config.output.parent))
    raw = json.loads(config.model_dump_json()) | {"run_dir": str(tmp_path / "run")} | json.loads(here)
    started: list[bool] = []
    with pytest.raises(ValueError) as fault:
        evaluate(EvaluateConfig.model_validate(raw), lambda: started.append(True))
    assert message in str(fault.value)
    assert not started and not (tmp_path / "run").exists()


def test_an_owners_adapter_with_a_chat_template_of_its_own_has_to_say_how_it_is_prompted(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(config.bundle_dir(3, "paint"), adapter)
    (adapter / "chat_template.jinja").write_text("<s>{{ messages[0].content }}")

    def start() -> None:
        raise KeyError("Ray")

    for own, raised in (({}, "brings a chat template"), ({"prompt_template": "{input} ->", "stop": "."}, "Ray")):
        task = config.tasks[0].model_copy(update={"adapter": str(adapter), **own})
        mine = config.model_copy(update={"run_dir": tmp_path / "run", "tasks": [task]})
        with pytest.raises((ValueError, KeyError), match=raised):
            evaluate(mine, start)


def test_an_owners_adapter_ends_its_answers_where_its_task_says() -> None:
    (row, *_) = item_rows("paint", "source_adapter", SPLITS["paint"], "slot", "chat", stop="END")
    assert re.search(row["stop"], "red END") and not re.search(row["stop"], "red")


def test_results_say_nothing_of_this_machine() -> None:
    arms = {"own": {"synthesis": {"generator": {"model": "/home/me/bases/writer"}, "screen": "none"}, "distill": {}}}
    shown = {"own": {"synthesis": {"generator": {"model": "writer"}, "screen": "none"}, "distill": {}}}
    assert without_places(arms) == shown


def test_other_settings_of_the_source_adapters_are_refused_before_anything_starts(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    mine = config.model_copy(update={"run_dir": tmp_path / "run"})
    with open_run(mine.run_dir, mine):
        (mine.run_dir / "bundles").mkdir()
    with open_run(mine.run_dir, mine.model_copy(update={"arms": mine.arms | {"one-more": {}}})):
        pass  # what the other arms made still fits
    prepared = mine.prepare(3)
    with open_run(prepared.run_dir, prepared):
        (prepared.run_dir / "tasks").mkdir()

    def no_cluster() -> None:
        raise AssertionError("the settings come first")

    longer = mine.model_copy(update={"train": mine.train.model_copy(update={"epochs": 7.0})})
    with pytest.raises(ValueError, match=r"seed-3/prepare: was made with other settings \(train.epochs 20.0 -> 7.0\)"):
        evaluate(longer, no_cluster)


@pytest.mark.parametrize("peft", [None, {"peft_type": "LORA", "r": 4, "use_dora": True}], ids=str)
def test_the_real_data_trains_an_adapter_of_the_source_adapters_kind(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft: dict[str, Any] | None
) -> None:
    trained: list[TrainJob] = []
    monkeypatch.setattr(run, "train_adapters", lambda base, name, jobs, *_, **__: trained.extend(jobs))
    train = config.train.model_copy(update={"peft": peft})
    mine = config.model_copy(update={"run_dir": tmp_path / "run", "train": train})
    run.train_real(mine, 3, SPLITS, inspect_base(config.target.model))
    assert [(job.name, job.peft, job.epochs) for job in trained] == [("paint/real", peft, 20)]
