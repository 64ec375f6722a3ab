"""Checkpoints of gangs: one file a group of ranks, with all its students at the same step, replaced as a whole.

A resumed gang has the students that the file names in the same slots, so that it goes on to the same bits. Where the
queues are no longer the same (other workers, other jobs), each student still goes on from its own last state.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from translora.distill.gang import Gang
from translora.run.files import digest, read_object, write_bytes

logger = logging.getLogger(__name__)
ASKED = "checkpoint-now"
"""Beside the checkpoints: its time is that of the driver's wish for one."""


def queue_digest(gang: Gang) -> str:
    """Hash of what decides the company of a group's students."""
    return digest(gang.recipes, gang.num_ranks)


def write_checkpoint(path: Path, gang: Gang) -> None:
    """Replace the group's checkpoint: factors, moments and losses of its students, never the base.

    States of an earlier start that wait for their turn are carried along.
    """
    entries: list[dict[str, Any]] = []
    states = []
    for slot, student in gang.students.items():
        place = {"slot": slot, "job": gang.queue.index(student.job)}
        entries.append({**place, "recipe": student.recipe, "losses": student.losses})
        states.append(student.state())
    for recipe, (state, losses) in gang.saved.items():
        if recipe in gang.recipes:
            entries.append({"slot": None, "recipe": recipe, "losses": losses})
            states.append(state)
    tensors = {f"{n}/{key}": value.cpu().contiguous() for n, state in enumerate(states) for key, value in state.items()}
    gang_place = {
        "queue": queue_digest(gang),
        "num_slots": gang.num_slots,
        "next": gang.next,
        "given_up": gang.given_up,
        "students": entries,
    }
    write_bytes(path, save(tensors, {"gang": json.dumps(gang_place)}))


def read_checkpoints(directory: Path, own: str, gang: Gang) -> None:
    """Open the students of the group's own checkpoint in their slots, and keep the states of all files for others."""
    mine: dict[str, Any] | None = None
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as handle:
                place = json.loads(handle.metadata()["gang"])
                states: dict[int, dict[str, torch.Tensor]] = {
                    n: {} for n, one in enumerate(place["students"]) if one["recipe"] in gang.recipes
                }
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    prefix, _, key = name.partition("/")
                    if (state := states.get(int(prefix))) is not None:
                        # A copy: the file may be replaced while a state waits for its turn.
                        state[key] = handle.get_tensor(name).clone()
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s: cannot be read (%s); its students begin again", path, error)
            continue
        for number, state in states.items():
            student = place["students"][number]
            known = gang.saved.get(student["recipe"])
            if known is not None and len(known[1]) >= len(student["losses"]):
                continue  # a file of an earlier layout that was left behind
            gang.saved[student["recipe"]] = (state, student["losses"])
        if path.name == own and (place["queue"], place["num_slots"]) == (queue_digest(gang), gang.num_slots):
            mine = place
    if mine is not None:
        gang.next = mine["next"]
        for job in gang.queue:  # the queue goes on behind them, and the driver forgot why they ended
            if (reason := mine.get("given_up", {}).get(job.name)) is not None and job.name not in gang.done:
                gang.give_up(job, reason)
        for student in mine["students"]:
            if student["slot"] is not None:
                gang.open(student["slot"], student["job"])


def saved_gang_size(directory: Path) -> int | None:
    """The gang size of an earlier start, which a resumed one keeps; None where there is none."""
    for path in sorted(directory.glob("gang-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as handle:
                return int(json.loads(handle.metadata()["gang"])["num_slots"])
        except (SafetensorError, OSError, KeyError, ValueError):
            continue
    return None


def is_asked_for(path: Path) -> bool:
    """Whether the driver wants a checkpoint that is younger than the one at `path`."""
    try:
        asked = (path.parent / ASKED).stat().st_mtime
    except OSError:
        return False
    return not path.is_file() or path.stat().st_mtime < asked


def ask_for_checkpoints(directory: Path, patience_seconds: float) -> None:
    """Have every gang write a checkpoint now; for the driver, which was told to end. Waits so long at most."""
    paths = [directory / name for name in read_object(directory / "plan.json").get("checkpoints", ())]
    (directory / ASKED).touch()
    deadline = time.monotonic() + patience_seconds
    while any(is_asked_for(path) for path in paths) and time.monotonic() < deadline:
        time.sleep(0.1)
