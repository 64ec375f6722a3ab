"""`translora evaluate`: the retention of the method on real task data, its arms side by side, top to bottom.

For each seed: bundles on the source base -> a LoRA on the target base with the real data -> one migration per arm ->
every test item answered by every arm. Each stage leaves files that a rerun verifies and skips.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from translora.bundle import BaseInfo, inspect_base, read_bundle
from translora.distill.job import make_job, refuse_failures
from translora.distill.launch import train_adapters
from translora.evaluate.config import (
    REAL,
    SOURCE_ADAPTER,
    SOURCE_BASE,
    TARGET_BASE,
    EvaluateConfig,
    without_gate,
)
from translora.evaluate.data import Split, read_task_data, split
from translora.evaluate.results import BaseSize, Migration, Results, Setup, TaskItems, summarise
from translora.evaluate.statistics import NUM_REPLICATES, chance_share, majority_share
from translora.fleet import check_section, check_training, migrate
from translora.gate.agreement import Answers, answer_rows, is_equal, judge, run_answers
from translora.prepare import prepare
from translora.run.files import digest, sha256_path, write_bytes, write_jsonl
from translora.run.member import STUDENT
from translora.run.progress import Progress
from translora.run.rundir import open_run, versions
from translora.run.state import AdapterState
from translora.synthesis.actors import Hosts, Row

logger = logging.getLogger(__name__)
ITEMS = "items.parquet"
"""In a repetition's directory: every arm's answer to every test item."""


@dataclass(frozen=True)
class Repetition:
    """What one seed came to."""

    seed: int
    splits: Mapping[str, Split]
    """By task."""
    states: Mapping[str, Sequence[AdapterState]]
    """What became of the migrations, by arm."""
    answers: Answers

    def correct(self, task: str, arm: str) -> list[bool] | None:
        """Which test items the arm got right; None where it has no adapter."""
        if (task, arm) not in self.answers:
            return None
        rows = self.splits[task].test
        return [is_equal(answer, row["target"]) for answer, row in zip(self.answers[task, arm], rows, strict=True)]


def evaluate(config: EvaluateConfig, start_cluster: Callable[[], None] = lambda: None) -> Results:
    """Measure; returns what is to be written. A rerun continues where a killed one stopped.

    Args:
        config: the evaluate file.
        start_cluster: called when everything has been checked: starts Ray.

    Raises:
        ValueError: the config, a base or the data of a task cannot be used.
    """
    data = {task.name: read_task_data(task.data) for task in config.tasks}
    splits = {seed: {task.name: split(data[task.name], task, seed) for task in config.tasks} for seed in config.seeds}
    source, target = inspect_base(config.source.model), inspect_base(config.target.model)
    if source.fingerprint == target.fingerprint:
        raise ValueError(f"source and target are the same base ({source.path}); set `target` to another base")
    for base in (source, target):
        check_section(config.train, base, "train")
    for arm in config.arms:
        check_training(config.fleet(config.seeds[0], arm), target)
    with open_run(config.run_dir, config):
        start_cluster()
        repetitions = [repeat(config, seed, splits[seed], source, target) for seed in config.seeds]
    setup = Setup(
        source=base_size(source),
        target=base_size(target),
        seeds=config.seeds,
        num_samples=config.num_samples,
        arms=config.arms,
        train=config.train.model_dump(include={"lora", "epochs", "learning_rate", "batch_size"}),
        distill=config.distill.model_dump(include={"lora", "epochs", "learning_rate", "batch_size"}),
        gate=config.gate.model_dump(),
        num_replicates=NUM_REPLICATES,
        versions=versions(),
    )
    items = [task_items(config, task.name, repetitions) for task in config.tasks]
    return summarise(setup, items, [one for repetition in repetitions for one in migrations(config, repetition)])


def repeat(
    config: EvaluateConfig, seed: int, splits: Mapping[str, Split], source: BaseInfo, target: BaseInfo
) -> Repetition:
    """One repetition: everything that depends on the seed."""
    for name, part in splits.items():
        write_jsonl(config.train_file(seed, name), part.train)
    logger.info("seed %d: bundles on %s", seed, source.name)
    prepare(config.prepare(seed))
    logger.info("seed %d: LoRAs on %s with the real data", seed, target.name)
    adapters = {f"{REAL}/{task}": path for task, path in train_real(config, seed, splits, target).items()}
    states: dict[str, list[AdapterState]] = {}
    for arm in config.arms:
        logger.info("seed %d: migration, arm %s", seed, arm)
        fleet, earlier = without_gate(config.fleet(seed, arm)), [config.arm_dir(seed, other) for other in states]
        states[arm] = migrate(fleet, functools.partial(share_generation, earlier, fleet.run_dir))
        # The students themselves: a teacher of one answer passes no gate, and is measured all the same.
        moved = [state.name for state in states[arm] if state.gate is not None]
        adapters |= {f"{arm}/{name}": fleet.run_dir / "adapters" / name / STUDENT for name in moved}
    answers = answer(config, seed, splits, adapters, source, target)
    repetition = Repetition(seed, splits, states, answers)
    write_items(config.seed_dir(seed) / ITEMS, repetition)
    return repetition


def train_real(config: EvaluateConfig, seed: int, splits: Mapping[str, Split], target: BaseInfo) -> dict[str, Path]:
    """Train a LoRA on the target base with each task's real data, as the source adapter was; directories by task.

    Raises:
        ValueError: the data of a task cannot be trained on.
    """
    directory = config.seed_dir(seed) / REAL
    outputs = {name: directory / "adapters" / name for name in splits}
    jobs = []
    for name, part in splits.items():
        rows = [{"input": row["input"], "answer": row["target"].strip()} for row in part.train]
        work_dir = directory / "tasks" / f"{name}-{digest(rows)}"
        jobs.append(
            make_job(
                name,
                REAL,
                rows,
                config.train,
                output=outputs[name],
                work_dir=work_dir,
                root_seed=seed,
                with_end=True,
            )
        )
    steps: dict[str, int] = {}

    def on_step(job_name: str, row: dict[str, float]) -> None:
        steps[job_name] = int(row["step"])
        progress.update(sum(steps.values()), f"{job_name} loss {row['loss']:.3f}")

    with Progress("train on real data", sum(job.expected_steps(config.train.batch_size) for job in jobs)) as progress:
        train_adapters(config.target, target.name, jobs, config.train, config.resources, directory, on_step)
    refuse_failures(jobs)
    return outputs


def share_generation(earlier: Sequence[Path], run_dir: Path) -> None:
    """Give a migration what earlier arms generated: the same requests have the same directory, and cost the most."""
    for block in (path for other in earlier for path in sorted(other.glob("rounds/*-generate-*/*.parquet"))):
        own = run_dir / "rounds" / block.parent.name / block.name
        if own.exists():
            continue
        own.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(block, own)
        except OSError:  # a file system without hard links
            write_bytes(own, block.read_bytes())


def answer(
    config: EvaluateConfig,
    seed: int,
    splits: Mapping[str, Split],
    adapters: Mapping[str, Path],
    source: BaseInfo,
    target: BaseInfo,
) -> Answers:
    """Let every arm answer the test items: one pass on the source base, one on the target base.

    Args:
        adapters: PEFT directory on the target base by `arm/task`.
    """
    bundles = {task: read_bundle(config.bundle_dir(seed, task)) for task in splits}
    teachers = {f"{SOURCE_ADAPTER}/{task}": bundle.path for task, bundle in bundles.items()}
    source_rows: list[Row] = []
    target_rows: list[Row] = []
    for task, part in splits.items():
        samples = [(row["input"], row["target"]) for row in part.test]
        template = bundles[task].manifest.prompt_template
        for arm, slot in ((SOURCE_BASE, None), (SOURCE_ADAPTER, f"{SOURCE_ADAPTER}/{task}")):
            source_rows += answer_rows(task, arm, samples, slot, template)
        target_rows += answer_rows(task, TARGET_BASE, samples, None, "auto")
        for arm in (REAL, *config.arms):
            if f"{arm}/{task}" in adapters:
                target_rows += answer_rows(task, arm, samples, f"{arm}/{task}", "auto")
    answers: Answers = {}
    with Hosts(config.resources) as hosts:
        for info, base, slots, rows in (
            (source, config.source, teachers, source_rows),
            (target, config.target, dict(adapters), target_rows),
        ):
            found, _ = run_answers(
                f"seed {seed}: test items on {info.name}",
                rows,
                base=base,
                adapters={slot: str(path) for slot, path in slots.items()},
                batch_size=config.synthesis.batch_size,
                max_answer_tokens=config.synthesis.max_answer_tokens,
                hosts=hosts,
                directory=config.seed_dir(seed) / "answers",
                digests={slot: sha256_path(path) for slot, path in slots.items()} | {"base": info.fingerprint},
            )
            answers |= found
    return answers


def write_items(path: Path, repetition: Repetition) -> None:
    """Write every arm's answer to every test item: seed, task, arm, index, input, target, answer, correct."""
    rows = []
    for (task, arm), answers in sorted(repetition.answers.items()):
        correct = repetition.correct(task, arm) or []
        for index, (row, text, good) in enumerate(zip(repetition.splits[task].test, answers, correct, strict=True)):
            own = {"seed": repetition.seed, "task": task, "arm": arm, "index": index}
            rows.append({**own, **row, "answer": text, "correct": good})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def task_items(config: EvaluateConfig, name: str, repetitions: Sequence[Repetition]) -> TaskItems:
    """One task's items over all seeds."""
    (task,) = [task for task in config.tasks if task.name == name]
    correct: dict[str, dict[int, list[bool]]] = {}
    for repetition in repetitions:
        for arm in (SOURCE_BASE, SOURCE_ADAPTER, TARGET_BASE, REAL, *config.arms):
            if (good := repetition.correct(name, arm)) is not None:
                correct.setdefault(arm, {})[repetition.seed] = good
    targets = [[row["target"] for row in repetition.splits[name].test] for repetition in repetitions]
    return TaskItems(
        name=name,
        num_train=task.num_train,
        num_test=task.num_test,
        majority=sum(map(majority_share, targets)) / len(targets),
        chance=chance_share([target for part in targets for target in part]),
        correct=correct,
    )


def migrations(config: EvaluateConfig, repetition: Repetition) -> list[Migration]:
    """Every adapter of a repetition: the gate's verdict by the configured thresholds beside its real accuracy."""
    found = []
    for arm, states in repetition.states.items():
        thresholds = config.fleet(repetition.seed, arm).gate
        for state in states:
            gate = state.gate
            good, source = repetition.correct(state.name, arm), repetition.correct(state.name, SOURCE_ADAPTER) or []
            judged = gate and judge(gate.agreement_student, gate.agreement_base, gate.num_heldout, thresholds)
            found.append(
                Migration(
                    task=state.name,
                    seed=repetition.seed,
                    arm=arm,
                    status=state.status,
                    note=state.reason or state.synthesis.shortfall,
                    synthesis=state.synthesis,
                    gate=judged,
                    accuracy=sum(good) / len(good) if good else None,
                    source_accuracy=sum(source) / len(source),
                )
            )
    return found


def base_size(base: BaseInfo) -> BaseSize:
    """Name and number of parameters, as the files hold them (tied weights once)."""
    return BaseSize(name=base.name, num_parameters=sum(map(math.prod, base.shapes.values())))
