"""The report's charts as plain numbers, which charts.html.j2 draws as inline SVG. Coordinates are in pixels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from translora.report.table import percent, status_text
from translora.run.state import AdapterState

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 150, 40, 6, 6, 20
_MOST_POINTS = 160
"""Points of a loss curve; longer ones are averaged in bins."""
_MOST_BINS = 24
_LABEL_WIDTH = 44
"""Labels below the axis that are nearer to each other would touch."""
_SIDE, _SCATTER_LEFT, _SCATTER_TOP, _SCATTER_RIGHT, _SCATTER_BOTTOM = 340, 56, 10, 16, 42


def loss_curve(losses: Sequence[float]) -> dict[str, Any] | None:
    """The loss over the steps; None with fewer than two finite values."""
    points = [(float(step), loss) for step, loss in enumerate(losses, 1) if math.isfinite(loss)]
    if len(points) < 2:
        return None
    size = math.ceil(len(points) / _MOST_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part)) for part in bins]
    if len(means) < 2:
        means = points
    tick = _round_up(max(loss for _, loss in means) / 3)
    first, last = means[0][0], means[-1][0]

    def x(step: float) -> float:
        return round(_LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT), 1)

    return {
        **_frame(),
        "points": " ".join(f"{x(step)},{_y(loss / (3 * tick))}" for step, loss in means),
        "levels": _levels(tick),
        "num_steps": len(losses),
        "first_loss": f"{points[0][1]:.3f}",
        "last_loss": f"{points[-1][1]:.3f}",
    }


def histogram(kept: Sequence[float | None], refused: Sequence[float | None]) -> dict[str, Any] | None:
    """How many samples have which screen score, refused ones stacked on kept ones; None without a score.

    Bins are multiples of their width and hold their upper end, so that none reaches over 0, above which a score speaks
    for a sample.
    """
    kept_scores, refused_scores = (
        [score for score in scores if score is not None and math.isfinite(score)] for scores in (kept, refused)
    )
    scores = [*kept_scores, *refused_scores]
    if not scores:
        return None
    width = _round_up((max(*scores, 0.0) - min(*scores, 0.0)) / _MOST_BINS)
    counts = [Counter(math.ceil(score / width) - 1 for score in part) for part in (kept_scores, refused_scores)]
    bins = [index for count in counts for index in count]
    first, last = min(*bins, 0), max(*bins, -1)
    pixels = (_WIDTH - _LEFT - _RIGHT) / (last - first + 1)
    tick = math.ceil(_round_up(max(counts[0][index] + counts[1][index] for index in bins) / 3))

    def x(index: int) -> float:
        return round(_LEFT + (index - first) * pixels, 1)

    bars = []
    for index in sorted(set(bins)):
        num_kept, num_refused = counts[0][index], counts[1][index]
        bottom, middle, top = (_y(count / (3 * tick)) for count in (0, num_kept, num_kept + num_refused))
        edges = f"{_number(index * width)} to {_number((index + 1) * width)}"
        bars.append(
            {
                "x": x(index),
                "width": round(max(pixels - 1, 1), 1),
                "kept": (middle, round(bottom - middle, 1)),
                "refused": (top, round(middle - top, 1)),
                "title": f"{edges}: {num_kept} kept, {num_refused} left out",
            }
        )
    ends = [(x(index), _number(index * width)) for index in (first, last + 1)]
    return {
        **_frame(),
        "bars": bars,
        "levels": _levels(tick),
        "zero": x(0),
        "ends": [(place, label) for place, label in ends if abs(place - x(0)) >= _LABEL_WIDTH],
        "num_kept": len(kept_scores),
        "num_refused": len(refused_scores),
    }


def scatter(states: Sequence[AdapterState]) -> dict[str, Any] | None:
    """Accuracy of the migrated over the source adapter, and of the bare target base; None where none was measured.

    Both axes show the same range, whole tenths that hold every value. `section` counts the states from one.
    """
    measured = [(number, state, state.accuracy) for number, state in enumerate(states, 1) if state.accuracy]
    if not measured:
        return None
    values = [value for _, _, found in measured for value in (found.source_adapter, found.migrated, found.target_base)]
    low = math.floor(10 * min(values) + 1e-9)
    high = min(10, max(math.ceil(10 * max(values) - 1e-9), low + 2))
    low = min(low, high - 2)

    def x(value: float) -> float:
        return round(_SCATTER_LEFT + (10 * value - low) / (high - low) * _SIDE, 1)

    def y(value: float) -> float:
        return round(_SCATTER_TOP + (high - 10 * value) / (high - low) * _SIDE, 1)

    points = [
        {
            "section": number,
            "status": state.status,
            "x": x(found.source_adapter),
            "y": y(found.migrated),
            "base": y(found.target_base),
            "title": f"{state.name} ({status_text(state)}): source adapter {percent(found.source_adapter)}, "
            f"migrated {percent(found.migrated)}, bare target base {percent(found.target_base)}",
        }
        for number, state, found in measured
    ]
    ticks = [tenth / 10 for tenth in range(high, low - 1, -1 if high - low <= 5 else -2)]
    source, migrated = (
        sum(getattr(found, field) for _, _, found in measured) / len(measured)
        for field in ("source_adapter", "migrated")
    )
    return {
        "width": _SCATTER_LEFT + _SIDE + _SCATTER_RIGHT,
        "height": _SCATTER_TOP + _SIDE + _SCATTER_BOTTOM,
        "left": _SCATTER_LEFT,
        "right": _SCATTER_LEFT + _SIDE,
        "top": _SCATTER_TOP,
        "bottom": _SCATTER_TOP + _SIDE,
        "ticks": [(x(tick), y(tick), percent(tick)) for tick in ticks],
        "points": points,
        "statuses": {state.status: status_text(state) for _, state, _ in measured},
        "num_level": sum(found.migrated >= found.source_adapter for _, _, found in measured),
        "mean": f"{percent(source)} → {percent(migrated)}",
    }


def _frame() -> dict[str, int]:
    return {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT}


def _y(share: float) -> float:
    """Height of a share of the vertical axis."""
    return round(_TOP + (1 - share) * (_HEIGHT - _BOTTOM - _TOP), 1)


def _levels(tick: float) -> list[tuple[float, str]]:
    """The four horizontal lines of a chart, zero included."""
    return [(_y(index / 3), f"{tick * index:.4g}") for index in range(4)]


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _round_up(value: float) -> float:
    """The next round number; 1 for zero."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * factor >= value)
