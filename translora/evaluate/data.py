"""Real task data, read from where the user keeps it, and its split into training and test rows."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from translora.evaluate.config import EvaluateTask
from translora.run.files import check_row, derive_seed, read_jsonl
from translora.synthesis.prompts import normalise

FIELDS = ("input", "target")
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Split:
    """One repetition's share of a task's data; no input is in both parts, case and white space aside."""

    train: Rows
    test: Rows


def read_task_data(path: str | Path) -> Rows:
    """Rows of `input` and `target`: JSONL, or BIG-Bench-Hard's {"examples": [...]}.

    Raises:
        ValueError: names the file, the row and what is wrong with it.
    """
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError):
        whole = None  # unreadable, or of several lines: read_jsonl knows, and says what is wrong
    if isinstance(whole, dict) and "examples" in whole:
        examples = whole["examples"]
        if not isinstance(examples, list) or not examples:
            raise ValueError(f'{path}: "examples" must be a list of objects with {" and ".join(FIELDS)}')
        rows = [check_row(row, FIELDS, f"{path}, example {number}") for number, row in enumerate(examples, 1)]
    else:
        rows = read_jsonl(path, required=FIELDS)
    return [{field: row[field] for field in FIELDS} for row in rows]


def split(rows: Rows, task: EvaluateTask, seed: int) -> Split:
    """Training and test rows of one repetition, drawn by seed and task; of equal inputs the first alone is used.

    Raises:
        ValueError: there are fewer different inputs than the two parts need.
    """
    distinct: dict[str, dict[str, str]] = {}
    for row in rows:
        distinct.setdefault(normalise(row["input"]), row)
    wanted = task.num_train + task.num_test
    if len(distinct) < wanted:
        raise ValueError(
            f"{task.data}: {len(distinct)} different inputs, but num_train + num_test of {task.name} is {wanted}; "
            "lower one of them, or give more data"
        )
    drawn = list(distinct.values())
    random.Random(derive_seed(seed, task.name, "evaluate")).shuffle(drawn)
    return Split(drawn[: task.num_train], drawn[task.num_train : wanted])
