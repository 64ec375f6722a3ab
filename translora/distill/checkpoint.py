"""Checkpoints of gangs: one file a group of ranks, with all its students at the same step, replaced as a whole.

A resumed gang has the students that the file names in the same slots, so that it goes on to the same bits. Where the
queues are no longer the same (other workers, other jobs), each student still goes on from its own last state.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from translora.distill.gang import Gang
from translora.run.files import digest, write_bytes

logger = logging.getLogger(__name__)


def queue_digest(gang: Gang) -> str:
    """Hash of what decides the company of a group's students."""
    return digest([job.recipe(gang.config, gang.fingerprint) for job in gang.queue], gang.num_ranks)


def write_checkpoint(path: Path, gang: Gang) -> None:
    """Replace the group's checkpoint: factors, moments and losses of its students, never the base."""
    tensors: dict[str, torch.Tensor] = {}
    students: list[dict[str, Any]] = []
    for slot, student in gang.students.items():
        tensors |= {f"{slot}/{key}": tensor.cpu().contiguous() for key, tensor in student.state().items()}
        entry = {"slot": slot, "job": gang.queue.index(student.job), "recipe": student.recipe}
        students.append({**entry, "losses": student.losses})
    place = {"queue": queue_digest(gang), "num_slots": gang.num_slots, "next": gang.next}
    write_bytes(path, save(tensors, {"gang": json.dumps({**place, "students": students})}))


def read_checkpoints(directory: Path, own: str, gang: Gang) -> None:
    """Open the students of the group's own checkpoint in their slots, and keep the states of all files for others."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as handle:
                place = json.loads(handle.metadata()["gang"])
            tensors = load_file(path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("%s: cannot be read (%s); its students begin again", path, error)
            continue
        for student in place["students"]:
            prefix = f"{student['slot']}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            gang.saved[student["recipe"]] = (state, student["losses"])
        if path.name == own and (place["queue"], place["num_slots"]) == (queue_digest(gang), gang.num_slots):
            gang.next = place["next"]
            for student in place["students"]:
                gang.open(student["slot"], gang.queue[student["job"]])


def saved_gang_size(directory: Path) -> int | None:
    """The gang size of an earlier start, which a resumed one keeps; None where there is none."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as handle:
                return int(json.loads(handle.metadata()["gang"])["num_slots"])
        except (SafetensorError, OSError, KeyError, ValueError):
            continue
    return None
