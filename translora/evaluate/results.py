"""What an evaluation found, as plain values: results.json, from which the Markdown and the plot are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from translora.config import GateConfig
from translora.errors import InputError
from translora.evaluate.calibration import Calibration, Point, calibrate
from translora.evaluate.config import REFERENCE_ARMS, SOURCE_ADAPTER
from translora.evaluate.items import ItemScores, Record, TaskItems, TaskResult
from translora.evaluate.statistics import Estimate, mean_estimate, mean_retention
from translora.run.state import GateResult, SynthesisStats

SCHEMAS = (3, 4)
"""That can be read; the last is written. 4 has the items."""
DECIDING_VERSIONS = ("translora", "torch", "transformers", "peft", "deepspeed", "ray")
"""Packages whose version may change a result."""


class BaseSize(Record):
    """A base model."""

    name: str
    num_parameters: int
    identity: str = ""
    """Hex sha256 of what decides its answers; empty in results of an older version, as the dtype."""
    dtype: str = ""
    """Of the weights in synthesis, gate and measurement."""


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
    """Digest of all rows of each task, whichever the seeds drew; empty in some results of an older version."""
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
    answers_per_sample: float | None = None
    """Mean of what the student learnt by soft labels; None without them, and in results of an older version."""
    num_seen: int = 0
    """Test items whose input was invented word for word, and trained on."""


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

    schema_version: Literal[3, 4] = 4
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
    items: list[ItemScores] = []
    """Empty in results of an older version."""

    @property
    def points(self) -> list[Point]:
        """The migrated adapters of the tasks that count, as the gate saw them and as they are."""
        counted = {task.name for task in self.tasks if task.counted}
        return [
            Point(one.gate, one.accuracy, one.source_accuracy, one.task, one.seed)
            for one in self.migrations
            if one.task in counted and one.gate is not None and one.accuracy is not None
        ]

    @property
    def calibration(self) -> Calibration:
        """The gate against real accuracy."""
        return calibrate(self.points, GateConfig(**self.setup.gate))


def items_by_task(tasks: Sequence[TaskResult], items: Sequence[ItemScores]) -> list[TaskItems]:
    """The items of some tasks, which may be of several evaluations."""
    return [
        TaskItems(
            task.name, task.num_train, task.num_test, [one for one in items if one.task == task.name], task.metric
        )
        for task in tasks
    ]


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
        items=[one for task in tasks for one in task.seeds],
    )


def join(parts: Sequence[tuple[str, Results]]) -> Results:
    """One evaluation whose seeds were measured apart, on several machines or days; parts by what messages call them.

    Raises:
        InputError: the parts differ in bases, tasks, settings or deciding versions, have a seed in common, or no items.
    """
    if old := [name for name, part in parts if not part.items]:
        raise InputError(f"{old[0]}: written by an older version, without the items' scores; measure it again")
    (first_name, first), *others = parts
    expected = comparable(first)
    for name, part in others:
        own = comparable(part)
        if first.setup.data and part.setup.data and part.setup.data != first.setup.data:
            other = sorted(task for task, one in first.setup.data.items() if part.setup.data.get(task) != one)
            raise InputError(
                f"{name}: other data than in {first_name}: {', '.join(other)}; join seeds of the same rows"
            )
        if strange := next((key for key in expected if own[key] != expected[key]), None):
            raise InputError(f"{name}: {strange} {own[strange]}, in {first_name} {expected[strange]}; join equal ones")
    seeds = sorted(seed for _, part in parts for seed in part.setup.seeds)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {seeds}: one was measured twice; give its results once")
    items = sorted((one for _, part in parts for one in part.items), key=lambda one: one.seed)
    tasks = items_by_task(first.tasks, items)
    migrations = sorted((one for _, part in parts for one in part.migrations), key=lambda one: one.seed)
    return summarise(first.setup.model_copy(update={"seeds": seeds}), tasks, migrations)


def comparable(results: Results) -> dict[str, Any]:
    """What two parts of one evaluation have in common."""
    found = results.setup.model_dump(exclude={"seeds", "data", "versions", "gate"})
    found["gate"] = dict(GateConfig(**results.setup.gate))  # older results leave out what is at its default
    found["versions"] = {name: results.setup.versions.get(name) for name in DECIDING_VERSIONS}
    found["tasks"] = [(task.name, task.num_train, task.num_test, task.metric) for task in results.tasks]
    return found
