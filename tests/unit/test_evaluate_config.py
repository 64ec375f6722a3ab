"""Evaluate files and task data: what they become, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from translora.config import FleetConfig, PrepareConfig, load_config
from translora.evaluate.config import EvaluateConfig, EvaluateTask, without_gate
from translora.evaluate.data import TaskData, read_task_data, split
from translora.run.state import load_states
from translora.synthesis.prompts import normalise

ROOT = Path(__file__).resolve().parents[2]
RAW: dict[str, Any] = {
    "run_dir": "run",
    "output": "docs/results.md",
    "source": {"model": "./old-base"},
    "target": {"model": "./new-base"},
    "tasks": [{"name": "orders", "data": "orders.jsonl"}, {"name": "prices", "data": "$DATA/prices.json"}],
    "arms": {"plain": {}, "hot": {"synthesis": {"sampling": {"temperature": 1.5}}, "distill": {"epochs": 3}}},
    "synthesis": {"batch_size": 7},
    "gate": {"min_agreement": 0.7},
}


def load(directory: Path, **changes: Any) -> EvaluateConfig:
    (directory / "evaluate.yaml").write_text(json.dumps(RAW | changes))
    return load_config(directory / "evaluate.yaml", EvaluateConfig)


@pytest.fixture(autouse=True)
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")


def test_paths_are_relative_to_the_file_and_variables_are_expanded(tmp_path: Path) -> None:
    config = load(tmp_path, arms={"own": {"distill": {"ds_config": "./own.json"}}})
    assert config.output == tmp_path / "docs/results.md" and config.run_dir == tmp_path / "run"
    assert [task.data for task in config.tasks] == [str(tmp_path / "orders.jsonl"), "/data/prices.json"]
    assert config.source.model == str(tmp_path / "old-base")
    assert config.fleet(0, "own").distill.ds_config == str(tmp_path / "own.json")


def test_an_arm_overrides_its_own_settings_and_no_others(tmp_path: Path) -> None:
    config = load(tmp_path)
    plain, hot = config.fleet(3, "plain"), config.fleet(3, "hot")
    assert (plain.synthesis.sampling.temperature, hot.synthesis.sampling.temperature) == (0.9, 1.5)
    assert (plain.distill.epochs, hot.distill.epochs) == (20, 3)
    assert hot.synthesis.batch_size == 7 and hot.synthesis.sampling.top_k == plain.synthesis.sampling.top_k
    assert plain.run_dir == tmp_path / "run/seed-3/arms/plain" != hot.run_dir
    assert plain.seed == hot.seed == 3
    assert plain.adapters == hot.adapters
    assert [entry.bundle for entry in plain.adapters] == [str(config.bundle_dir(3, name)) for name in RAW_NAMES]
    assert {entry.num_samples for entry in plain.adapters} == {100}


def test_an_arm_may_have_more_samples(tmp_path: Path) -> None:
    config = load(tmp_path, num_samples=40, arms={"few": {}, "many": {"num_samples": 120, "distill": {"epochs": 6}}})
    few, many = config.fleet(0, "few"), config.fleet(0, "many")
    assert [entry.num_samples for entry in (*few.adapters, *many.adapters)] == [40, 40, 120, 120]
    assert (few.distill.epochs, many.distill.epochs) == (20, 6)


def test_an_arm_of_another_method_has_none_of_the_others_settings(tmp_path: Path) -> None:
    tuning = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20}
    ia3 = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    config = load(tmp_path, distill={"peft": tuning}, arms={"as-set": {}, "ia3": {"distill": {"peft": ia3}}})
    assert config.fleet(0, "as-set").distill.peft == tuning
    assert config.fleet(0, "ia3").distill.peft == ia3


RAW_NAMES = [task["name"] for task in RAW["tasks"]]


def test_the_gate_withholds_nothing_and_its_own_thresholds_are_kept_for_the_verdict(tmp_path: Path) -> None:
    fleet = load(tmp_path).fleet(0, "plain")
    free = without_gate(fleet)
    assert (fleet.gate.min_agreement, free.gate.min_agreement, free.gate.min_gain) == (0.7, 0.0, -1.0)
    assert free.model_copy(update={"gate": fleet.gate}) == fleet


def test_seeds_have_bundles_of_their_own(tmp_path: Path) -> None:
    config = load(tmp_path)
    first, second = config.prepare(0), config.prepare(1)
    assert (first.seed, second.seed) == (0, 1)
    assert first.output_dir != second.output_dir and first.run_dir != second.run_dir
    assert [task.data for task in first.tasks] == [str(config.train_file(0, name)) for name in RAW_NAMES]


def test_an_owners_adapter_is_prompted_and_ended_as_its_task_says(tmp_path: Path) -> None:
    own = {"adapter": "/mine", "prompt_template": "Q: {input}\nA:", "stop": "\n\n"}
    config = load(tmp_path, tasks=[{"name": "a", "data": "a", **own}, {"name": "b", "data": "a"}])
    assert [task.prompt_template for task in config.prepare(0).tasks] == ["Q: {input}\nA:", None]
    assert [entry.stop for entry in config.fleet(0, "plain").adapters] == ["\n\n", None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "sources: unknown setting; did you mean source?"),
        (
            {"tasks": [{"name": "a", "data": "a", "num_trian": 3}]},
            "tasks.0.num_trian: unknown setting; did you mean num",
        ),
        ({"tasks": [{"name": "a", "data": "a"}] * 2}, "task names appear twice: a"),
        ({"tasks": [{"name": "a/b", "data": "a"}]}, "tasks.0.name: String should match"),
        ({"tasks": [{"name": "a", "data": "$NO_SUCH/a"}]}, "the environment variable NO_SUCH is not set"),
        ({"arms": {}}, "arms: Dictionary should have at least 1 item"),
        ({"arms": {"x": None}}, "arms.x: Input should be a valid dictionary"),
        ({"arms": {"x": {"synthesis": {"batchsize": 3}}}}, "arms.x.synthesis.batchsize: unknown setting; did you mean"),
        ({"arms": {"x": {"synthesis": {"batch_size": 0}}}}, "arms.x.synthesis.batch_size: Input should be greater"),
        (
            {"arms": {"x": {"synthesis": {"batch_size": 0}, "distill": {"epochs": "many"}}}},
            "arms.x.synthesis.batch_size: Input should be greater than or equal to 1; arms.x.distill.epochs: Input",
        ),
        ({"arms": {"x": {"synthesis": 3}}}, "arms.x.synthesis: Input should be"),
        ({"arms": {"x": {"target": {"model": "y"}}}}, "arms.x.target: an arm overrides settings of synthesis, distill"),
        ({"arms": {"x": {"num_samples": 1}}}, "arms.x.num_samples: Input should be greater than or equal to 2"),
        ({"arms": {"real": {}}}, "arms.real: not a name for an arm"),
        ({"arms": {"a/b": {}}}, "arms.a/b: not a name for an arm"),
        ({"seeds": [0, 1, 0]}, "seeds: [0, 1, 0] names one twice"),
        ({"tasks": [{"name": "a", "data": "a", "stop": "END"}]}, "task a: stop is for an adapter that is given"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"output": "results.html"}, "output: results.html does not end in .md"),
    ],
)
def test_faults_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as fault:
        load(tmp_path, **changes)
    assert message in str(fault.value) and str(tmp_path / "evaluate.yaml") in str(fault.value)


def test_each_kind_of_file_is_sent_to_its_command(tmp_path: Path) -> None:
    load(tmp_path)
    for kind in (FleetConfig, PrepareConfig):
        with pytest.raises(ValueError, match="this is an evaluate file; use `translora evaluate`"):
            load_config(tmp_path / "evaluate.yaml", kind)
    with pytest.raises(ValueError, match="this is a fleet file; use `translora migrate`"):
        load_config(ROOT / "examples/fleet.yaml", EvaluateConfig)
    with pytest.raises(ValueError, match="this is a prepare file; use `translora prepare`"):
        load_config(ROOT / "examples/prepare.yaml", EvaluateConfig)


def test_status_of_an_evaluation_says_where_its_runs_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(load(tmp_path).model_dump_json())
    with pytest.raises(ValueError, match=r"the run of a `translora evaluate`.*seed-\*/arms/\*, or read .*results.md"):
        load_states(tmp_path)


ROWS = [{"input": f"How many {word}?", "target": str(index % 3)} for index, word in enumerate("abcdefghij")]


def test_both_formats_give_the_same_rows(tmp_path: Path) -> None:
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(row | {"id": 7}) + "\n" for row in ROWS))
    whole.write_text(json.dumps({"canary": "x", "examples": ROWS}, indent=1))
    assert read_task_data(lines) == read_task_data(whole) == ROWS
    lines.write_text(json.dumps(ROWS[0]))  # one line is JSON as a whole
    assert read_task_data(lines) == ROWS[:1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"examples": []}', '"examples" must be a list of objects with input and target'),
        ('{"examples": {"a": 1}}', '"examples" must be a list'),
        ('{"examples": [{"input": "a", "target": "b"}, {"input": "a", "target": 3}]}', 'example 2: "target" must be'),
        ('{"examples": ["a"]}', "example 1: expected a JSON object, found str"),
        ('{"input": "a"}', 'line 1: "target" must be a non-empty string'),
        ("[]", "line 1: expected a JSON object, found list"),
        ("", "no rows; expected JSONL with input, target"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_data_is_named_with_its_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError) as fault:
        read_task_data(tmp_path / "rows.json")
    assert message in str(fault.value) and "rows.json" in str(fault.value)


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: cannot be read"):
        read_task_data(tmp_path / "none.json")


def test_train_and_test_share_no_input_whatever_its_case_and_spaces() -> None:
    twice = ROWS + [{"input": f"  {row['input'].upper()} ", "target": "x"} for row in ROWS]
    task = EvaluateTask(name="orders", data="orders.jsonl", num_train=6, num_test=4)
    parts = split(TaskData(task, twice), seed=0)
    train, test = ({normalise(row["input"]) for row in part} for part in (parts.train, parts.test))
    assert (len(train), len(test)) == (6, 4) and not train & test
    assert "x" not in {row["target"] for row in parts.train + parts.test}, "of equal inputs the first is used"
    assert parts == split(TaskData(task, twice), seed=0)
    assert parts != split(TaskData(task, twice), seed=1)
    with pytest.raises(
        ValueError, match=r"orders\.jsonl: 10 different inputs, but num_train \+ num_test of orders is 11"
    ):
        split(TaskData(task.model_copy(update={"num_test": 5}), twice), seed=0)
