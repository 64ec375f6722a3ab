"""The run directory: one driver at a time, resolved config, versions, and what a rerun may change."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from translora.config import VLLM_EXECUTION_ONLY
from translora.config_file import ConfigFile, kind_of
from translora.errors import InputError
from translora.run import lease
from translora.run.files import TEMPORARY_PREFIX, full_disk, remove_temporaries, write_json
from translora.run.redact import without_secrets

logger = logging.getLogger(__name__)
LOCK, CONFIG = "lock", "config.json"
PACKAGES = ("translora", "torch", "transformers", "peft", "deepspeed", "ray", "datasets", "wandb", "safetensors")
MAY_CHANGE = {
    "adapters",
    "arms",
    "merges",
    "max_num_samples",
    "max_rank",
    "tasks",
    "resources",
    "tracking",
    "run_dir",
    "output_dir",
}
EXECUTION_ONLY = {
    "micro_batch_size",
    "gang_size",
    "tokens_per_pass",
    "num_workers",
    "checkpoint_every_steps",
    "checkpoint_every_seconds",
    "max_failures",
    "gradient_checkpointing",
    "ds_config",
}
"""What a rerun may change, sections and settings: they do not change the result of an adapter, but for rounding."""


WORK = ("rounds", "negatives", "tasks", "gangs", "bundles")
"""Directories of a run that hold results; so do those of its adapters, beside their states."""


@contextlib.contextmanager
def open_run(run_dir: Path, config: ConfigFile, *, settings_may_change: bool = False) -> Iterator[None]:
    """Create or continue a run directory; holds its lease until the block ends.

    Args:
        settings_may_change: the caller finds what was made with other settings and does it again.

    Raises:
        InputError: another process works on it, it cannot be written, it is no run directory, or what it holds was
            made with other settings.
        LeaseLostError: another driver took it over.
    """
    with _locked(run_dir, config.command):
        if not settings_may_change:
            refuse_other_settings(run_dir, config)
        elif changed := _changed_since(run_dir, config):
            logger.warning("%s: settings changed (%s): what they touch is done again", run_dir, changed)
        remove_temporaries(run_dir)
        write_json(run_dir / CONFIG, _resolved(config))
        write_json(run_dir / "versions.json", versions())
        yield
        remove_temporaries(run_dir)  # of workers that outlived a killed driver for a moment


def refuse_other_settings(run_dir: Path, config: BaseModel) -> None:
    """Whether what lies in a run directory, if anything does, was made with these settings.

    Raises:
        InputError: it was not; names them.
    """
    if changed := _changed_since(run_dir, config):
        raise InputError(f"{run_dir}: was made with other settings ({changed}); set it back, or give another run_dir")


def _changed_since(run_dir: Path, config: BaseModel) -> str:
    path = run_dir / CONFIG
    made = path.is_file() and _holds_work(run_dir)
    return changed_settings(_read_config(path), _resolved(config)) if made else ""


def _resolved(config: BaseModel) -> dict[str, Any]:
    return without_secrets(json.loads(config.model_dump_json()))


def check_free(run_dir: Path, command: str = "") -> None:
    """Refuse at once what `open_run` would refuse after the libraries are loaded and Ray has started.

    Args:
        command: that is to work on it.

    Raises:
        InputError: another process works on the run, it cannot be written, or it is no run directory.
    """
    with _usable(run_dir):
        if run_dir.is_dir():
            _check_ours(run_dir, command)
            lease.await_end(run_dir / LOCK, remove=False)


@contextlib.contextmanager
def _usable(run_dir: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        if full_disk(error):
            raise
        raise InputError(
            f"{run_dir}: cannot be used as run_dir ({error}); give a directory that you can write"
        ) from error


@contextlib.contextmanager
def _locked(run_dir: Path, command: str) -> Iterator[None]:
    """Create the run directory if need be, and hold its lease."""
    with contextlib.ExitStack() as stack:
        with _usable(run_dir):
            _check_ours(run_dir, command)
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lease.hold(run_dir / LOCK))
        yield


def _check_ours(run_dir: Path, command: str) -> None:
    """Refuse a directory that holds other files than a run's: a rerun removes what it takes for leftovers.

    And one of another command, whose config would be replaced.

    Raises:
        InputError: names the directory.
    """
    if not run_dir.is_dir():
        return
    names = {path.name for path in run_dir.iterdir()}
    # A run that was killed at its very start leaves its lease and perhaps half a config.
    halves = tuple(f"{TEMPORARY_PREFIX}{name}-" for name in (CONFIG, LOCK))
    begun = {name for name in names if name == LOCK or name.startswith(halves)}
    made = _read_config(run_dir / CONFIG) if CONFIG in names else {}
    if names == begun or "run_dir" in made:
        kind = kind_of(made)
        if kind is not None and command not in ("", kind[1]):
            raise InputError(f"{run_dir}: is the run of `translora {kind[1]}`; give another run_dir")
        return
    raise InputError(f"{run_dir}: is not empty and no run directory; give another run_dir")


def _holds_work(run_dir: Path) -> bool:
    """Whether something was made here that depends on the settings; a state alone is not."""
    made = any((run_dir / name).exists() for name in WORK)
    return made or any(path.name != "state.json" for path in run_dir.glob("adapters/*/*"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable ({error}); remove the run directory or give another run_dir") from error
    return config if isinstance(config, dict) else {}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def changed_settings(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ and decide a result, as `key before -> now`; empty where there is none.

    A base's revision decides none: what it stands for is compared by its weights.
    """
    indifferent = EXECUTION_ONLY | VLLM_EXECUTION_ONLY | {"revision"}
    before, after = _flatten(earlier), _flatten(now)
    return "; ".join(
        f"{key} {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] not in MAY_CHANGE
        and key.split(".")[-1] not in indifferent
        and not key.endswith("synthesis.batch_size")
        and before.get(key) != after.get(key)
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
