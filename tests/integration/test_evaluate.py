"""`translora evaluate` on a tiny world: killed once, continued, and run again when it is finished."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.integration.world import TASKS, World, kill_when, make_world, synthesis_settings, train_settings
from translora.bundle import inspect_base, read_bundle, verify_bundle
from translora.evaluate.render import read_results
from translora.evaluate.results import Results
from translora.lora.peft_io import read_lora
from translora.run.files import read_jsonl
from translora.run.state import load_states
from translora.synthesis.prompts import normalise

pytestmark = pytest.mark.timeout(1500)
SEEDS, ARMS = (0, 1), ("long", "short")
NUM_TRAIN, NUM_TEST = 24, 14


def evaluate_config(world: World) -> dict[str, Any]:
    """Two tasks from the rows that `prepare_config` writes: a file, and a task of lm-evaluation-harness."""
    prepare = world.prepare_config()
    rows = [row for part in ("train", "test") for row in read_jsonl(world.root / f"colour.{part}.jsonl", ())]
    (world.root / "colour.json").write_text(json.dumps({"canary": "none", "examples": rows}))
    (world.root / "tasks").mkdir(exist_ok=True)
    files = {part: str(world.root / f"thing.{part}.jsonl") for part in ("train", "test")}
    world.write(
        "tasks/thing.yaml",
        {
            "task": "of_the_thing",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "training_split": "train",
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{target}}",
            "metric_list": [{"metric": "exact_match", "ignore_case": True}],
        },
    )
    sizes = {"num_train": NUM_TRAIN, "num_test": NUM_TEST}
    harness = {"lm_eval": "of_the_thing", "include_path": "tasks"}
    return {
        "run_dir": "runs/evaluate",
        "output": "docs/results.md",
        "source": {"model": "./source"},
        "target": {"model": "./target"},
        "tasks": [{"name": "colour", "data": "colour.json"} | sizes, {"name": "thing"} | harness | sizes],
        "seeds": list(SEEDS),
        "arms": {"long": {}, "short": {"distill": {"epochs": 2}}},
        "num_samples": 12,
        "train": prepare["train"] | {"num_workers": 1, "micro_batch_size": 8},
        "discriminator": {"epochs": 2, "learning_rate": 1e-2, "max_samples": 16},
        "synthesis": synthesis_settings(),
        "distill": train_settings() | {"num_workers": 1, "micro_batch_size": 8},
        # Out of reach: every verdict is a refusal, and nothing may be withheld for it.
        "gate": {"min_holdout": 4, "min_agreement": 1.0, "min_gain": 1.0},
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run_dir(world: World) -> Path:
    """A finished evaluation, which was killed in its first migration."""
    config = world.write("evaluate.yaml", evaluate_config(world))
    kill_when(world, "evaluate", config, "runs/evaluate/seed-0/arms/long/rounds/000-label-*/*.parquet")
    run_dir = world.root / "runs" / "evaluate"
    before = made(run_dir)
    assert any("seed-0/real/" in str(path) for path in before) and not list((world.root / "docs").iterdir())
    world.run("evaluate", config)
    assert before.items() <= made(run_dir).items(), "what was finished before the kill is not made again"
    return run_dir


@pytest.fixture(scope="module")
def results(world: World, run_dir: Path) -> Results:
    return read_results(world.root / "docs/results.md")


def made(run_dir: Path) -> dict[Path, int]:
    """The weights and the computed blocks of a run, with the time when each was written."""
    kept = [
        path for path in run_dir.rglob("*") if path.suffix in (".parquet", ".safetensors") and "gangs" not in path.parts
    ]
    return {path: path.stat().st_mtime_ns for path in kept if path.name != "items.parquet"}


def test_every_arm_answers_the_same_items_and_saw_none_of_them(run_dir: Path) -> None:
    tests: list[set[str]] = []
    for seed in SEEDS:
        rows = pq.read_table(run_dir / f"seed-{seed}/items.parquet").to_pylist()
        assert {row["seed"] for row in rows} == {seed}
        for task in TASKS:
            by_arm: dict[str, list[str]] = {}
            for row in rows:
                if row["task"] == task:
                    by_arm.setdefault(row["arm"], []).append(row["input"])
            assert set(by_arm) == {"source_base", "source_adapter", "target_base", "real", *ARMS}
            (inputs,) = {tuple(inputs) for inputs in by_arm.values()}
            train = {
                normalise(row["input"]) for row in read_jsonl(run_dir / f"seed-{seed}/data/{task}.train.jsonl", ())
            }
            assert len(inputs) == len(set(inputs)) == NUM_TEST and len(train) == NUM_TRAIN
            assert not train & set(map(normalise, inputs))
            seeds = read_bundle(run_dir / f"seed-{seed}/bundles/{task}").seeds
            assert set(map(normalise, seeds)) <= train
            tests.append(set(inputs))
    assert tests[0] != tests[2], "another split for another seed"


def test_each_arm_has_adapters_of_its_own(world: World, run_dir: Path) -> None:
    source = inspect_base(str(world.source))
    for seed in SEEDS:
        directory = run_dir / f"seed-{seed}"
        for task in TASKS:
            verify_bundle(read_bundle(directory / f"bundles/{task}"), source)
            for adapter in (f"real/adapters/{task}", *(f"arms/{arm}/adapters/{task}/student" for arm in ARMS)):
                assert any(lora_B.abs().max() > 1e-3 for _, lora_B in read_lora(directory / adapter).modules.values())
                written = json.loads((directory / adapter / "adapter_config.json").read_text())
                assert written["base_model_name_or_path"] == world.target.name
        steps = {arm: {state.num_steps for state in load_states(directory / f"arms/{arm}")} for arm in ARMS}
        assert steps == {"long": {16}, "short": {4}}


def test_later_arms_take_what_the_first_generated(run_dir: Path) -> None:
    for seed in SEEDS:
        first, second = (run_dir / f"seed-{seed}/arms/{arm}/rounds" for arm in ARMS)
        blocks = sorted(path.relative_to(second) for path in second.glob("*-generate-*/*.parquet"))
        assert blocks and blocks == sorted(path.relative_to(first) for path in first.glob("*-generate-*/*.parquet"))
        for block in blocks:
            assert (first / block).samefile(second / block)


def test_each_arms_answers_are_kept_by_themselves(run_dir: Path) -> None:
    """So an arm that comes later is the only one to answer."""
    for seed in SEEDS:
        found = list((run_dir / f"seed-{seed}/gate").glob("answers-*/*.parquet"))
        arms = [{row["arm"] for row in pq.read_table(path).to_pylist()} for path in found]
        assert all(len(own) == 1 for own in arms)
        assert set().union(*arms) == {"source_base", "source_adapter", "target_base", "real", *ARMS}


def test_the_gate_is_recorded_and_withholds_nothing(results: Results) -> None:
    assert {(one.task, one.seed, one.arm) for one in results.migrations} == {
        (task, seed, arm) for task in TASKS for seed in SEEDS for arm in ARMS
    }
    for one in results.migrations:
        assert one.accuracy is not None
        assert one.gate is not None and one.gate.num_heldout >= 4
        assert one.gate.agreement_student < 1 or one.gate.agreement_base > 0, "no longer out of reach"
        assert not one.gate.passed and "gate.min_gain +1.00" in one.gate.reason


def test_the_tables_are_the_items_means(run_dir: Path, results: Results) -> None:
    rows = [row for seed in SEEDS for row in pq.read_table(run_dir / f"seed-{seed}/items.parquet").to_pylist()]
    for row in rows:
        right = row["answer"] is not None and normalise(row["answer"]) == normalise(row["target"])
        assert row["correct"] == right
    for task in results.tasks:
        for arm, found in task.accuracy.items():
            correct = [row["correct"] for row in rows if (row["task"], row["arm"]) == (task.name, arm)]
            assert len(correct) == len(SEEDS) * NUM_TEST
            assert found.value == pytest.approx(sum(correct) / len(correct))
            assert found.low <= found.value <= found.high
        assert task.accuracy["source_adapter"].value > task.accuracy["source_base"].value, "the source adapter learnt"


def test_a_finished_evaluation_makes_nothing_again(world: World, run_dir: Path, results: Results) -> None:
    output = world.root / "docs"
    before = made(run_dir)
    pages = {path: path.read_bytes() for path in output.iterdir()}
    assert {path.name for path in pages} == {"results.md", "results.json", "results.svg"}
    done = world.run("evaluate", world.root / "evaluate.yaml")
    assert made(run_dir) == before
    assert {path: path.read_bytes() for path in output.iterdir()} == pages
    assert done.stdout == f"{output / 'results.md'}\n"
    assert "round 1" not in done.stderr and "training on" not in done.stderr
    assert str(world.root) not in "".join(page.decode() for page in pages.values())
