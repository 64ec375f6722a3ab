"""Known cases of the evaluation's statistics, and how often its intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from translora.evaluate import statistics
from translora.evaluate.statistics import (
    Resample,
    Retention,
    Separation,
    all_different,
    best_separation,
    chance_share,
    estimate,
    mean_estimate,
    mean_retention,
    rank_correlation,
    ranks,
    retention,
    separation,
    spearman,
    within_groups,
)
from translora.synthesis.quality import majority_share


def right(*counts: int, num_items: int = 40) -> np.ndarray:
    """[S, N]: in each seed the first `count` items right."""
    return np.asarray([[1.0] * count + [0.0] * (num_items - count) for count in counts])


def resample(num_seeds: int, num_items: int = 40, key: str = "task", over_seeds: bool = True) -> Resample:
    return Resample(all_different(num_seeds, num_items), key, over_seeds=over_seeds)


def test_an_interval_is_the_quantiles_of_the_replicates() -> None:
    found = estimate(0.4, np.arange(1001) / 1000)
    assert (found.value, found.low, found.high) == (0.4, pytest.approx(0.025), pytest.approx(0.975))
    with_nan = estimate(0.4, np.concatenate([np.full(50, np.nan), np.arange(1001) / 1000]))
    assert (with_nan.low, with_nan.high) == (pytest.approx(0.025), pytest.approx(0.975))


def test_the_same_draws_for_the_same_key_and_others_for_another() -> None:
    values = right(20, 30)
    means = resample(2).means(values)
    assert (means == resample(2).means(values)).all()
    assert (means != resample(2, key="other").means(values)).any()


def test_differences_of_arms_are_paired() -> None:
    """Two arms that differ on one item alone: unpaired, the interval would be as wide as those of the arms."""
    first, second = right(20, 20), right(20, 21)
    draws = resample(2, over_seeds=False)
    difference = draws.estimate(second - first)
    assert difference.value == pytest.approx(1 / 80)
    assert difference.low >= 0 and difference.high <= 4 / 80
    assert draws.estimate(first - first).high == 0
    assert draws.estimate(first).high - draws.estimate(first).low > 0.15


def test_seeds_are_drawn_in_the_hierarchical_bootstrap_alone() -> None:
    values = right(0, 40)  # all of the spread lies between the seeds
    items_alone, both = resample(2, over_seeds=False).estimate(values), resample(2).estimate(values)
    assert (items_alone.value, items_alone.low, items_alone.high) == (0.5, 0.5, 0.5)
    assert (both.value, both.low, both.high) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("over_seeds", "num_seeds", "spread", "least", "most"),
    # Items alone, no spread between seeds: nominal. Seeds that differ: a percentile bootstrap of few clusters is too
    # narrow, of three more so than of eight. Items within seeds that do not differ: too wide, on the safe side.
    [(False, 3, 0.0, 0.92, 0.98), (True, 8, 0.2, 0.86, 0.98), (True, 3, 0.2, 0.72, 0.9), (True, 3, 0.0, 0.96, 1.0)],
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    over_seeds: bool, num_seeds: int, spread: float, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "NUM_REPLICATES", 500)
    rng = np.random.default_rng(0)
    num_trials, hits = 400, 0
    for trial in range(num_trials):
        rates = 0.65 + rng.uniform(-spread, spread, size=(num_seeds, 1))
        values = (rng.random((num_seeds, 60)) < rates).astype(float)
        found = resample(num_seeds, 60, key=str(trial), over_seeds=over_seeds).estimate(values)
        hits += found.low <= 0.65 <= found.high
    assert least <= hits / num_trials <= most


def test_intervals_hold_the_truth_where_seeds_share_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds test 60 of 100 inputs each, of which some are hard in all of them; drawn apart: nine in ten hold."""
    monkeypatch.setattr(statistics, "NUM_REPLICATES", 500)
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for trial in range(400):
        rates = rng.beta(0.65, 0.35, size=100)
        items = np.stack([rng.permutation(100)[:60] for _ in range(3)])
        values = (rng.random((3, 60)) < rates[items]).astype(float)
        for place, drawn in enumerate((items, all_different(3, 60))):
            found = Resample(drawn, str(trial), over_seeds=False).estimate(values)
            hits[place] += found.low <= 0.65 <= found.high
    assert hits[0] / 400 >= 0.92 > 0.9 > hits[1] / 400


def test_retention_is_the_share_of_the_gain_that_was_kept() -> None:
    base, real, half = right(8, 8), right(32, 32), right(20, 20)
    draws = resample(2)
    found = retention(base, real, half, draws)
    assert found.gain.value == pytest.approx(0.6) and found.value == pytest.approx(0.5)
    assert found.estimate is not None and found.estimate.low < 0.5 < found.estimate.high
    worse = retention(base, real, right(4, 4), draws)
    assert worse.value == pytest.approx(-1 / 6)


def test_retention_of_the_references_is_exact_because_items_are_paired() -> None:
    base, real = right(8, 10), right(32, 30)
    for migrated, value in ((base, 0.0), (real, 1.0)):
        found = retention(base, real, migrated, resample(2)).estimate
        assert found is not None
        assert (found.value, found.low, found.high) == (value, value, value)


@pytest.mark.parametrize("real", [right(20, 20), right(19, 20), right(22, 20)], ids=["none", "negative", "tiny"])
def test_retention_is_undefined_without_a_gain_beyond_its_interval(real: np.ndarray) -> None:
    # "tiny": two items of 80, which a draw of the seeds alone can miss.
    found = retention(right(20, 20), real, right(30, 30), resample(2))
    assert found.value is None and found.estimate is None and found.gain.low <= 0
    assert np.isnan(found.replicates_R).all()


def test_a_mean_of_retentions_leaves_out_the_undefined_ones() -> None:
    draws = resample(2)
    whole = retention(right(8, 8), right(32, 32), right(32, 32), draws)
    half = retention(right(8, 8), right(32, 32), right(20, 20), draws)
    undefined = retention(right(8, 8), right(8, 8), right(20, 20), draws)
    mean = mean_retention([whole, half, undefined])
    assert mean is not None and half.estimate is not None
    assert mean.value == pytest.approx(0.75)
    assert mean.high - mean.low == pytest.approx((half.estimate.high - half.estimate.low) / 2)
    assert mean_retention([undefined]) is None and mean_retention([]) is None


def test_a_replicate_without_gain_is_left_out_of_the_mean() -> None:
    size = statistics.NUM_REPLICATES
    some_missing = np.where(np.arange(size) < 20, np.nan, 0.5)
    found = Retention(estimate(0.3, np.full(size, 0.3)), 0.5, some_missing)
    other = Retention(estimate(0.3, np.full(size, 0.3)), 1.0, np.full(size, 1.0))
    mean = mean_retention([found, other])
    assert mean is not None and (mean.value, mean.low, mean.high) == (0.75, 0.75, 0.75)


def test_a_mean_over_tasks_is_narrower_than_each_of_them() -> None:
    draws = [resample(1, key=key, over_seeds=False) for key in "abcd"]
    single = draws[0].estimate(right(20))
    mean = mean_estimate([0.5] * 4, [one.means(right(20)) for one in draws])
    assert mean is not None and mean.value == 0.5
    assert (mean.high - mean.low) / (single.high - single.low) == pytest.approx(0.5, abs=0.08)
    assert mean_estimate([], []) is None


def test_baselines() -> None:
    assert majority_share(["yes", "No", " no ", "no"]) == 0.75
    assert chance_share(["yes", "No", " no ", "maybe"]) == pytest.approx(1 / 3)


def test_ties_share_their_mean_rank() -> None:
    assert ranks([30, 10, 20, 20]).tolist() == [4, 1, 2.5, 2.5]


def test_spearman_of_known_series() -> None:
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert spearman([1, 2, 3], [1, 10, 100]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, -1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None and spearman([1, 2], [1, 2]) is None


def test_a_correlation_of_few_tasks_has_no_interval() -> None:
    """Its ends would be the correlations of single tasks, or of width zero: half of the draws take one task twice."""
    x, y, groups = [0, 0, 0, 1, 1, 1], [0, 1, 2, 10, 11, 12], ["a"] * 3 + ["b"] * 3
    found = rank_correlation(x, y, groups)
    assert found is not None and found.value == pytest.approx(spearman(x, y) or 0)
    assert found.interval is None and found.num_groups == 2
    assert rank_correlation([1] * 6, y, groups) is None


def test_the_interval_of_a_correlation_draws_whole_tasks() -> None:
    """Where three tasks contradict three others, twice as many points within each of them make nothing surer."""
    x, y = [0.0, 1, 2, 0.5, 1.5, 2.5] * 3, [0.0, 1, 2, 2.5, 1.5, 0.5] * 3
    tasks = [task for task in "abcdef" for _ in range(3)]
    found, twice = rank_correlation(x, y, tasks), rank_correlation(x * 2, y * 2, tasks * 2)
    assert found is not None and found.interval is not None and twice is not None and twice.interval is not None
    assert found.interval[0] < -0.5 and found.interval[1] > 0.5
    assert twice.interval == pytest.approx(found.interval, abs=0.15)


def best_alone(agreements: list[float], kept: list[bool]) -> Separation | None:
    return best_separation(agreements, kept, lambda threshold: [one >= threshold for one in agreements])


def test_groups_correlate_within_themselves_whatever_lies_between_them() -> None:
    x, y = [1.0, 2, 3, 11, 12, 13, 20], [13.0, 12, 11, 1, 2, 3, 9]
    assert within_groups(x, y, list("aaabbbc")) == pytest.approx((-1 + 1) / 2), "one point alone has none"
    assert (spearman(x, y) or 0) < -0.5
    assert within_groups(x[:2], y[:2], list("ab")) is None


def test_the_best_threshold_lies_between_kept_and_lost() -> None:
    agreements, kept = [0.2, 0.4, 0.6, 0.8], [False, False, True, True]
    best = best_alone(agreements, kept)
    assert best is not None and (best.threshold, best.balanced_accuracy) == (pytest.approx(0.5), 1.0)
    some = separation(0.5, [False, True, True, True], kept)
    assert some is not None and some.balanced_accuracy == 0.75, "both kept pass, one of two lost does not"
    assert separation(0.5, kept, kept) == Separation(0.5, 1) and separation(0, [True] * 4, kept) == Separation(0, 0.5)


def test_agreement_that_misleads_is_worth_no_threshold() -> None:
    best = best_alone([0.2, 0.4, 0.6, 0.8], [True, True, False, False])
    assert best is not None and (best.threshold, best.balanced_accuracy) == (0.0, 0.5)
    for alike in (True, False):
        assert best_alone([0.2, 0.8], [alike, alike]) is None
    assert best_alone([], []) is None
