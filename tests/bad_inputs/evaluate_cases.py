"""Bad evaluate files, task data and results."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import yaml

from tests.bad_inputs.config_cases import FLEET
from tests.bad_inputs.workshop import Bench, Case
from translora.config import FleetConfig, load_config
from translora.evaluate.config import EvaluateConfig
from translora.evaluate.data import read_task_data
from translora.evaluate.render import read_results
from translora.evaluate.run import evaluate

ROWS = [{"input": f"order {number}", "target": "yes"} for number in range(8)]
TASK = {"name": "orders", "data": "orders.jsonl", "num_train": 5, "num_test": 3}
HARNESS = {"name": "orders", "lm_eval": "boolq"}
EVALUATE: dict[str, Any] = {
    "run_dir": "run",
    "output": "results.md",
    "source": {"model": "./old-base"},
    "target": {"model": "./new-base"},
    "tasks": [TASK],
    "arms": {"plain": {}},
}


def loaded(**changes: Any) -> Callable[[Bench], object]:
    """Load an evaluate file with these values; None leaves one out."""

    def act(bench: Bench) -> EvaluateConfig:
        raw = {key: value for key, value in (EVALUATE | changes).items() if value is not None}
        return load_config(bench.file("evaluate.yaml", yaml.safe_dump(raw)), EvaluateConfig)

    return act


def task(**changes: Any) -> Callable[[Bench], object]:
    """Load an evaluate file whose only task has these values."""
    return loaded(tasks=[TASK | changes])


def started(rows: list[dict[str, str]] | str | None = None, **changes: Any) -> Callable[[Bench], object]:
    """Begin an evaluation on real bases with this data; None has none."""

    def act(bench: Bench) -> None:
        for name in ("old-base", "new-base"):
            (bench.directory / name).symlink_to(bench.materials.root / name)
        if rows is not None:
            bench.file("orders.jsonl", rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows))
        config = loaded(**changes)(bench)
        assert isinstance(config, EvaluateConfig)
        evaluate(config, _no_cluster)

    return act


def _no_cluster() -> None:
    raise AssertionError("accepted: the evaluation went on to start Ray")


def data(content: str | bytes) -> Callable[[Bench], object]:
    """Read this content as task data."""
    return lambda bench: read_task_data(bench.file("orders.json", content))


def results(content: str | None) -> Callable[[Bench], object]:
    """`--report-only` with this results.json."""

    def act(bench: Bench) -> None:
        if content is not None:
            bench.file("results.json", content)
        read_results(bench.directory / "results.md")

    return act


def over_a_directory(bench: Bench) -> None:
    """Write the results where a directory has the name of one of their files."""
    (bench.directory / "results.json").mkdir()
    started(ROWS)(bench)


def below_a_file(bench: Bench) -> None:
    bench.file("docs", "")
    started(ROWS, output="docs/results.md")(bench)


def same_base(bench: Bench) -> None:
    started(ROWS, target={"model": "./old-base"})(bench)


def as_fleet(bench: Bench) -> None:
    load_config(bench.file("evaluate.yaml", yaml.safe_dump(EVALUATE)), FleetConfig)


def as_evaluate(bench: Bench) -> None:
    load_config(bench.file("fleet.yaml", FLEET), EvaluateConfig)


def own_ds_config(text: str) -> Callable[[Bench], object]:
    """Begin an evaluation with this DeepSpeed config."""

    def act(bench: Bench) -> None:
        bench.file("own.json", text)
        started(ROWS, train={"ds_config": "./own.json"})(bench)

    return act


CASES = [
    Case("a second seed beyond 64 bits", loaded(seeds=[0, 10**20]), "seeds.1: Input should be less than"),
    Case("results in the run directory", loaded(output="run/results.md"), "lies in run_dir, whose files it could"),
    Case("rows that are too long for the students", started(
        ROWS, distill={"max_length": 9}), "arms.plain: each of its 5 rows is longer than distill.max_length, 9 tokens"),
    Case("a prompt template of a task without an input", started(
        ROWS, tasks=[TASK | {"prompt_template": "Q"}]), "tasks.orders: prompt template 'Q' lacks {input}"),
    Case("a misspelt key", loaded(task=[TASK]), "task: unknown setting; did you mean tasks?"),
    Case("a misspelt key of a task", task(num_tests=4), "tasks.0.num_tests: unknown setting; did you mean num_test?"),
    Case("a misspelt key in a section", loaded(
        synthesis={"sampling": {"temprature": 1}}), "sampling.temprature: unknown setting; did you mean temperature?"),
    Case("a misspelt key in an arm", loaded(
        arms={"hot": {"gate": {"min_agrement": 0.5}}}), "arms.hot.gate.min_agrement: unknown setting; did you mean"),
    Case("a wrong value in an arm", loaded(
        arms={"hot": {"distill": {"epochs": "many"}}}), "arms.hot.distill.epochs: Input should be a valid number"),
    Case("an arm that overrides what it may not", loaded(
        arms={"hot": {"target": {"model": "x"}}}), "arms.hot.target: an arm overrides settings of synthesis, distill"),
    Case("one sample in an arm", loaded(
        arms={"few": {"num_samples": 1}}), "arms.few.num_samples: Input should be greater than or equal to 2"),
    Case("an arm that is text", loaded(arms={"hot": "fast"}), "arms.hot: Input should be a valid dictionary"),
    Case("an arm of a reserved name", loaded(arms={"real": {}}), "arms.real: not a name for an arm"),
    Case("an arm whose name is a path", loaded(arms={"../hot": {}}), "arms.../hot: not a name for an arm"),
    Case("an arm whose name ends the line", loaded(arms={"hot\n": {}}), "not a name for an arm"),
    Case("no arms", loaded(arms={}), "arms: Dictionary should have at least 1 item"),
    Case("no tasks", loaded(tasks=[]), "tasks: List should have at least 1 item"),
    Case("no seeds", loaded(seeds=[]), "seeds: List should have at least 1 item"),
    Case("a seed twice", loaded(seeds=[1, 1]), "seeds: [1, 1] names one twice"),
    Case("a seed that is text", loaded(seeds=["first"]), "seeds.0: Input should be a valid integer"),
    Case("a task twice", loaded(tasks=[TASK, TASK]), "task names appear twice: orders"),
    Case("a task whose name is a path", task(name="../orders"), "tasks.0.name: String should match pattern"),
    Case("a task without data", task(data=None), "task orders: give either data or lm_eval"),
    Case("a task with two sources", task(lm_eval="boolq"), "task orders: give either data or lm_eval"),
    Case("a folder of task files and no task of it", task(
        include_path="tasks"), "task orders: include_path holds task files of lm_eval, which is not set"),
    Case("a metric of the harness and no task of it", task(
        metric="acc"), "task orders: metric and filter are of lm_eval's task, which is not set"),
    Case("an adapter to measure that is not there", started(
        ROWS, tasks=[TASK | {"adapter": "none"}]), "none/adapter_config.json: missing; save"),
    Case("a task that the harness does not know", started(
        tasks=[HARNESS | {"lm_eval": "no_such"}]), "tasks.orders: lm_eval task no_such: is not known; `lm_eval ls"),
    Case("a folder of task files that is not there", started(
        tasks=[HARNESS | {"include_path": "none"}]), "none is no folder; correct it"),
    Case("fewer training rows than seeds", task(num_train=4), "tasks.0.num_train: Input should be greater than"),
    Case("a stop of an adapter that is trained here", task(
        stop="END"), "task orders: stop is for an adapter that is given"),
    Case("an output that would replace the data", loaded(
        tasks=[TASK | {"data": "results.json"}]), "results.md would replace"),
    Case("one test item", task(num_test=1), "tasks.0.num_test: Input should be greater than or equal to 2"),
    Case("no output", loaded(output=None), "output: Field required"),
    Case("an output that is no Markdown file", loaded(output="results"), "output: results does not end in .md"),
    Case("an evaluate file for migrate", as_fleet, "this is an evaluate file; use `translora evaluate`"),
    Case("a fleet file for evaluate", as_evaluate, "this is a fleet file; use `translora migrate`"),
    Case("data that is not there", started(), "orders.jsonl: cannot be read"),
    Case("data with too few rows", started(ROWS[:5]), "5 different inputs, but num_train + num_test of orders is 8"),
    Case("data whose rows are the same", started(ROWS[:1] * 8), "1 different inputs, but num_train + num_test"),
    Case("data without targets", started('{"input": "a"}\n' * 8), 'line 1: "target" must be a non-empty string'),
    Case("no row as short as a training sample may be", started(
        [row | {"input": "order " * 9 + row["input"]} for row in ROWS], train={"max_length": 8}),
        "tasks.orders: each of its 5 rows is longer than train.max_length, 8 tokens; raise it"),
    Case("two times the same base", same_base, "source and target are the same base"),
    Case("a module that a base lacks", started(
        ROWS, train={"lora": {"target_modules": ["qkv_proj"]}}), "train.lora.target_modules: qkv_proj not in old-base"),
    Case("a DeepSpeed config that is not there", started(
        ROWS, distill={"ds_config": "none.json"}), "distill.ds_config: none.json is no file and not in ds_configs/"),
    Case("a DeepSpeed config that is not JSON", own_ds_config("{"), "own.json: not JSON"),
    Case("a DeepSpeed config of another stage", own_ds_config(
        '{"zero_optimization": {"stage": 2}}'), "zero_optimization.stage is 3"),
    Case("a DeepSpeed config with auto", own_ds_config(
        '{"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}'), '"auto" is resolved by HF Trainer only'),
    Case("a DeepSpeed config with an optimizer", own_ds_config(
        '{"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}'), "optimizer has no effect here"),
    Case("an output that is a directory", over_a_directory, "results.json: cannot be written (Is a directory)"),
    Case("a results directory that cannot be made", below_a_file, "results.md: cannot be written"),
]  # fmt: skip

DATA_CASES = [
    Case("data of empty examples", data('{"examples": []}'), '"examples" must be a list of objects with input'),
    Case("data of examples that are text", data('{"examples": "many"}'), '"examples" must be a list of objects'),
    Case("an example without target", data('{"examples": [{"input": "a"}]}'), 'example 1: "target" must be'),
    Case("an example that is text", data('{"examples": ["a"]}'), "example 1: expected a JSON object, found str"),
    Case("data that is binary", data(b"\xff\xfe\x00"), "cannot be read"),
    Case("a report of results that are not there", results(None), "results.json: cannot be read (No such file"),
    Case("a report of damaged results", results('{"setup": '), "damaged"),
]  # fmt: skip
