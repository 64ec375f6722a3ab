"""The run directory: one driver at a time, resolved config, versions, and what a rerun may change."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from translora.run.files import remove_temporaries, write_json

PACKAGES = ("translora", "torch", "transformers", "peft", "deepspeed", "ray", "datasets", "wandb", "safetensors")
MAY_CHANGE = {"adapters", "tasks", "resources", "tracking", "run_dir", "output_dir"}
EXECUTION_ONLY = {
    "micro_batch_size",
    "gang_size",
    "num_workers",
    "checkpoint_every_steps",
    "max_failures",
    "gradient_checkpointing",
}
"""What a rerun may change, sections and settings: they do not change the result of an adapter, but for rounding."""


@contextlib.contextmanager
def open_run(run_dir: Path, config: BaseModel) -> Iterator[None]:
    """Create or continue a run directory; holds its lock until the block ends.

    Raises:
        ValueError: another process works on it, it cannot be written, or it was made with other settings.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / "lock", "w")  # noqa: SIM115 (held for the whole run)
    except OSError as error:
        raise ValueError(
            f"{run_dir}: cannot be used as run_dir ({error}); give a directory that you can write"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{run_dir}: another process works on this run; wait for it, or give another run_dir"
            ) from error
        resolved = json.loads(config.model_dump_json())
        path = run_dir / "config.json"
        if path.is_file():
            _check_same(path, resolved)
        remove_temporaries(run_dir)
        write_json(path, resolved)
        write_json(run_dir / "versions.json", versions())
        yield


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _check_same(path: Path, resolved: dict[str, Any]) -> None:
    try:
        before = _flatten(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable ({error}); remove the run directory or give another run_dir") from error
    now = _flatten(resolved)
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key.split(".")[0] not in MAY_CHANGE
        and key.split(".")[-1] not in EXECUTION_ONLY
        and before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(f"{path.parent}: was made with other settings ({'; '.join(changed)}); give another run_dir")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
