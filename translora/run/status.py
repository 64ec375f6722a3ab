"""What `translora status RUN` shows, also while the run goes on; loads neither torch nor ray."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from translora.report.table import MISSING, STATUS_WORDS, agreement_text, note, notes, percent, summary
from translora.run.files import read_object
from translora.run.lease import describe
from translora.run.progress import PROGRESS
from translora.run.rundir import LOCK
from translora.run.state import PHASES, AdapterState, load_states

_TAIL_BYTES = 4096
_MAX_CELL = 40
_NUMBERS = ("attempt", "accepted/needed", "acceptance", "step", "last loss", "left")
_HEADERS = ("adapter", "status", "phase", *_NUMBERS, "gate: base → student")


def progress_of(run_dir: Path, state: AdapterState) -> dict[str, Any]:
    """One adapter's progress as plain values: what `--json` prints."""
    step, num_steps, left = state.step, state.num_steps, None
    last_loss = state.losses[-1] if state.losses else None
    if state.phase == "distill" and state.status == "pending":
        rows = _last_rows(run_dir / "adapters" / state.name / "train/student/train.jsonl")
        if rows:
            step, num_steps = int(rows[-1].get("step", step)), int(rows[-1].get("num_steps", num_steps))
            last_loss = rows[-1].get("loss", last_loss)
            left = _time_left(rows)
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
        "time_left_seconds": left,
        "gate": None if state.gate is None else state.gate.model_dump(),
        "note": note(state),
    }


def render_status(run_dir: Path, as_json: bool = False, max_rows: int | None = None) -> str:
    """The state of a run as a text table, or as JSON with `adapters`, counts, the driver and what it is doing.

    Args:
        max_rows: of the table, those that are worked on first; all when unset.

    Raises:
        InputError: `run_dir` is not a run directory.
    """
    run_dir = Path(run_dir)
    states = load_states(run_dir)
    driver, doing = describe(run_dir / LOCK), read_object(run_dir / PROGRESS)
    if as_json:
        phases: Counter[str] = Counter(state.phase for state in states)
        value = {
            "run_dir": str(run_dir),
            "driver": driver,
            "progress": doing or None,
            "statuses": dict(Counter(state.status for state in states)),
            "phases": {phase: phases[phase] for phase in PHASES if phases[phase]},
            "adapters": [progress_of(run_dir, state) for state in states],
        }
        return json.dumps(value, indent=2, ensure_ascii=False)
    activity = activity_text(driver, doing)
    if not states:
        return f"{run_dir}: no adapter has been started yet; {activity}"
    shown = states
    if max_rows is not None and len(states) > max_rows:
        shown = sorted(states, key=lambda state: (state.status != "pending", state.name))[:max_rows]
    lines = _table(run_dir, shown)
    if len(shown) < len(states):
        lines.append(f"and {len(states) - len(shown)} more")
    remarks = notes(shown)
    head = [f"{run_dir}: {summary(states)}", activity, ""]
    return "\n".join([*head, *lines, *([""] if remarks else []), *remarks])


def activity_text(driver: dict[str, Any] | None, doing: dict[str, Any]) -> str:
    """Whether a driver works on the run, and on what."""
    if driver is None:
        return "no driver works on it"
    who = f"driver: pid {driver['pid']} on {driver['host']}"
    if not driver["alive"]:
        return f"{who} is dead; the same command continues"
    if not doing:
        return who
    left = doing.get("left_seconds")
    return f"{who}; {doing['label']} {doing['done']}/{doing['total']}" + (
        f", {duration_text(left)} left" if left is not None else ""
    )


def duration_text(seconds: float | None) -> str:
    """Seconds as 42 s, 7 min or 3 h 05 min."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _table(run_dir: Path, states: list[AdapterState]) -> list[str]:
    """The table as lines of text, aligned here: rich takes longer for a thousand rows than all the rest."""
    rows = [list(_HEADERS), *(_cells(state, progress_of(run_dir, state)) for state in states)]
    rows = [[cell if len(cell) <= _MAX_CELL else f"{cell[: _MAX_CELL - 1]}…" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "   ".join(
            cell.rjust(width) if header in _NUMBERS else cell.ljust(width)
            for header, cell, width in zip(_HEADERS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [aligned[0], "─" * (sum(widths) + 3 * (len(widths) - 1)), *aligned[1:]]


def _cells(state: AdapterState, row: dict[str, Any]) -> list[str]:
    """One adapter's cells."""
    loss = row["last_loss"]
    return [
        state.name,
        STATUS_WORDS[state.status],
        state.phase,
        str(state.attempt),
        f"{row['accepted']}/{row['needed']}" if row["needed"] else MISSING,
        percent(state.synthesis.acceptance) if row["generated"] else MISSING,
        f"{row['step']}/{row['num_steps']}" if row["num_steps"] else MISSING,
        f"{loss:.3f}" if isinstance(loss, float | int) else MISSING,
        duration_text(row["time_left_seconds"]),
        agreement_text(state),
    ]


def _time_left(rows: list[dict[str, Any]]) -> float | None:
    """Seconds to the last step, at the pace of the last steps that one worker took without a restart."""
    try:
        last = rows[-1]
        since = next(
            index
            for index in range(len(rows) - 1, -1, -1)
            if index == 0 or rows[index - 1]["seconds"] > rows[index]["seconds"]
        )
        steps = last["step"] - rows[since]["step"]
        if steps <= 0:
            return None
        pace = (last["seconds"] - rows[since]["seconds"]) / steps
        return round(float(pace * (last["num_steps"] - last["step"])), 1)
    except (KeyError, TypeError):
        return None


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a JSONL file that another process is writing."""
    try:
        with open(path, "rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - _TAIL_BYTES))
            lines = handle.read().split(b"\n")[:-1]
    except OSError:
        return []
    if size > _TAIL_BYTES:
        lines = lines[1:]
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
