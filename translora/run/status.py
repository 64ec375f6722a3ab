"""What `translora status RUN` shows, also while the run goes on; loads neither torch nor ray."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from translora.report.table import MISSING, STATUS_WORDS, agreement_text, note, notes, percent, summary
from translora.run.state import AdapterState, load_states

PHASES = ("verify", "synthesis", "distill", "gate", "done")
_TAIL_BYTES = 4096
_WIDTH = 140


def progress_of(run_dir: Path, state: AdapterState) -> dict[str, Any]:
    """One adapter's progress as plain values: what `--json` prints."""
    step, num_steps = state.step, state.num_steps
    last_loss = state.losses[-1] if state.losses else None
    if state.phase == "distill" and (row := _last_row(run_dir / "adapters" / state.name / "train/student/train.jsonl")):
        step, num_steps = int(row.get("step", step)), int(row.get("num_steps", num_steps))
        last_loss = row.get("loss", last_loss)
    return {
        "name": state.name,
        "status": state.status,
        "phase": state.phase,
        "attempt": state.attempt,
        "accepted": state.synthesis.accepted,
        "needed": state.synthesis.needed,
        "generated": state.synthesis.generated,
        "rounds": state.synthesis.rounds,
        "step": step,
        "num_steps": num_steps,
        "last_loss": last_loss,
        "gate": None if state.gate is None else state.gate.model_dump(),
        "note": note(state),
    }


def render_status(run_dir: Path, as_json: bool = False) -> str:
    """The state of a run as a text table, or as JSON with `adapters` and counts.

    Raises:
        ValueError: `run_dir` is not a run directory.
    """
    run_dir = Path(run_dir)
    states = load_states(run_dir)
    rows = [progress_of(run_dir, state) for state in states]
    if as_json:
        phases: Counter[str] = Counter(state.phase for state in states)
        value = {
            "run_dir": str(run_dir),
            "statuses": dict(Counter(state.status for state in states)),
            "phases": {phase: phases[phase] for phase in PHASES if phases[phase]},
            "adapters": rows,
        }
        return json.dumps(value, indent=2, ensure_ascii=False)
    if not states:
        return f"{run_dir}: no adapter has been started yet"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("adapter", "status", "phase"):
        table.add_column(header, no_wrap=True, overflow="ellipsis")
    for header in ("accepted/needed", "acceptance", "step", "last loss"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("gate: base → student", no_wrap=True)
    for state, row in zip(states, rows, strict=True):
        table.add_row(*map(Text, _cells(state, row)))
    # A console on a buffer, so that the text is the same on a terminal and in a pipe.
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    lines = [line for line in lines if line]
    remarks = notes(states)
    return "\n".join([f"{run_dir}: {summary(states)}", "", *lines, *([""] if remarks else []), *remarks])


def _cells(state: AdapterState, row: dict[str, Any]) -> list[str]:
    """One adapter's cells."""
    loss = row["last_loss"]
    return [
        state.name,
        STATUS_WORDS[state.status],
        state.phase,
        f"{row['accepted']}/{row['needed']}" if row["needed"] else MISSING,
        percent(state.synthesis.acceptance) if row["generated"] else MISSING,
        f"{row['step']}/{row['num_steps']}" if row["num_steps"] else MISSING,
        f"{loss:.3f}" if isinstance(loss, float | int) else MISSING,
        agreement_text(state),
    ]


def _last_row(path: Path) -> dict[str, Any] | None:
    """The last whole line of a JSONL file that another process is writing."""
    try:
        with open(path, "rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - _TAIL_BYTES))
            lines = handle.read().split(b"\n")[:-1]
        row = json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) else None
