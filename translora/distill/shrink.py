"""Training that ran out of memory goes on with smaller passes, and at the smallest gives up the adapter that was in it.

A rank cannot step back inside a pass: the others wait in the same collective. So it notes what the pass held, beside
the gang's checkpoints, and fails; the worker group starts again from the checkpoints and reads the notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from translora.run.files import read_object, write_json
from translora.run.redact import first_line


def note_out_of_memory(
    directory: Path, rank: int, *, gang_size: int, micro_batch_size: int, jobs: Sequence[str], error: BaseException
) -> None:
    """Leave a note of a pass that was too much; `jobs` were in it."""
    number = len(list(directory.glob("memory-*.json")))
    reason = first_line(error, 300)
    value = {"gang_size": gang_size, "micro_batch_size": micro_batch_size, "jobs": list(jobs), "reason": reason}
    write_json(directory / f"memory-{number:03d}-{rank}.json", value)


def read_notes(directory: Path) -> list[dict[str, Any]]:
    """The notes of earlier starts."""
    return [read_object(path) for path in sorted(directory.glob("memory-*.json"))]


def largest(notes: Sequence[dict[str, Any]], setting: str, wanted: int) -> int:
    """`wanted`, or half of what was too much: `setting` is gang_size or micro_batch_size."""
    return min([wanted, *(max(1, int(note[setting]) // 2) for note in notes if setting in note)])


def given_up(notes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Reasons by job of those that are too much alone, one sample at a time."""
    return {
        note["jobs"][0]: f"{note['jobs'][0]}: out of memory with one sample in the pass ({note['reason']}); "
        "lower max_length, set distill.loss to sft where its answers are many, or give the workers more memory"
        for note in notes
        if note.get("micro_batch_size") == note.get("gang_size") == 1 and len(note.get("jobs", ())) == 1
    }
