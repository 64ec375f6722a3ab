"""The gate against real accuracy: whether what it measures without data tells how good a migrated adapter is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from translora.evaluate.cells import correlation, counted_noun, table
from translora.evaluate.statistics import (
    Correlation,
    Separation,
    balanced_accuracy,
    best_separation,
    rank_correlation,
)
from translora.run.state import GateResult

KEPT_SHARE = 0.9
"""An adapter kept its skill if it has this share of the source adapter's accuracy."""
ROUNDING = 1e-9
SIGNAL_WORDS = {
    "agreement": "agreement with the teacher",
    "informedness": "informedness, where answers are few",
    "likelihood": "log-likelihood of a token of the teacher's answers",
}


class Point(NamedTuple):
    """A migrated adapter: what the gate saw of it, and its accuracy."""

    gate: GateResult
    accuracy: float
    source_accuracy: float
    task: str


@dataclass(frozen=True)
class Signal:
    """Spearman correlations of something that the gate measures, over the adapters that have it."""

    num_points: int
    with_accuracy: Correlation | None
    """And the migrated adapter's accuracy."""
    with_difference: Correlation | None
    """And its accuracy minus the source adapter's."""


SIGNALS: dict[str, Callable[[GateResult], float | None]] = {
    "agreement": lambda gate: gate.agreement_student,
    "informedness": lambda gate: gate.informedness,
    "likelihood": lambda gate: gate.loglik_student,
}
"""What the gate measures of a student, without real data."""


@dataclass(frozen=True)
class Calibration:
    """The gate against real accuracy, over all migrated adapters of the tasks that count."""

    signals: dict[str, Signal]
    """By what the gate measures, see SIGNALS."""
    num_kept: int
    """Adapters with KEPT_SHARE of their source adapter's accuracy."""
    num_lost: int
    best: Separation | None
    """The threshold of agreement that best separates the two."""
    configured: float | None
    """Balanced accuracy of the gate's verdicts, by each arm's own thresholds."""


def calibrate(points: Sequence[Point]) -> Calibration:
    """Whether the gate tells how good a migrated adapter really is; the points are of the tasks that count."""
    kept = [point.accuracy >= KEPT_SHARE * point.source_accuracy - ROUNDING for point in points]
    agreements = [point.gate.agreement_student for point in points]
    return Calibration(
        signals={name: signal(points, measure) for name, measure in SIGNALS.items()},
        num_kept=sum(kept),
        num_lost=len(kept) - sum(kept),
        best=best_separation(agreements, kept),
        configured=balanced_accuracy([point.gate.passed for point in points], kept),
    )


def signal(points: Sequence[Point], measure: Callable[[GateResult], float | None]) -> Signal:
    """How one of the gate's measurements goes with real accuracy."""
    found = [(value, point) for point in points if (value := measure(point.gate)) is not None]
    values, tasks = [value for value, _ in found], [point.task for _, point in found]
    differences = [point.accuracy - point.source_accuracy for _, point in found]
    return Signal(
        num_points=len(found),
        with_accuracy=rank_correlation(values, [point.accuracy for _, point in found], tasks),
        with_difference=rank_correlation(values, differences, tasks),
    )


def calibration_page(found: Calibration, min_agreement: float, plot: str) -> list[str]:
    """Its part of an evaluation's page."""
    adapters = counted_noun(found.signals["agreement"].num_points, "migrated adapter")
    kept = f"{100 * KEPT_SHARE:.0f} %"
    lines = [
        f"![Agreement with the teacher against migrated − source accuracy, one point per adapter]({plot})",
        "",
        f"{adapters} of the tasks that count (tasks × seeds × arms), nothing withheld, one attempt each. Agreement is "
        "what the gate sees: the share of held-out synthetic prompts on which the student gives the teacher's answer. "
        "Intervals of the correlations draw whole tasks.",
        "",
        *table(
            ["Spearman correlation", "adapters", "with accuracy", "with accuracy, migrated − source adapter"],
            [
                [
                    SIGNAL_WORDS[name],
                    str(one.num_points),
                    correlation(one.with_accuracy),
                    correlation(one.with_difference),
                ]
                for name, one in found.signals.items()
            ],
        ),
        "",
    ]
    if found.best is None or found.configured is None:
        return [
            *lines,
            f"{found.num_kept} adapters kept at least {kept} of their source adapter's accuracy and {found.num_lost} "
            "did not: no threshold of agreement can be told from these.",
        ]
    return [
        *lines,
        f"{found.num_kept} adapters kept at least {kept} of their source adapter's accuracy, {found.num_lost} did not.",
        "",
        *table(
            ["the gate", "min_agreement", "balanced accuracy of its verdicts"],
            [
                ["as configured", f"{min_agreement:.2f}", f"{100 * found.configured:.0f} %"],
                [
                    "by agreement alone, best on these adapters, chosen after the fact",
                    f"{found.best.threshold:.2f}",
                    f"{100 * found.best.balanced_accuracy:.0f} %",
                ],
            ],
        ),
    ]
