"""How a block reaches an actor, and what becomes of one whose actor dies: it is tried again, then taken apart.

Runs in Ray's tasks and in the driver; loads no torch.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

logger = logging.getLogger(__name__)
Row = dict[str, Any]
FAULT = "fault"
"""Key of a row that could not be computed: the reason."""
SLOT_KEYS = ("slot", "discriminator")
"""Of a row: the adapters that it needs."""
TRIES = 3
"""Of a whole block: an actor may die of something else, its node for one."""
STANDING_SECONDS = 300.0
"""How long a block waits for any of its actors to stand again."""
RETRY_SECONDS = 1.0
Computed = tuple[list[Row], dict[str, float]]
"""Rows, and the seconds that the actor spent on them: `model` and `load`."""


@dataclass(frozen=True)
class Work:
    """What is done with every block."""

    function: bytes
    """A BlockFunction, pickled: a task hands it on without importing what it needs."""
    base: dict[str, Any]
    adapters: dict[str, str]
    """PEFT directory by slot name."""
    settings: dict[str, Any]


def call_host(batch: dict[str, Any], actors: Sequence[Any], work: Work) -> dict[str, Any]:
    """Ray Data's task: hand one block to an actor. Number, actor and rows as JSON come in arrays of length 1.

    `rows` of the result is null for a block whose actors died; `isolate` looks for the reason.
    """
    ((actor,), (text,)) = batch["actor"], batch["rows"]
    try:
        rows, seconds = call(actors, int(actor), json.loads(text), work, TRIES)
    except RayActorError:
        rows, seconds = None, {}
    return {"block": batch["block"], "rows": np.array([json.dumps(rows)]), "seconds": np.array([json.dumps(seconds)])}


def call(actors: Sequence[Any], first: int, rows: list[Row], work: Work, tries: int) -> Computed:
    """Compute rows on an actor, on the next one when it dies.

    Raises:
        RayActorError: `tries` actors died of it, or none stands.
    """
    turn = first
    deadline: float | None = None
    while True:
        actor = actors[turn % len(actors)]
        turn += 1
        try:
            ray.get(actor.ready.remote())
        except RayActorError:
            # It starts again, or waits for room on the cluster: another one may stand.
            deadline = deadline or time.monotonic() + STANDING_SECONDS
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)
            continue
        deadline = None
        try:
            computed: Computed = ray.get(actor.run.remote(work.base, work.adapters, work.function, rows, work.settings))
            return computed
        except RayActorError:
            tries -= 1
            if tries == 0:
                raise


def isolate(actor: Any, rows: list[Row], work: Work, limit_seconds: float) -> Computed:
    """Compute a block that actors died of, alone on one actor and in ever smaller parts; what is left has a fault.

    Raises:
        RayError: the base alone is too much for the actor.
    """
    try:
        call([actor], 0, [], work, TRIES)
    except RayActorError as error:
        raise RayError(f"{work.base['model']}: loading it ended the process {TRIES} times ({_line(error)})") from error
    return _take_apart(actor, rows, work, limit_seconds)


def _take_apart(actor: Any, rows: list[Row], work: Work, limit_seconds: float) -> Computed:
    start = time.monotonic()
    try:
        return call([actor], 0, rows, work, 2 if len(rows) == 1 else 1)
    except RayActorError as error:
        reason = f"its row ends the process that computes it ({_line(error)})"
        if time.monotonic() - start > limit_seconds:
            reason = f"its row is not computed within resources.worker_timeout_seconds ({limit_seconds:g})"
    if len(rows) == 1:
        return [{**rows[0], FAULT: reason}], {}
    logger.warning("a block of %d rows: %s; trying its halves", len(rows), reason)
    middle = len(rows) // 2
    halves = [_take_apart(actor, part, work, limit_seconds) for part in (rows[:middle], rows[middle:])]
    seconds = {kind: sum(part.get(kind, 0.0) for _, part in halves) for kind in ("model", "load")}
    return [row for part, _ in halves for row in part], seconds


def _line(error: BaseException) -> str:
    """The telling line of one of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = next((line for line in lines if "Worker exit" in line or "exit_detail" in line or "OOM" in line), "")
    return (telling or (lines[0] if lines else type(error).__name__))[:300]
