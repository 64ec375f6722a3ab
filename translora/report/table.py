"""The fleet's result table: for a terminal (rich), and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from translora.run.state import AdapterState

STATUS_WORDS = {
    "migrated": "migrated",
    "failed_gate": "failed gate",
    "quarantined": "quarantined",
    "pending": "pending",
}
STATUS_STYLES = {"migrated": "green", "failed_gate": "red", "quarantined": "yellow", "pending": "dim"}
MISSING = "–"
ACCURACY_FIELDS = ("source_base", "source_adapter", "target_base", "migrated")
HEADERS = (
    "adapter",
    "status",
    "|D_syn|",
    "accepted",
    "agreement with teacher",
    "source base",
    "source adapter",
    "target base",
    "migrated",
)
_NUMERIC = {"|D_syn|", "accepted", "source base", "source adapter", "target base", "migrated"}
_NUM_PLAIN = 5
"""The first columns; the rest are accuracies."""


def percent(share: float | None) -> str:
    """0.876 as 88%; never 100% for less than all, nor 0% for more than none."""
    if share is None:
        return MISSING
    rounded = round(100 * share)
    if rounded == 100 and share < 1:
        return "99%"
    return "1%" if rounded == 0 and share > 0 else f"{rounded}%"


def gain(before: float, after: float) -> str:
    """A difference of two shares in percentage points, signed."""
    return f"{round(100 * after) - round(100 * before):+d}"


def accepted_text(state: AdapterState) -> str:
    """Accepted of generated inputs, with the acceptance."""
    stats = state.synthesis
    return f"{stats.accepted}/{stats.generated} ({percent(stats.acceptance)})" if stats.generated else MISSING


def agreement_text(state: AdapterState) -> str:
    """Agreement of the bare target base → of the migrated student, with the gain in points."""
    if (gate := state.gate) is None:
        return MISSING
    before, after = gate.agreement_base, gate.agreement_student
    return f"{percent(before)} → {percent(after)} ({gain(before, after)})"


def note(state: AdapterState) -> str:
    """Why an adapter did not migrate, or what is remarkable about one that did."""
    if state.reason:
        return state.reason
    if state.status == "pending" and state.phase != "done":
        return f"in {state.phase}"
    return state.synthesis.shortfall


def summary(states: Sequence[AdapterState]) -> str:
    """One sentence over the fleet: how many adapters migrated, and what became of the others."""
    counts = Counter(state.status for state in states)
    others = [f"{counts[status]} {word}" for status, word in STATUS_WORDS.items() if status != "migrated" and counts[status]]
    return ", ".join([f"{counts['migrated']} of {len(states)} migrated", *others])


def _cells(state: AdapterState) -> list[str]:
    accuracy = state.accuracy
    return [
        state.name,
        STATUS_WORDS[state.status],
        str(state.num_samples or MISSING),
        accepted_text(state),
        agreement_text(state),
        *(percent(getattr(accuracy, field) if accuracy else None) for field in ACCURACY_FIELDS),
    ]


def render_table(states: Sequence[AdapterState]) -> Table:
    """The result table for a terminal; accuracy and note columns appear only where there is something to say."""
    with_accuracy = any(state.accuracy for state in states)
    notes = [note(state) for state in states]
    headers = HEADERS if with_accuracy else HEADERS[:_NUM_PLAIN]
    caption = summary(states) + (". Right: accuracy on real held-out data" if with_accuracy else "")
    table = Table(caption=caption, caption_justify="left", header_style="bold", pad_edge=False)
    for header in headers:
        name = header in ("adapter", "agreement with teacher")
        table.add_column(
            header.replace("agreement with teacher", "agreement with teacher:\ntarget base → migrated"),
            justify="right" if header in _NUMERIC else "left",
            no_wrap=name,
            overflow="ellipsis" if header == "adapter" else "fold",
            max_width=9 if header in ("source base", "source adapter", "target base") else None,
        )
    if any(notes):
        table.add_column("note", overflow="fold", min_width=16)
    for state, remark in zip(states, notes, strict=True):
        cells = [Text(cell) for cell in _cells(state)[: len(headers)]]
        cells[1].stylize(STATUS_STYLES[state.status])
        table.add_row(*cells, *([Text(remark)] if any(notes) else []))
    return table


def to_markdown(states: Sequence[AdapterState]) -> str:
    """The same table as GitHub Markdown, with the summary below it."""
    with_accuracy = any(state.accuracy for state in states)
    notes = [note(state) for state in states]
    headers = list(HEADERS if with_accuracy else HEADERS[:_NUM_PLAIN])
    headers[4] = "agreement with teacher: target base → migrated"
    headers[_NUM_PLAIN:] = [f"accuracy: {header}" for header in headers[_NUM_PLAIN:]]
    rows = [_cells(state)[: len(headers)] for state in states]
    if any(notes):
        headers.append("note")
        rows = [[*row, remark] for row, remark in zip(rows, notes, strict=True)]
    rule = ["---:" if header.removeprefix("accuracy: ") in _NUMERIC else "---" for header in headers]
    lines = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in [headers, rule, *rows]]
    return "\n".join([*lines, "", summary(states) + "."])


def _escape(cell: str) -> str:
    return " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|")
