"""Real task data, read from where the user keeps it, and its split into training and test rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translora.errors import InputError
from translora.evaluate.config import EvaluateTask
from translora.evaluate.harness import Document, HarnessTask, load_harness_task
from translora.evaluate.statistics import chance_share
from translora.gate.verdict import is_equal
from translora.run.files import check_row, derive_seed, digest, read_jsonl
from translora.synthesis.prompts import normalise

FIELDS = ("input", "target")
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Split:
    """One repetition's share of a task's data; no input is in both parts, case and white space aside."""

    train: Rows
    test: Rows
    harness: HarnessTask | None = None
    """What scores the answers; None is exact match, case and white space aside."""
    documents: Sequence[Document] = ()
    """The harness's, of each test row."""

    def score(self, found: Sequence[Any]) -> list[float]:
        """What an arm's answers are worth: 1 right, 0 wrong, and what the harness finds in between."""
        if self.harness is not None:
            return self.harness.score(self.documents, found)
        return [float(is_equal(answer, row["target"])) for answer, row in zip(found, self.test, strict=True)]

    def chance(self) -> float:
        """What guessing evenly would reach: among an item's choices, or among the targets that occur."""
        if self.harness is None or not self.harness.is_choice:
            return chance_share([row["target"] for row in self.test])
        return sum(1 / len(self.harness.choices(document)) for document in self.documents) / len(self.documents)


@dataclass(frozen=True)
class TaskData:
    """All that is known of a task."""

    entry: EvaluateTask
    rows: Rows
    harness: HarnessTask | None = None
    tests: Sequence[tuple[dict[str, str], Document]] = ()
    """Rows and documents of the harness's test split; `rows` are then of its training split alone."""

    @property
    def digest(self) -> str:
        """Of all rows, those included that no seed draws: seeds of other data cannot be put on one page."""
        return digest(self.rows, [row for row, _ in self.tests])


def load_task(entry: EvaluateTask) -> TaskData:
    """A task's rows, from its file or from the harness.

    Raises:
        InputError: names the file or the task and what is wrong with it.
    """
    if entry.data is not None:
        return TaskData(entry, read_task_data(entry.data))
    harness = load_harness_task(entry)
    tests = [(harness.row(one), one) for one in harness.test()]
    return TaskData(entry, [harness.row(one) for one in harness.train()], harness, tests)


def read_task_data(path: str | Path) -> Rows:
    """Rows of `input` and `target`: JSONL, or BIG-Bench-Hard's {"examples": [...]}.

    Raises:
        InputError: names the file, the row and what is wrong with it.
    """
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError):
        whole = None  # unreadable, or of several lines: read_jsonl knows, and says what is wrong
    if isinstance(whole, dict) and "examples" in whole:
        examples = whole["examples"]
        if not isinstance(examples, list) or not examples:
            raise InputError(f'{path}: "examples" must be a list of objects with {" and ".join(FIELDS)}')
        rows = [check_row(row, FIELDS, f"{path}, example {number}") for number, row in enumerate(examples, 1)]
    else:
        rows = read_jsonl(path, required=FIELDS)
    return [{field: row[field] for field in FIELDS} for row in rows]


def split(data: TaskData, seed: int) -> Split:
    """Training and test rows of one repetition, drawn by seed and task; of equal inputs the first alone is used.

    Raises:
        InputError: there are fewer different inputs than the two parts need.
    """
    task, rng = data.entry, random.Random(derive_seed(seed, data.entry.name, "evaluate"))
    drawn = draw(data.rows, rng)
    if data.harness is None:
        wanted = task.num_train + task.num_test
        if len(drawn) < wanted:
            raise InputError(
                f"{task.data}: {len(drawn)} different inputs, but num_train + num_test of {task.name} is {wanted}; "
                "lower one of them, or give more data"
            )
        return Split(drawn[: task.num_train], drawn[task.num_train : wanted])
    train = drawn[: task.num_train]
    known = {normalise(row["input"]) for row in train}
    pairs: dict[str, tuple[dict[str, str], Document]] = {}
    for row, document in data.tests:
        if (key := normalise(row["input"])) not in known:
            pairs.setdefault(key, (row, document))
    for part, count, wanted in (("train", len(train), task.num_train), ("test", len(pairs), task.num_test)):
        if count < wanted:
            raise InputError(
                f"tasks.{task.name}: lm_eval task {task.lm_eval} has {count} different inputs to {part} on, but "
                f"num_{part} is {wanted}; lower it"
            )
    chosen = rng.sample(list(pairs.values()), task.num_test)
    return Split(train, [row for row, _ in chosen], data.harness, [document for _, document in chosen])


def draw(rows: Rows, rng: random.Random) -> Rows:
    """Rows of different inputs in random order."""
    distinct: dict[str, dict[str, str]] = {}
    for row in rows:
        distinct.setdefault(normalise(row["input"]), row)
    drawn = list(distinct.values())
    rng.shuffle(drawn)
    return drawn
