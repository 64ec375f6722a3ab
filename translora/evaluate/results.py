"""What an evaluation found, as plain values: results.json, from which the Markdown and the plot are written.

Arrays are named as in `translora.evaluate.statistics`: [S, N] is right (1) or wrong (0) by seed and test item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from translora.config import GateConfig
from translora.evaluate.calibration import Calibration, Point, calibrate
from translora.evaluate.config import REAL, REFERENCE_ARMS, SOURCE_ADAPTER, TARGET_BASE
from translora.evaluate.statistics import (
    Estimate,
    Floats,
    Resample,
    Retention,
    all_different,
    mean_estimate,
    mean_retention,
    retention,
)
from translora.run.state import GateResult, SynthesisStats

SCHEMA: Literal[3] = 3


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
    synthesis: dict[str, Any] = {}
    """Empty in results of an older version, as the next ones."""
    discriminator: dict[str, Any] = {}
    data: dict[str, str] = {}
    """Digest of each task's rows, in all seeds."""
    adapters: dict[str, str] = {}
    """sha256 of the source adapters that were given, by task."""
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
    num_seen: int = 0
    """Test items whose input was invented word for word, and trained on."""


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
    """Whether the source adapter beats the majority class beyond the interval of their difference, paired by item: the
    headline is of these tasks."""
    accuracy: dict[str, Estimate]
    """By arm; the interval draws test items."""
    gain: Estimate
    """Real-data adapter minus target base; the interval draws seeds, then items."""
    retention: dict[str, Estimate | None]
    """By arm, and of the source adapter itself; None where the gain is not positive beyond its interval."""
    skill: dict[str, Estimate | None]
    """Retention above the majority class: what one answer to everything can reach is in the target base's place."""


class ArmResult(Record):
    """One migration method over the tasks that count."""

    accuracy: Estimate | None
    retention: Estimate | None
    """Mean of the tasks' retention, where it is defined."""
    skill: Estimate | None
    """Mean of the tasks' retention above the majority class, where it is defined."""
    num_defined: int
    """Tasks whose retention is defined."""
    num_not_below_source: int
    """Tasks on which the migrated adapter is at least as good as the source adapter."""
    against_first: Estimate | None
    """Accuracy minus that of the first arm, paired by item; None for the first arm."""
    against_source: Estimate | None = None
    """Accuracy minus that of the source adapter, paired by item."""


class Results(Record):
    """results.json."""

    schema_version: Literal[3] = SCHEMA
    setup: Setup
    tasks: list[TaskResult]
    references: dict[str, Estimate | None]
    """Mean accuracy over the tasks that count, by reference arm."""
    copy_retention: Estimate | None = None
    """Mean retention of the source adapter itself: of a student that answers exactly as its teacher does."""
    copy_skill: Estimate | None
    """The same above the majority class."""
    arms: dict[str, ArmResult]
    migrations: list[Migration]

    @property
    def points(self) -> list[Point]:
        """The migrated adapters of the tasks that count, as the gate saw them and as they are."""
        counted = {task.name for task in self.tasks if task.counted}
        return [
            Point(one.gate, one.accuracy, one.source_accuracy, one.task)
            for one in self.migrations
            if one.task in counted and one.gate is not None and one.accuracy is not None
        ]

    @property
    def calibration(self) -> Calibration:
        """The gate against real accuracy."""
        return calibrate(self.points, GateConfig(**self.setup.gate))


@dataclass(frozen=True)
class TaskItems:
    """One task's test items: what every arm got right."""

    name: str
    num_train: int
    num_test: int
    chance: float
    commonest: Mapping[int, Sequence[float]]
    """By seed: 1 for the items that have the commonest target."""
    correct: Mapping[str, Mapping[int, Sequence[float]]]
    """By arm and seed, in the order of the items: 1 is right, 0 wrong."""
    metric: str = ""
    inputs: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """The items' inputs by seed, in their order; all of them different where there are none here."""
    drawn: dict[bool, Resample] = field(default_factory=dict, repr=False, compare=False)
    """What `resample` has drawn."""

    @property
    def majority(self) -> float:
        """What one answer to every item can reach, mean over seeds."""
        return float(np.mean([np.mean(own) for own in self.commonest.values()]))

    @property
    def floor_SN(self) -> Floats:
        """What answers that do not depend on the input have right: the commonest one's, or the chance of a guess."""
        majority_SN = np.asarray([self.commonest[seed] for seed in sorted(self.commonest)], dtype=float)
        return majority_SN if self.majority >= self.chance else np.full_like(majority_SN, self.chance)

    def array(self, arm: str) -> Floats:
        """An arm's [S, N]; without an adapter in a seed it is the bare target base, which its owner is left with."""
        own, base = self.correct.get(arm, {}), self.correct[TARGET_BASE]
        return np.asarray([own.get(seed, base[seed]) for seed in sorted(base)], dtype=float)

    def resample(self, *, over_seeds: bool) -> Resample:
        """The draws of the items, the same whoever asks."""
        if over_seeds not in self.drawn:
            seeds = sorted(self.correct[TARGET_BASE])
            own = [self.inputs[seed] for seed in seeds] if self.inputs else all_different(len(seeds), self.num_test)
            self.drawn[over_seeds] = Resample(np.asarray(own), f"{self.name}/{seeds}", over_seeds=over_seeds)
        return self.drawn[over_seeds]

    def mean(self, first: str, second: str | None = None, *, over_seeds: bool) -> tuple[float, Floats]:
        """Mean and replicates of an arm's accuracy, or of one arm's minus another's."""
        values_SN = self.array(first) if second is None else self.array(first) - self.array(second)
        return float(values_SN.mean()), self.resample(over_seeds=over_seeds).means(values_SN)

    def retention(self, arm: str, *, above_floor: bool = False) -> Retention:
        """What an arm kept of the gain over the target base, or over the floor where that is greater."""
        base_SN = self.array(TARGET_BASE)
        if above_floor and base_SN.mean() < self.floor_SN.mean():
            base_SN = self.floor_SN
        return retention(base_SN, self.array(REAL), self.array(arm), self.resample(over_seeds=True))

    def result(self, arms: Sequence[str]) -> TaskResult:
        """The task's line of the tables."""
        items = self.resample(over_seeds=False)
        accuracy = {arm: items.estimate(self.array(arm)) for arm in (*REFERENCE_ARMS, *arms)}
        adapters = (SOURCE_ADAPTER, *arms)
        return TaskResult(
            name=self.name,
            num_train=self.num_train,
            num_test=self.num_test,
            majority=self.majority,
            chance=self.chance,
            metric=self.metric,
            counted=items.estimate(self.array(SOURCE_ADAPTER) - self.floor_SN).low > 0,
            accuracy=accuracy,
            gain=self.retention(SOURCE_ADAPTER).gain,
            retention={arm: self.retention(arm).estimate for arm in adapters},
            skill={arm: self.retention(arm, above_floor=True).estimate for arm in adapters},
        )


def mean_over(tasks: Sequence[TaskItems], first: str, second: str | None = None) -> Estimate | None:
    """Mean over tasks of an arm's accuracy (items drawn), or of a difference of arms (seeds and items drawn)."""
    found = [task.mean(first, second, over_seeds=second is not None) for task in tasks]
    return mean_estimate([value for value, _ in found], [replicates for _, replicates in found])


def retention_over(tasks: Sequence[TaskItems], arm: str, *, above_floor: bool = False) -> Estimate | None:
    """Mean over tasks of what an arm kept."""
    return mean_retention([task.retention(arm, above_floor=above_floor) for task in tasks])


def arm_result(arm: str, first: str, tasks: Sequence[TaskItems]) -> ArmResult:
    """One arm over the tasks that count."""
    found = [task.retention(arm) for task in tasks]
    differences = [task.mean(arm, SOURCE_ADAPTER, over_seeds=True) for task in tasks]
    return ArmResult(
        accuracy=mean_over(tasks, arm),
        retention=mean_retention(found),
        skill=retention_over(tasks, arm, above_floor=True),
        num_defined=sum(one.value is not None for one in found),
        num_not_below_source=sum(value >= 0 for value, _ in differences),
        against_first=None if arm == first else mean_over(tasks, arm, first),
        against_source=mean_over(tasks, arm, SOURCE_ADAPTER),
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
        copy_retention=retention_over(counted, SOURCE_ADAPTER),
        copy_skill=retention_over(counted, SOURCE_ADAPTER, above_floor=True),
        arms={arm: arm_result(arm, arms[0], counted) for arm in arms},
        migrations=list(migrations),
    )
