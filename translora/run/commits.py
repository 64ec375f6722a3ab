"""A run keeps to the commits of the hub's models that it began with, also when it is started again months later."""

from __future__ import annotations

from pathlib import Path

from translora.bundle.base import BaseInfo, info_of
from translora.config import BaseModelConfig
from translora.errors import InputError
from translora.run.files import read_object, write_json

COMMITS = "commits.json"
"""In a run directory: commit by `model@revision`, as the config file names them. Without it a run takes the newest."""


def info_as_begun(run_dir: Path, base: BaseModelConfig) -> BaseInfo:
    """What is known of a base, at the commit at which this run began with it.

    Raises:
        InputError: as `inspect_base`.
    """
    commit = read_object(run_dir / COMMITS).get(_key(base))
    if commit is None:
        return info_of(base)
    try:
        return info_of(base.model_copy(update={"revision": str(commit)}))
    except InputError as error:
        remedy = f"the run began with commit {commit}; remove {run_dir / COMMITS} to go on with the newest"
        raise InputError(f"{error} ({remedy})") from error


def note_commits(run_dir: Path, *bases: tuple[BaseModelConfig, BaseInfo]) -> None:
    """Write down at which commits the bases of a run were found; a directory has none."""
    known = read_object(run_dir / COMMITS)
    found = {_key(settings): info.revision for settings, info in bases if info.revision is not None}
    if found.items() - known.items():
        write_json(run_dir / COMMITS, known | found)


def _key(base: BaseModelConfig) -> str:
    return f"{base.model}@{base.revision or ''}"
