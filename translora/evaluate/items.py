"""One task's test items, right or wrong by arm and seed, and what follows from them: intervals, retention, skill.

Arrays are named as in `translora.evaluate.statistics`: [S, N] is right (1) or wrong (0) by seed and test item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from translora.evaluate.config import REAL, REFERENCE_ARMS, SOURCE_ADAPTER, TARGET_BASE
from translora.evaluate.statistics import Estimate, Floats, Resample, Retention, retention


class Record(BaseModel):
    """A part of results.json."""

    model_config = ConfigDict(extra="forbid")


def number_text(value: float) -> str:
    """A number as short as it can be read again."""
    return str(int(value)) if value == int(value) else repr(value)


def words(text: Any) -> Any:
    """What a line of a file holds; other values as they are."""
    return text.split() if isinstance(text, str) else text


Texts = Annotated[list[str], BeforeValidator(words), PlainSerializer(" ".join)]
"""Short texts without spaces; one line of a file."""
Numbers = Annotated[
    list[float], BeforeValidator(words), PlainSerializer(lambda values: " ".join(map(number_text, values)))
]
"""Numbers; one line of a file."""


class ItemScores(Record):
    """One task's test items in one repetition, in their order: what every table and interval is computed from."""

    task: str
    seed: int
    data: str = ""
    """Digest of the rows, training and test."""
    inputs: Texts
    """Digest of each item's input: the same one in two repetitions is drawn as one."""
    commonest: Numbers
    """1 for the items that have the commonest target."""
    chance: float
    """What guessing evenly would reach."""
    auc: float | None = None
    """Of the bundle's discriminator, on inputs that it was not trained on; None where it has none, or unmeasured."""
    correct: dict[str, Numbers]
    """By arm: 1 is right, 0 wrong, and what the harness finds in between."""


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


@dataclass(frozen=True)
class TaskItems:
    """One task's test items: what every arm got right."""

    name: str
    num_train: int
    num_test: int
    seeds: Sequence[ItemScores]
    """One repetition each, in the order of the seeds."""
    metric: str = ""
    drawn: dict[bool, Resample] = field(default_factory=dict, repr=False, compare=False)
    """What `resample` has drawn."""

    @property
    def majority(self) -> float:
        """What one answer to every item can reach, mean over seeds."""
        return float(np.mean([np.mean(one.commonest) for one in self.seeds]))

    @property
    def chance(self) -> float:
        """What guessing evenly would reach, mean over seeds."""
        return float(np.mean([one.chance for one in self.seeds]))

    @property
    def floor_SN(self) -> Floats:
        """What answers that do not depend on the input have right: the commonest one's, or the chance of a guess."""
        majority_SN = np.asarray([one.commonest for one in self.seeds], dtype=float)
        return majority_SN if self.majority >= self.chance else np.full_like(majority_SN, self.chance)

    def array(self, arm: str) -> Floats:
        """An arm's [S, N]; without an adapter in a seed it is the bare target base, which its owner is left with."""
        return np.asarray([one.correct.get(arm, one.correct[TARGET_BASE]) for one in self.seeds], dtype=float)

    def resample(self, *, over_seeds: bool) -> Resample:
        """The draws of the items, the same whoever asks."""
        if over_seeds not in self.drawn:
            inputs_SN = np.asarray([one.inputs for one in self.seeds])
            key = f"{self.name}/{[one.seed for one in self.seeds]}"
            self.drawn[over_seeds] = Resample(inputs_SN, key, over_seeds=over_seeds)
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
