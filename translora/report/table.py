"""The fleet's result table for a terminal, and the words that tables, cards and the page share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

from rich import box
from rich.table import Table
from rich.text import Text

from translora.run.state import AdapterState, GateResult

STATUS_WORDS = {
    "migrated": "migrated",
    "merged": "merged",
    "failed_gate": "failed gate",
    "quarantined": "quarantined",
    "pending": "pending",
}
STATUS_STYLES = {
    "migrated": "green",
    "merged": "green",
    "failed_gate": "red",
    "quarantined": "yellow",
    "pending": "dim",
}
MISSING = "–"
AGREEMENT_FIELDS = ("agreement_base", "agreement_student")
ACCURACY_FIELDS = ("source_base", "source_adapter", "target_base", "migrated")


def percent(share: float | None) -> str:
    """0.876 as 88%; never 100% for less than all, nor 0% for more than none."""
    return MISSING if share is None else f"{_points(share)}%"


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` (Wilson's, which is none of width zero where all or nothing is right)."""
    z = NormalDist().inv_cdf(0.975)
    centre = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = ((centre + sign * spread) / (1 + z**2 / count) for sign in (-1, 1))
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)  # which they are but for rounding


def interval(share: float, count: int) -> str:
    """A share's 95 % interval in percent: 69–96."""
    low, high = wilson(share, count)
    return f"{_points(low)}–{_points(high)}"


def agreement_interval(gate: GateResult) -> str:
    """The 95 % interval of the student's agreement; empty for tokens of an older version, which kept none.

    A share of prompts has Wilson's. By tokens it is a mean of the prompts' shares, which is known far better.
    """
    if gate.unit == "answers":
        return interval(gate.agreement_student, gate.num_heldout)
    return "–".join(str(_points(end)) for end in gate.agreement_interval or ())


def _points(share: float) -> int:
    rounded = round(100 * share)
    if rounded == 100 and share < 1:
        return 99
    return 1 if rounded == 0 and share > 0 else rounded


def accepted_text(state: AdapterState) -> str:
    """Accepted of generated inputs, with the acceptance."""
    stats = state.synthesis
    return f"{stats.accepted}/{stats.generated} ({percent(stats.acceptance)})" if stats.generated else MISSING


def agreement_text(state: AdapterState) -> str:
    """Agreement of the bare target base → of the migrated student, with its 95 % interval."""
    if (gate := state.gate) is None:
        return MISSING
    before, after = gate.agreement_base, gate.agreement_student
    of_what = " of tokens" if gate.unit == "tokens" else ""
    ends = f" ({own})" if (own := agreement_interval(gate)) else ""
    return f"{percent(before)} → {percent(after)}{ends}{of_what}"


def status_text(state: AdapterState) -> str:
    """What became of the adapter, or the phase that it is in."""
    return f"in {state.phase}" if state.status == "pending" else STATUS_WORDS[state.status]


def note(state: AdapterState) -> str:
    """Why an adapter did not migrate, or what is remarkable about one that did."""
    return state.reason or "; ".join(remarks(state))


def remarks(state: AdapterState) -> list[str]:
    """What a person should know of how an adapter was made, whatever became of it."""
    again = f"attempt {state.attempt}: the gate sent it back for more samples" if state.attempt > 1 else ""
    found, seen = state.accuracy, ""
    if found is not None and found.num_seen:
        seen = f"{found.num_seen} of its {found.num_items} real items were invented word for word, and trained on"
    stats, too_long = state.synthesis, ""
    if stats.num_too_long:
        too_long = (
            f"{stats.num_too_long} of {stats.num_train} samples are longer than distill.max_length, and were not "
            "trained on; raise it"
        )
    found_out = (again, stats.shortfall, too_long, stats.warning, *state.training_warnings, seen)
    return [text for text in found_out if text]


def chance_text(gate: GateResult) -> str:
    """What of the agreement chance would do; empty if not measured."""
    if gate.p_value is None:
        return ""
    p = f"p = {gate.p_value:.2g}"
    if gate.unit == "tokens":
        return f"Chance alone would set it as far above the bare base, or above itself behind other inputs, with {p}."
    one = f"One answer to every input would have {percent(gate.commonest)}; " if gate.commonest is not None else ""
    how = "agree as often" if gate.chance == "agreement" else "are as likely to it"
    text = f"{one}the teacher's answers, dealt out by chance, {how} with {p}."
    return text[0].upper() + text[1:]


def informedness_text(gate: GateResult) -> str:
    """How far the answers follow the teacher's, where these are few; empty if not measured."""
    if gate.informedness is None:
        return ""
    asked = "" if gate.min_informedness is None else f", of at least {gate.min_informedness:.2f} that is asked for"
    return f"Informedness {gate.informedness:.2f}{asked}: 0 is one answer to every prompt, 1 the teacher's every time."


def loglik_text(gate: GateResult) -> str:
    """Mean log-likelihood of a token of the teacher's answers, bare target base → migrated; empty if not measured."""
    values = (gate.loglik_base, gate.loglik_student)
    if all(value is None for value in values):
        return ""
    return " → ".join(MISSING if value is None else f"{value:.2f}".replace("-", "−") for value in values)


def summary(states: Sequence[AdapterState]) -> str:
    """One sentence over the fleet: how many adapters migrated, and what became of the others."""
    counts: Counter[str] = Counter(state.status for state in states)
    others = [f"{counts[status]} {STATUS_WORDS[status]}" for status in STATUS_WORDS if status != "migrated"]
    shown = [text for text in others if not text.startswith("0 ")]
    num_adapters = sum(not (state.is_merge or state.status == "merged") for state in states)
    return ", ".join([f"{counts['migrated']} of {num_adapters} migrated", *shown])


def render_table(states: Sequence[AdapterState]) -> Table:
    """The result table for a terminal, one line an adapter; `notes` has the reasons, which are too long for a cell.

    Accuracy columns appear only where some adapter has real held-out data.
    """
    with_accuracy = any(state.accuracy for state in states)
    table = Table(caption=summary(states), caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("\nadapter", no_wrap=True, overflow="ellipsis", max_width=40)
    table.add_column("\nstatus", no_wrap=True)
    table.add_column("\n|D_syn|", justify="right", no_wrap=True)
    table.add_column("\naccepted", justify="right", no_wrap=True)
    table.add_column("teacher agreement:\nbase → migrated", no_wrap=True)
    if with_accuracy:
        table.add_column("accuracy, source:\nbase → adapter", no_wrap=True)
        table.add_column("accuracy, target:\nbase → migrated", no_wrap=True)
    for state in states:
        status = Text(status_text(state), STATUS_STYLES[state.status])
        cells = [str(state.set_size or MISSING), accepted_text(state), agreement_text(state)]
        if with_accuracy:
            cells += accuracy_texts(state)
        table.add_row(Text(state.name), status, *map(Text, cells))
    return table


def notes(states: Sequence[AdapterState]) -> list[str]:
    """One line for each adapter that has a reason, a shortfall or a warning."""
    return [f"{state.name}: {status_text(state)}: {note(state)}" for state in states if note(state)]


def accuracy_texts(state: AdapterState) -> list[str]:
    """Accuracy on real held-out data: of the source base → its adapter, and of the target base → the migrated one.

    The adapters' have their 95 % intervals.
    """
    if (accuracy := state.accuracy) is None:
        return [MISSING, MISSING]
    pairs = ((accuracy.source_base, accuracy.source_adapter), (accuracy.target_base, accuracy.migrated))
    return [f"{percent(base)} → {percent(own)} ({interval(own, accuracy.num_items)})" for base, own in pairs]
