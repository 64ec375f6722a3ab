"""What an evaluation found, as plain values: results.json, from which the Markdown and the plot are written.

Arrays are named as in `translora.evaluate.statistics`: [S, N] is right (1) or wrong (0) by seed and test item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from translora.evaluate.config import REAL, REFERENCE_ARMS, SOURCE_ADAPTER, TARGET_BASE
from translora.evaluate.statistics import (
    Estimate,
    Floats,
    Resample,
    Retention,
    Separation,
    best_separation,
    mean_estimate,
    mean_retention,
    retention,
    separation,
    spearman_estimate,
)
from translora.run.state import GateResult, SynthesisStats

KEPT_SHARE = 0.9
"""An adapter kept its skill if it has this share of the source adapter's accuracy."""


ROUNDING = 1e-9


class Record(BaseModel):
    """A part of results.json."""

    model_config = ConfigDict(extra="forbid")


class BaseSize(Record):
    """A base model."""

    name: str
    num_parameters: int


class Setup(Record):
    """What was compared, and how large it was."""

    source: BaseSize
    target: BaseSize
    seeds: list[int]
    num_samples: int
    arms: dict[str, dict[str, Any]]
    """The settings that each migration overrides."""
    train: dict[str, Any]
    distill: dict[str, Any]
    gate: dict[str, Any]
    num_replicates: int
    versions: dict[str, str]


class Migration(Record):
    """One adapter of one arm in one repetition."""

    task: str
    seed: int
    arm: str
    note: str
    """Why there is none, or what is remarkable about it."""
    synthesis: SynthesisStats
    gate: GateResult | None
    """Judged by the arm's own thresholds."""
    accuracy: float | None
    """On the real test items; None where there is no migrated adapter."""
    source_accuracy: float


class TaskResult(Record):
    """One task over all seeds."""

    name: str
    num_train: int
    num_test: int
    majority: float
    """The most that one answer to every test item can reach, mean over seeds."""
    chance: float
    metric: str = ""
    """Of lm-evaluation-harness; empty is exact match."""
    counted: bool
    """Whether the source adapter beats the majority class beyond its interval: the headline is of these tasks."""
    accuracy: dict[str, Estimate]
    """By arm; the interval draws test items."""
    gain: Estimate
    """Real-data LoRA minus target base; the interval draws seeds, then items."""
    retention: dict[str, Estimate | None]
    """By arm, and of the source adapter itself; None where the gain is not positive beyond its interval."""


class ArmResult(Record):
    """One migration method over the tasks that count."""

    accuracy: Estimate | None
    retention: Estimate | None
    """Mean of the tasks' retention, where it is defined."""
    num_defined: int
    """Tasks whose retention is defined."""
    num_not_below_source: int
    """Tasks on which the migrated adapter is at least as good as the source adapter."""
    against_first: Estimate | None
    """Accuracy minus that of the first arm, paired by item; None for the first arm."""


class Calibration(Record):
    """The gate's agreement against real accuracy, over all migrated adapters of all tasks."""

    with_accuracy: Estimate | None
    """Spearman correlation of agreement and the migrated adapter's accuracy."""
    with_difference: Estimate | None
    """Spearman correlation of agreement and migrated minus source adapter."""
    num_kept: int
    """Adapters with KEPT_SHARE of their source adapter's accuracy."""
    num_lost: int
    best: Separation | None
    """The threshold of agreement that best separates the two."""
    configured: Separation | None
    """The configured min_agreement."""


class Results(Record):
    """results.json."""

    schema_version: int = 1
    setup: Setup
    tasks: list[TaskResult]
    references: dict[str, Estimate | None]
    """Mean accuracy over the tasks that count, by reference arm."""
    copy_retention: Estimate | None = None
    """Mean retention of the source adapter itself: of a student that answers exactly as its teacher does."""
    arms: dict[str, ArmResult]
    calibration: Calibration
    migrations: list[Migration]


@dataclass(frozen=True)
class TaskItems:
    """One task's test items: what every arm got right, and in which seeds it has an adapter."""

    name: str
    num_train: int
    num_test: int
    majority: float
    chance: float
    correct: Mapping[str, Mapping[int, Sequence[float]]]
    """By arm and seed, in the order of the items: 1 is right, 0 wrong."""
    metric: str = ""

    def arrays(self, *arms: str) -> tuple[list[Floats], list[int]]:
        """The arms' [S, N] over the seeds that all of them have, and these seeds."""
        seeds = sorted(set.intersection(*(set(self.correct.get(arm, {})) for arm in arms)))
        return [np.asarray([self.correct[arm][seed] for seed in seeds], dtype=float) for arm in arms], seeds

    def resample(self, seeds: Sequence[int], *, over_seeds: bool) -> Resample:
        """The draws of these seeds, the same whoever asks."""
        return Resample(len(seeds), self.num_test, f"{self.name}/{list(seeds)}", over_seeds=over_seeds)

    def mean(self, first: str, second: str | None = None, *, over_seeds: bool) -> tuple[float, Floats] | None:
        """Mean and replicates of an arm's accuracy, or of one arm's minus another's; None without a common seed."""
        arrays, seeds = self.arrays(*([first] if second is None else [first, second]))
        if not seeds:
            return None
        values_SN = arrays[0] if second is None else arrays[0] - arrays[1]
        return float(values_SN.mean()), self.resample(seeds, over_seeds=over_seeds).means(values_SN)

    def retention(self, arm: str) -> Retention | None:
        """What an arm kept, over the seeds in which it has an adapter."""
        (base_SN, real_SN, migrated_SN), seeds = self.arrays(TARGET_BASE, REAL, arm)
        if not seeds:
            return None
        return retention(base_SN, real_SN, migrated_SN, self.resample(seeds, over_seeds=True))

    def result(self, arms: Sequence[str]) -> TaskResult:
        """The task's line of the tables."""
        accuracy = {}
        for arm in (*REFERENCE_ARMS, *arms):
            (values_SN,), seeds = self.arrays(arm)
            if seeds:
                accuracy[arm] = self.resample(seeds, over_seeds=False).estimate(values_SN)
        (base_SN, real_SN), seeds = self.arrays(TARGET_BASE, REAL)
        found = {arm: self.retention(arm) for arm in (SOURCE_ADAPTER, *arms)}
        return TaskResult(
            name=self.name,
            num_train=self.num_train,
            num_test=self.num_test,
            majority=self.majority,
            chance=self.chance,
            metric=self.metric,
            counted=accuracy[SOURCE_ADAPTER].low > max(self.majority, self.chance),
            accuracy=accuracy,
            gain=self.resample(seeds, over_seeds=True).estimate(real_SN - base_SN),
            retention={arm: one.estimate if one else None for arm, one in found.items()},
        )


def mean_over(tasks: Sequence[TaskItems], first: str, second: str | None = None) -> Estimate | None:
    """Mean over tasks of an arm's accuracy (items drawn), or of a difference of arms (seeds and items drawn)."""
    found = [one for task in tasks if (one := task.mean(first, second, over_seeds=second is not None)) is not None]
    return mean_estimate([value for value, _ in found], [replicates for _, replicates in found])


def arm_result(arm: str, first: str, tasks: Sequence[TaskItems]) -> ArmResult:
    """One arm over the tasks that count."""
    found = [one for task in tasks if (one := task.retention(arm)) is not None]
    differences = [task.mean(arm, SOURCE_ADAPTER, over_seeds=True) for task in tasks]
    return ArmResult(
        accuracy=mean_over(tasks, arm),
        retention=mean_retention(found),
        num_defined=sum(one.value is not None for one in found),
        num_not_below_source=sum(one is not None and one[0] >= 0 for one in differences),
        against_first=None if arm == first else mean_over(tasks, arm, first),
    )


def calibrate(migrations: Sequence[Migration], min_agreement: float) -> Calibration:
    """Whether the gate's agreement tells how good a migrated adapter really is."""
    points = [
        (one.gate.agreement_student, one.accuracy, one.source_accuracy, one.task)
        for one in migrations
        if one.gate is not None and one.accuracy is not None
    ]
    agreements, tasks = [point[0] for point in points], [point[3] for point in points]
    # Of nothing, everything is kept: an adapter whose source was always wrong says nothing about the threshold.
    judged = [
        (agreement, migrated >= KEPT_SHARE * source - ROUNDING)
        for agreement, migrated, source, _ in points
        if source > 0
    ]
    kept = [good for _, good in judged]
    return Calibration(
        with_accuracy=spearman_estimate(agreements, [migrated for _, migrated, _, _ in points], tasks),
        with_difference=spearman_estimate(agreements, [migrated - source for _, migrated, source, _ in points], tasks),
        num_kept=sum(kept),
        num_lost=len(kept) - sum(kept),
        best=best_separation([agreement for agreement, _ in judged], kept),
        configured=separation([agreement for agreement, _ in judged], kept, min_agreement),
    )


def summarise(setup: Setup, tasks: Sequence[TaskItems], migrations: Sequence[Migration]) -> Results:
    """All tables of an evaluation from its items."""
    arms = list(setup.arms)
    lines = [task.result(arms) for task in tasks]
    counted = [task for task, line in zip(tasks, lines, strict=True) if line.counted]
    return Results(
        setup=setup,
        tasks=lines,
        references={arm: mean_over(counted, arm) for arm in REFERENCE_ARMS},
        copy_retention=mean_retention([one for task in counted if (one := task.retention(SOURCE_ADAPTER)) is not None]),
        arms={arm: arm_result(arm, arms[0], counted) for arm in arms},
        calibration=calibrate(migrations, setup.gate["min_agreement"]),
        migrations=list(migrations),
    )
