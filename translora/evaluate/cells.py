"""Numbers and tables as the pages of an evaluation write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from translora.evaluate.statistics import Correlation, Estimate
from translora.report.markdown import one_line

MISSING = "–"
_PIPE = re.compile(r"(?<!\\)\|")
"""One that is not escaped yet."""


def counted_noun(number: int, word: str) -> str:
    """A number with its noun: 1 task, 2 tasks."""
    return f"{number} {word}" + ("" if number == 1 else "s")


def points(found: Estimate | None, signed: bool = False) -> str:
    """A share in percent with its interval."""
    return _interval(found, 100.0, 1, "+" if signed else "")


def ratio(found: Estimate | None, undefined: str = MISSING) -> str:
    """A ratio or a correlation with its interval."""
    return _interval(found, 1.0, 2, "") if found is not None else undefined


def ratio_of(value: float | None) -> str:
    """A bare ratio."""
    return MISSING if value is None else f"{value:.2f}"


def correlation(found: Correlation | None) -> str:
    """A rank correlation with its interval, or why it has none."""
    if found is None:
        return "undefined"
    if found.interval is None:
        return f"{found.value:.2f}; {counted_noun(found.num_groups, 'task')}, too few for an interval"
    return ratio(Estimate(found.value, *found.interval))


def _interval(found: Estimate | None, scale: float, digits: int, sign: str) -> str:
    if found is None:
        return MISSING
    value, low, high = (round(scale * part, digits) + 0.0 for part in (found.value, found.low, found.high))
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1) -> list[str]:
    """A Markdown table; the first columns are text, the others are set to the right."""
    rule = ["---" if column < num_text else "---:" for column in range(len(headers))]
    cells = [[_PIPE.sub(r"\|", one_line(cell)) for cell in row] for row in (headers, *rows)]
    return ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]
