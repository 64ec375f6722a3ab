"""Which adapters' rows a phase computes together, remembered so that a rerun mixes the same ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from translora.run.files import write_json
from translora.run.member import Member
from translora.run.state import Phase, reached

logger = logging.getLogger(__name__)


def cohort(run_dir: Path, phase: Phase, todo: list[Member], members: list[Member]) -> list[Member]:
    """The members whose rows are computed together in a phase: those of the killed run, if there was one.

    Batches mix adapters, so a rerun must mix the same ones to find its finished blocks again and to end with the same
    bits, also when the kill fell between two adapters' last steps. Members that are not of the cohort come after it.
    """
    path = run_dir / f"cohort-{phase}.json"
    by_name = {member.name: member for member in members}
    names = read_cohort(path)
    if names and all(name in by_name and reached(by_name[name].state, phase) for name in names):
        return [by_name[name] for name in names]
    write_json(path, [member.name for member in todo])
    return todo


def read_cohort(path: Path) -> list[str]:
    """Names of a cohort; none where there is no file, or one that is damaged, which is warned of."""
    if not path.is_file():
        return []
    try:
        names = json.loads(path.read_bytes())
    except (OSError, ValueError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        logger.warning("%s: cannot be read: unfinished batches are computed again", path)
        return []
    return names


def cohort_names(run_dir: Path) -> set[str]:
    """Names of all adapters of the cohorts of a killed run."""
    return {name for path in run_dir.glob("cohort-*.json") for name in read_cohort(path)}


def end_cohort(run_dir: Path, phase: Phase) -> None:
    """Forget the cohort: each of its members has left the phase."""
    (run_dir / f"cohort-{phase}.json").unlink(missing_ok=True)
