"""The gate against real accuracy: whether what it measures without data tells how good a migrated adapter is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from translora.config import GateConfig
from translora.evaluate.cells import correlation, counted_noun, ratio_of, table
from translora.evaluate.statistics import (
    Correlation,
    Separation,
    best_separation,
    rank_correlation,
    separation,
    within_groups,
)
from translora.gate.verdict import judge
from translora.run.state import GateResult

KEPT_SHARE = 0.9
"""An adapter kept its skill if it has this share of the source adapter's accuracy."""
OPEN = 1e-9
"""The least agreement of a gate whose other limits hold."""
DIGITS = 9
"""Of accuracies and their differences: equal ones must be ties."""
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
    seed: int


@dataclass(frozen=True)
class Signal:
    """Spearman correlations of something that the gate measures, over the adapters that have it."""

    num_points: int
    with_accuracy: Correlation | None
    """And the migrated adapter's accuracy."""
    with_difference: Correlation | None
    """And its accuracy minus the source adapter's."""
    within_tasks: float | None
    """The same within each task, the mean over those that have one: tasks differ in how hard they are to agree on."""


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
    configured: Separation | None
    """The gate's verdicts, by each arm's own thresholds; None where all kept their accuracy, or all lost it."""
    alone: Separation | None
    """The configured min_agreement without the gate's other limits."""
    best: Separation | None
    """The min_agreement with which the whole gate best separates the two."""
    best_alone: Separation | None
    """The one that does so without the gate's other limits."""


def calibrate(points: Sequence[Point], config: GateConfig) -> Calibration:
    """Whether the gate tells how good a migrated adapter really is; the points are of the tasks that count."""
    kept = [round(point.accuracy - KEPT_SHARE * point.source_accuracy, DIGITS) >= 0 for point in points]
    gates = [point.gate for point in points]
    agreements = [gate.agreement_student for gate in gates]

    def passed(threshold: float) -> list[bool]:
        own = config.model_copy(update={"min_agreement": max(threshold, OPEN)})
        return [judge(gate, own).passed for gate in gates]

    def alone(threshold: float) -> list[bool]:
        return [agreement >= threshold for agreement in agreements]

    return Calibration(
        signals={name: signal(points, measure) for name, measure in SIGNALS.items()},
        num_kept=sum(kept),
        num_lost=len(kept) - sum(kept),
        configured=separation(config.min_agreement, [gate.passed for gate in gates], kept),
        alone=separation(config.min_agreement, alone(config.min_agreement), kept),
        best=best_separation(agreements, kept, passed),
        best_alone=best_separation(agreements, kept, alone),
    )


def signal(points: Sequence[Point], measure: Callable[[GateResult], float | None]) -> Signal:
    """How one of the gate's measurements goes with real accuracy."""
    found = [(value, point) for point in points if (value := measure(point.gate)) is not None]
    values, tasks = [value for value, _ in found], [point.task for _, point in found]
    accuracies = [round(point.accuracy, DIGITS) for _, point in found]
    differences = [round(point.accuracy - point.source_accuracy, DIGITS) for _, point in found]
    return Signal(
        num_points=len(found),
        with_accuracy=rank_correlation(values, accuracies, tasks),
        with_difference=rank_correlation(values, differences, tasks),
        within_tasks=within_groups(values, differences, tasks),
    )


def calibration_page(found: Calibration, config: GateConfig, plot: str) -> list[str]:
    """Its part of an evaluation's page."""
    adapters = counted_noun(found.signals["agreement"].num_points, "migrated adapter")
    kept = f"{100 * KEPT_SHARE:.0f} %"
    lines = [
        f"![Agreement with the teacher against migrated − source accuracy, one point per adapter]({plot})",
        "",
        f"{adapters} of the tasks that count (tasks × seeds × arms), nothing withheld, one attempt each. Agreement is "
        "what the gate sees: the share of held-out synthetic prompts on which the student gives the teacher's answer, "
        "or of long answers' tokens where it counts these. Intervals of the correlations draw whole tasks; within a "
        "task it is the mean of the tasks' own.",
        "",
        *table(
            [
                "Spearman correlation",
                "adapters",
                "with accuracy",
                "with accuracy, migrated − source adapter",
                "the same within a task",
            ],
            [
                [
                    SIGNAL_WORDS[name],
                    str(one.num_points),
                    correlation(one.with_accuracy),
                    correlation(one.with_difference),
                    ratio_of(one.within_tasks),
                ]
                for name, one in found.signals.items()
            ],
        ),
        "",
    ]
    if found.configured is None:
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
                [word, f"{one.threshold:.2f}", f"{100 * one.balanced_accuracy:.0f} %"]
                for word, one in (
                    ("whole, as configured", found.configured),
                    ("min_agreement alone, as configured", found.alone),
                    ("whole, the best on these adapters, chosen after the fact", found.best),
                    ("min_agreement alone, the best on these adapters, chosen after the fact", found.best_alone),
                )
                if one is not None
            ],
        ),
        "",
        f"The whole gate also asks that the answers follow the prompts (p ≤ {config.max_p_value:g}), and where they "
        f"are few for informedness of at least {config.min_informedness:g}.",
    ]
