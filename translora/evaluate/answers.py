"""Every arm's answers to the test items of one repetition, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from translora.bundle import BaseInfo, read_bundle
from translora.evaluate.config import REAL, REFERENCE_ARMS, SOURCE_ADAPTER, SOURCE_BASE, TARGET_BASE, EvaluateConfig
from translora.evaluate.data import Split
from translora.evaluate.results import Migration, TaskItems
from translora.evaluate.statistics import chance_share, majority_share
from translora.gate.agreement import Answers, answer_rows, is_equal, judge, run_answers
from translora.run.files import sha256_path, write_parquet
from translora.run.state import AdapterState
from translora.synthesis.actors import Hosts
from translora.synthesis.calls import Row


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
    write_parquet(path, pa.Table.from_pylist(rows))


def task_items(config: EvaluateConfig, name: str, repetitions: Sequence[Repetition]) -> TaskItems:
    """One task's items over all seeds."""
    (task,) = [task for task in config.tasks if task.name == name]
    correct: dict[str, dict[int, list[bool]]] = {}
    for repetition in repetitions:
        for arm in (*REFERENCE_ARMS, *config.arms):
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
            good, source = repetition.correct(state.name, arm), repetition.correct(state.name, SOURCE_ADAPTER) or []
            judged = gate = state.gate
            if gate is not None:
                judged = judge(
                    gate.agreement_student,
                    gate.agreement_base,
                    gate.num_heldout,
                    thresholds,
                    only_answer=state.synthesis.only_answer,
                    logliks=(gate.loglik_student, gate.loglik_base),
                )
            found.append(
                Migration(
                    task=state.name,
                    seed=repetition.seed,
                    arm=arm,
                    note=state.reason or state.synthesis.shortfall or state.synthesis.warning,
                    synthesis=state.synthesis,
                    gate=judged,
                    accuracy=sum(good) / len(good) if good else None,
                    source_accuracy=sum(source) / len(source),
                )
            )
    return found
