"""What the gate tells, over all evaluations: `python -m benchmarks.gate docs/results*.json --out docs/gate.md`.

Every adapter of a task that counts is judged by the present gate, whatever rules its own page was made by, and set
against what it really kept of its source adapter's accuracy. The pages withheld nothing: good and bad ones are there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from translora.config import GateConfig
from translora.errors import InputError
from translora.evaluate.calibration import DIGITS, SIGNAL_WORDS, SIGNALS, Point, signal
from translora.evaluate.cells import MISSING, correlation, counted_noun, ratio_of, table
from translora.evaluate.plot import Mark, draw
from translora.evaluate.render import read_results
from translora.evaluate.statistics import separation
from translora.gate.verdict import judge
from translora.run.files import write_bytes

BINS = (0.5, 0.7, 0.8, 0.9)
"""Shares of the source adapter's accuracy, between which adapters are counted."""
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def read_points(pages: Sequence[Path]) -> list[tuple[str, Point]]:
    """The adapters of the tasks that count, by page; a point's task is a task of a seed, on whichever pages.

    Left out are those whose source adapter has nothing right in that seed, as there is nothing to keep, and those that
    an earlier page has: arms of two pages may be one migration.
    """
    found: dict[tuple[object, ...], tuple[str, Point]] = {}
    for page in pages:
        for point in read_results(page).points:
            gate = point.gate
            own = (point.task, point.seed, point.source_accuracy, point.accuracy, gate.agreement_student)
            if point.source_accuracy > 0:
                task = f"{point.task}, seed {point.seed}"
                found.setdefault((*own, gate.loglik_student, gate.loglik_base), (page.stem, point._replace(task=task)))
    return list(found.values())


def kept(point: Point) -> float:
    """Share of the source adapter's accuracy."""
    return round(point.accuracy / point.source_accuracy, DIGITS)


def passes(point: Point, threshold: float) -> bool:
    """Whether the present gate lets the adapter pass with this min_agreement."""
    return judge(point.gate, GateConfig(min_agreement=threshold)).passed


def bins_table(points: Sequence[Point]) -> list[str]:
    """Of adapters that kept so much, how many pass."""
    rows = []
    for low, high in zip((float("-inf"), *BINS), (*BINS, float("inf")), strict=True):
        own = [point for point in points if low <= kept(point) < high]
        if not own:
            continue
        ends = [f"{100 * end:.0f} %" for end in (low, high) if 0 < end < 2]
        name = " to ".join(ends) if len(ends) == 2 else f"{'under' if low < 0 else 'at least'} {ends[0]}"
        agreement = statistics.median(point.gate.agreement_student for point in own)
        passed = [sum(passes(point, threshold) for point in own) for threshold in THRESHOLDS]
        rows.append([name, str(len(own)), f"{100 * agreement:.0f} %", *map(str, passed)])
    headers = ["kept of the source adapter's accuracy", "adapters", "median agreement"]
    return table([*headers, *_threshold_words("pass with min_agreement")], rows)


def pages_table(found: Sequence[tuple[str, Point]]) -> list[str]:
    """Where the good and the bad ones come from: of each page's adapters that kept so much, how many pass."""
    ends, rows = (float("-inf"), 0.8, 0.9, float("inf")), []
    for page in dict.fromkeys(page for page, _ in found):
        cells = []
        for low, high in itertools.pairwise(ends):
            own = [point for name, point in found if name == page and low <= kept(point) < high]
            passed = sum(passes(point, GateConfig().min_agreement) for point in own)
            cells.append(f"{passed} of {len(own)}" if own else MISSING)
        rows.append([f"[{page}]({page}.md)", *cells])
    return table(["adapters that pass, of those that kept", "under 80 %", "80 % to 90 %", "at least 90 %"], rows)


def thresholds_table(points: Sequence[Point]) -> list[str]:
    """How well each min_agreement separates, for each reading of what a good adapter is, and on average."""
    rows, found = [], []
    for share in BINS:
        good = [kept(point) >= share for point in points]
        rated = [
            separation(threshold, [passes(point, threshold) for point in points], good) for threshold in THRESHOLDS
        ]
        balanced = [one.balanced_accuracy for one in rated if one is not None]
        if balanced:
            found.append(balanced)
            rows.append([f"{100 * share:.0f} %", f"{sum(good)} of {len(good)}", *map(_percent, balanced)])
    means = [statistics.mean(own) for own in zip(*found, strict=True)]
    headers = ["good: keeps at least", "adapters that do", *_threshold_words("balanced accuracy at")]
    return table(headers, [*rows, ["mean", "", *map(_percent, means)]])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _threshold_words(first: str) -> list[str]:
    """Headers of the columns of thresholds."""
    default = GateConfig().min_agreement
    words = [f"{threshold:g}" + (", the default" if threshold == default else "") for threshold in THRESHOLDS]
    return [f"{first} {words[0]}", *words[1:]]


def to_markdown(found: Sequence[tuple[str, Point]], plot: str) -> str:
    """The page."""
    points = [point for _, point in found]
    pages = list(dict.fromkeys(page for page, _ in found))
    old = [point.gate for point in points if "chance" not in point.gate.model_fields_set]
    signals = {name: signal(points, measure) for name, measure in SIGNALS.items()}
    least = GateConfig().min_informedness
    lines = [
        "# What the gate tells",
        "",
        f"{counted_noun(len(points), 'migrated adapter')} of {counted_noun(len(pages), 'evaluation')} "
        f"({', '.join(f'[{page}]({page}.md)' for page in pages)}), one attempt each, nothing withheld. Each was judged "
        "anew by the present gate's thresholds but for `min_agreement`, from what its evaluation measured: of "
        f"{len(old)} adapters that was done by an older version, whose p-value is of agreement also where the answers "
        f"are few, or missing ({sum(gate.p_value is None for gate in old)} adapters). "
        "Written by `python -m benchmarks.gate docs/results*.json --out "
        "docs/gate.md`.",
        "",
        f"![Agreement with the teacher against migrated − source accuracy, one point per adapter]({plot})",
        "",
        *bins_table(points),
        "",
        "The same by page, with the default:",
        "",
        *pages_table(found),
        "",
        "Balanced accuracy is the mean of the share of good adapters that pass and of others that do not. The "
        f"defaults, {least:g} for `min_informedness` among them, were chosen on these adapters and earlier ones: how "
        "well they do on others is not measured.",
        "",
        *thresholds_table(points),
        "",
        "How what the gate measures goes with what was lost. A task is one of a seed, whose adapters on all pages are "
        "made from the same rows and seed examples: intervals draw whole ones, where there are five, and within a task "
        "it is the mean of the tasks' own.",
        "",
        *table(
            ["Spearman correlation", "adapters", "with accuracy, migrated − source adapter", "the same within a task"],
            [
                [SIGNAL_WORDS[name], str(one.num_points), correlation(one.with_difference), ratio_of(one.within_tasks)]
                for name, one in signals.items()
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def to_svg(found: Sequence[tuple[str, Point]]) -> str:
    """The plot, a shape for each page."""
    pages = list(dict.fromkeys(page for page, _ in found))
    marks = [
        Mark(pages.index(page), point.gate.agreement_student, point.accuracy - point.source_accuracy, point.task)
        for page, point in found
    ]
    title = "Agreement with the teacher and accuracy kept, all evaluations"
    return draw(title, pages, marks, {"configured": GateConfig().min_agreement})


def main() -> None:
    """Write the page and its plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path, help="results*.json of `translora evaluate`")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".md":
        parser.error(f"--out {arguments.out} does not end in .md")
    try:
        found = read_points(arguments.pages)
    except InputError as error:
        parser.error(str(error))
    if not found:
        parser.error("no adapter of these pages was judged by a gate on a task that counts")
    plot = arguments.out.with_suffix(".svg")
    write_bytes(arguments.out, to_markdown(found, plot.name).encode())
    write_bytes(plot, to_svg(found).encode())


if __name__ == "__main__":
    main()
