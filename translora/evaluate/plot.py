"""The gate's calibration as a plain SVG: readable on a light and on a dark page, and without colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from translora.evaluate.results import Results

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 420, 62, 16, 34, 46
_COLOURS = (("#2f6db5", "#6aa5e8"), ("#b8560f", "#f0964a"), ("#2b7d4f", "#5cc08a"), ("#8a4a9e", "#c690d8"))
"""Of the arms in turn, on a light and on a dark page."""
_SHAPES = ("circle", "square", "triangle", "diamond")
_SIZE = 5.0
_ROW = 20
"""Height of a row of the legend."""


class Mark(NamedTuple):
    """A migrated adapter in the plot."""

    arm: int
    """Its place among the plot's arms."""
    agreement: float
    difference: float
    """Migrated − source accuracy."""
    name: str
    is_apart: bool = False
    """Its task does not count."""


def draw_calibration(results: Results) -> str:
    """Agreement (x) against migrated − source accuracy (y); a point per adapter, hollow where its task is apart."""
    counted = {task.name for task in results.tasks if task.counted}
    arms = list(results.arms)
    marks = [
        Mark(
            arms.index(one.arm),
            one.gate.agreement_student,
            one.accuracy - one.source_accuracy,
            f"{one.task}, seed {one.seed}, {one.arm}",
            one.task not in counted,
        )
        for one in results.migrations
        if one.gate is not None and one.accuracy is not None
    ]
    thresholds = {"configured": float(results.setup.gate["min_agreement"])}
    if (best := results.calibration.best_alone) is not None:
        thresholds["best"] = best.threshold
    source, target = results.setup.source.name, results.setup.target.name
    return draw(f"Agreement with the teacher and accuracy kept, {source} to {target}", arms, marks, thresholds)


def draw(title: str, arms: Sequence[str], marks: Sequence[Mark], thresholds: Mapping[str, float]) -> str:
    """The plot of these adapters.

    Args:
        thresholds: of agreement, to be shown as lines: "configured", "best".
    """
    low = min([-0.1, *(math.floor(10 * mark.difference) / 10 for mark in marks)])
    high = max([0.1, *(math.ceil(10 * mark.difference) / 10 for mark in marks)])
    parts = [*_head(title, arms), *_axes(low, high)]
    for word, threshold in thresholds.items():
        parts.append(f'<path class="{word}" d="M{_x(threshold)} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
    for mark in marks:
        style = f"arm{mark.arm % len(_COLOURS)}" + (" apart" if mark.is_apart else "")
        tip = f"{mark.name}: agreement {mark.agreement:.2f}, accuracy {mark.difference:+.2f}"
        shape = _shape(mark.arm, _x(mark.agreement), _y(mark.difference, low, high))
        parts.append(f'<g class="{style}"><title>{escape(tip)}</title>{shape}</g>')
    parts += _lines_legend(list(thresholds), any(mark.is_apart for mark in marks))
    return "\n".join([*parts, *_arms_legend(arms), "</svg>"]) + "\n"


def _head(title: str, arms: Sequence[str]) -> list[str]:
    light = [f".arm{index}{{fill:{pair[0]};stroke:{pair[0]}}}" for index, pair in enumerate(_COLOURS)]
    dark = [f".arm{index}{{fill:{pair[1]};stroke:{pair[1]}}}" for index, pair in enumerate(_COLOURS)]
    style = (
        "text{font:12px system-ui,sans-serif;fill:#3c434a}.grid{stroke:#8a939c;stroke-opacity:.3;fill:none}"
        ".zero,.best,.configured{stroke:#3c434a;fill:none}.best{stroke-width:1.5}.configured{stroke-dasharray:5 4}"
        f"{''.join(light)}"
        "@media (prefers-color-scheme:dark){text{fill:#c9d0d6}.zero,.best,.configured{stroke:#c9d0d6}"
        f"{''.join(dark)}}}"
        "[class^=arm]{fill-opacity:.7}.apart{fill-opacity:0}"
    )
    height = _HEIGHT + _ROW * (_arms_places(arms)[-1][1] + 1) + 6
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style>",
    ]


def _axes(low: float, high: float) -> list[str]:
    """Grid, labels and the line at which nothing was lost."""
    parts = []
    for tick in range(0, 11, 2):
        x = _x(tick / 10)
        parts.append(f'<path class="grid" d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick * 10}</text>')
    step = 1 if high - low <= 0.8 else 2
    for tick in range(math.ceil(round(10 * low, 6)), math.floor(round(10 * high, 6)) + 1):
        if tick % step:
            continue
        y, kind = _y(tick / 10, low, high), "zero" if tick == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{10 * tick:+d}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    x_label, y_label = "agreement with the teacher, %", "accuracy, migrated − source adapter, points"
    return [
        *parts,
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{x_label}</text>',
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{y_label}</text>',
    ]


def _lines_legend(lines: list[str], any_apart: bool) -> list[str]:
    """Above the plot: what the lines and hollow points are."""
    parts, x = [], float(_LEFT)
    for kind in lines:
        word = f"min_agreement, {kind}"
        parts.append(f'<path class="{kind}" d="M{x} 16h22"/><text x="{x + 28}" y="20">{word}</text>')
        x += 28 + 6.6 * len(word) + 18
    if any_apart:
        parts.append(f'<text x="{x}" y="20">hollow: task listed apart</text>')
    return parts


def _arms_places(arms: Sequence[str]) -> list[tuple[float, int]]:
    """Where each arm of the legend stands: x, and its row."""
    places, x, row = [], float(_LEFT), 0
    for arm in arms:
        width = 17 + 7.5 * len(arm) + 18
        if x > _LEFT and x + width > _WIDTH - _RIGHT:
            x, row = float(_LEFT), row + 1
        places.append((x, row))
        x += width
    return places


def _arms_legend(arms: Sequence[str]) -> list[str]:
    """Below the plot: the arms, in as many rows as they take."""
    parts = []
    for index, (arm, (x, row)) in enumerate(zip(arms, _arms_places(arms), strict=True)):
        y = _HEIGHT + 14 + _ROW * row
        parts.append(f'<g class="arm{index % len(_COLOURS)}">{_shape(index, x + 6, y - 4)}</g>')
        parts.append(f'<text x="{x + 17}" y="{y}">{escape(arm)}</text>')
    return parts


def _shape(index: int, x: float, y: float) -> str:
    kind = _SHAPES[(index + index // len(_COLOURS)) % len(_SHAPES)]  # no two of sixteen arms look alike
    if kind == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{_SIZE}"/>'
    corners = {
        "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        "triangle": ((0.0, -1.15), (1.05, 0.8), (-1.05, 0.8)),
        "diamond": ((0.0, -1.25), (1.1, 0.0), (0.0, 1.25), (-1.1, 0.0)),
    }[kind]
    path = " ".join(f"{round(x + _SIZE * dx, 2)},{round(y + _SIZE * dy, 2)}" for dx, dy in corners)
    return f'<polygon points="{path}"/>'


def _x(agreement: float) -> float:
    return round(_LEFT + agreement * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(difference: float, low: float, high: float) -> float:
    return round(_TOP + (high - difference) / (high - low) * (_HEIGHT - _BOTTOM - _TOP), 1)
