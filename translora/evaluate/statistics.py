"""The statistics of an evaluation: bootstrap intervals, retention, rank correlation, the gate's best threshold.

numpy alone, and seeded: the same answers give the same numbers. In names of arrays R is the number of bootstrap
replicates, S of seeds (repetitions), N of test items in each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from translora.run.files import derive_seed
from translora.synthesis.prompts import normalise

Floats = npt.NDArray[np.floating[Any]]
NUM_REPLICATES = 2000
TAILS = (0.025, 0.975)
"""Quantiles of the replicates that end a 95 % interval."""
MIN_GROUPS = 5
"""Fewest tasks of which a correlation's interval is drawn."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Resample:
    """One bootstrap of a task's items, the same draws for every arm: differences between arms are paired.

    An input that is a test item in several seeds is drawn as one: what makes it hard is the same in all of them.

    Args:
        items_SN: what tells one item's input from another's.
        key: what the draws depend on, beside the sizes.
        over_seeds: draw seeds, too (hierarchical); else items alone.
    """

    def __init__(self, items_SN: npt.NDArray[Any], key: str, *, over_seeds: bool) -> None:
        rng = np.random.default_rng(derive_seed("bootstrap", key, *items_SN.shape, over_seeds))
        shape = (NUM_REPLICATES, len(items_SN))
        self.seeds_RS = rng.integers(len(items_SN), size=shape) if over_seeds else np.indices(shape)[1]
        inputs, places = np.unique(items_SN, return_inverse=True)
        times_RI = rng.multinomial(len(inputs), np.full(len(inputs), 1 / len(inputs)), size=NUM_REPLICATES)
        self.times_RSN = times_RI.astype(np.int16)[:, places.reshape(items_SN.shape)]

    def means(self, correct_SN: Floats) -> Floats:
        """The mean of every replicate, [R]: over its seeds of the mean over the items that were drawn."""
        drawn_RS = self.times_RSN.sum(axis=2)
        right_RS = np.einsum("rsn,sn->rs", self.times_RSN, correct_SN)
        means_RS = np.divide(right_RS, drawn_RS, out=np.full(drawn_RS.shape, np.nan), where=drawn_RS > 0)
        means_RS = np.take_along_axis(means_RS, self.seeds_RS, axis=1)
        there_RS = ~np.isnan(means_RS)  # of a few items none may be drawn
        sums_R, counts_R = np.where(there_RS, means_RS, 0).sum(axis=1), there_RS.sum(axis=1)
        return np.divide(sums_R, counts_R, out=np.full(len(sums_R), np.nan), where=counts_R > 0)

    def estimate(self, correct_SN: Floats) -> Estimate:
        """The mean with its interval; of differences where `correct_SN` is one array minus another."""
        return estimate(float(correct_SN.mean()), self.means(correct_SN))


def all_different(num_seeds: int, num_items: int) -> npt.NDArray[Any]:
    """Items [S, N] of which no two have one input."""
    return np.arange(num_seeds * num_items).reshape(num_seeds, num_items)


def estimate(value: float, replicates_R: Floats) -> Estimate:
    """A value with the percentile interval of its replicates; those that are NaN are left out."""
    low, high = np.nanquantile(replicates_R, TAILS)
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Retention:
    """What a migration kept of the gain that real data would have brought."""

    gain: Estimate
    """Real-data adapter minus target base: what is divided by."""
    value: float | None
    """rho; None where the gain is not positive beyond its interval."""
    replicates_R: Floats
    """rho of every replicate, NaN where the replicate's gain is not positive."""

    @property
    def estimate(self) -> Estimate | None:
        """rho with its interval."""
        return None if self.value is None else estimate(self.value, self.replicates_R)


def retention(base_SN: Floats, real_SN: Floats, migrated_SN: Floats, resample: Resample) -> Retention:
    """rho = (migrated - target base) / (real-data adapter - target base), accuracies over the same items."""
    gain = resample.estimate(real_SN - base_SN)
    if gain.low <= 0:
        return Retention(gain, None, np.full(NUM_REPLICATES, np.nan))
    gains_R = resample.means(real_SN - base_SN)
    kept_R = resample.means(migrated_SN - base_SN)
    replicates_R = np.divide(kept_R, gains_R, out=np.full(NUM_REPLICATES, np.nan), where=gains_R > 0)
    return Retention(gain, float((migrated_SN - base_SN).mean()) / gain.value, replicates_R)


def mean_retention(retentions: Sequence[Retention]) -> Estimate | None:
    """Mean of the tasks' rho where it is defined; None where it is nowhere."""
    defined = [(found.value, found.replicates_R) for found in retentions if found.value is not None]
    return mean_estimate([value for value, _ in defined], [replicates_R for _, replicates_R in defined])


def mean_estimate(values: Sequence[float], replicates: Sequence[Floats]) -> Estimate | None:
    """Mean over tasks, with the interval of the replicates' means: the tasks are given, their items are drawn.

    A task whose replicate is NaN is left out of that replicate's mean; None without tasks.
    """
    if not values:
        return None
    stacked = np.stack(replicates)
    counts_R = np.maximum((~np.isnan(stacked)).sum(axis=0), 1)
    means_R = np.where(np.isnan(stacked).all(axis=0), np.nan, np.nansum(stacked, axis=0) / counts_R)
    return estimate(float(np.mean(values)), means_R)


def chance_share(targets: Sequence[str]) -> float:
    """What guessing evenly among the targets that occur would reach."""
    return 1 / len({normalise(target) for target in targets})


def ranks(values: Sequence[float]) -> Floats:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Floats = (last - (counts - 1) / 2)[inverse]
    return mean_rank


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where either side is constant or there are fewer than three points."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


@dataclass(frozen=True)
class Correlation:
    """A rank correlation and the 95 % interval that draws whole groups, where there are enough of them."""

    value: float
    interval: tuple[float, float] | None
    num_groups: int


def rank_correlation(x: Sequence[float], y: Sequence[float], groups: Sequence[str]) -> Correlation | None:
    """Spearman's correlation with an interval that draws whole groups (tasks), whose points belong together.

    None where there is no correlation. With fewer than MIN_GROUPS groups there is no interval: its ends would be the
    correlations of single groups.
    """
    value = spearman(x, y)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    if value is None or len(members) < MIN_GROUPS:
        return None if value is None else Correlation(value, None, len(members))
    rng = np.random.default_rng(derive_seed("spearman", len(x), *members))
    parts = list(members.values())
    replicates = []
    for chosen in rng.integers(len(parts), size=(NUM_REPLICATES, len(parts))):
        indices = list(itertools.chain.from_iterable(parts[index] for index in chosen))
        drawn = spearman([x[index] for index in indices], [y[index] for index in indices])
        replicates.append(np.nan if drawn is None else drawn)
    found = estimate(value, np.asarray(replicates))
    return Correlation(value, (found.low, found.high), len(members))


def within_groups(x: Sequence[float], y: Sequence[float], groups: Sequence[str]) -> float | None:
    """The mean of the groups' own Spearman correlations, over those that have one; None where none has."""
    own = [
        spearman(*([side[index] for index, name in enumerate(groups) if name == group] for side in (x, y)))
        for group in dict.fromkeys(groups)
    ]
    defined = [value for value in own if value is not None]
    return float(np.mean(defined)) if defined else None


@dataclass(frozen=True)
class Separation:
    """How well a threshold of agreement tells the adapters that kept their accuracy from those that lost it."""

    threshold: float
    balanced_accuracy: float
    """Mean of the share of kept adapters that pass and of lost ones that do not; 0.5 is no better than chance."""


def separation(threshold: float, passed: Sequence[bool], kept: Sequence[bool]) -> Separation | None:
    """What passed with a threshold, rated; None where all adapters kept their accuracy, or all lost it."""
    if len(set(kept)) < 2:
        return None
    through, good = np.asarray(passed), np.asarray(kept)
    return Separation(threshold, float((through[good].mean() + (~through[~good]).mean()) / 2))


def best_separation(
    agreements: Sequence[float], kept: Sequence[bool], passed: Callable[[float], Sequence[bool]]
) -> Separation | None:
    """The best threshold, of equals the lowest: 0, or half-way between neighbouring agreements.

    Args:
        passed: what passes with a threshold.
    """
    values = sorted(set(agreements))
    thresholds = [0.0, *((low + high) / 2 for low, high in itertools.pairwise(values))]
    rated = [one for threshold in thresholds if (one := separation(threshold, passed(threshold), kept)) is not None]
    return max(rated, key=lambda one: one.balanced_accuracy) if rated else None
