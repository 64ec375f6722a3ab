"""One tracker of metrics: RUN/metrics.jsonl always, Weights & Biases when the config names a project."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from translora.config import TrackingConfig
from translora.errors import InputError
from translora.run.files import write_bytes
from translora.run.redact import without_secrets

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
METRICS_FILE, WANDB_ID_FILE = "metrics.jsonl", "wandb_id"
_METRIC_NAME = re.compile(r"(loss|perf|time|adapter)/[A-Za-z0-9_]+([/-][A-Za-z0-9_]+)*")


class Tracker:
    """Writes metrics of a run; a rerun appends to the same file and to the same W&B run.

    Used by the driver alone, from any of its threads. Names are `loss/…`, `perf/…`, `time/…` or `adapter/…`.
    """

    def __init__(self, run_dir: Path, config: TrackingConfig, run_config: dict[str, Any], name: str) -> None:
        """Open the files; `run_config` (without secrets) and `name` describe the run in W&B.

        Raises:
            InputError: W&B is configured but cannot be reached or has no key.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        _mend(path)
        self._lock = threading.Lock()
        self._known_adapters: set[str] = set()
        self._wandb = _open_wandb(run_dir, config, run_config, name) if config.wandb_project else None
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held open for the life of the run)

    def log(self, metrics: dict[str, float], *, step: int | None = None, adapter: str | None = None) -> None:
        """Record metrics now; `step` counts within `adapter`, or within the run without one."""
        for name in metrics:
            assert _METRIC_NAME.fullmatch(name), f"metric {name!r} must be named loss/…, perf/…, time/… or adapter/…"
        finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"time": round(time.time(), 3), "adapter": adapter, "step": step, "metrics": finite}
        with self._lock:
            self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()
            if self._wandb is not None:
                self._log_wandb(self._wandb, metrics, step, adapter)

    def _log_wandb(self, run: wandb.Run, metrics: dict[str, float], step: int | None, adapter: str | None) -> None:
        """`loss/student` of adapter `a` becomes `adapter/a/loss/student`, drawn over `adapter/a/step`."""
        prefix = "" if adapter is None else f"adapter/{wandb_name(adapter)}/"
        if prefix not in self._known_adapters:
            self._known_adapters.add(prefix)
            run.define_metric(f"{prefix}step", hidden=True)
            for group in ("*",) if prefix else ("loss/*", "perf/*", "time/*"):
                run.define_metric(prefix + group, step_metric=f"{prefix}step")
        row = {prefix + (name.removeprefix("adapter/") if prefix else name): value for name, value in metrics.items()}
        if step is not None:
            row[f"{prefix}step"] = step
        run.log(row)

    def close(self, *, failed: bool = False) -> None:
        """Flush and end; closing twice is harmless."""
        with self._lock:
            self._file.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=int(failed))
                self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def wandb_name(adapter: str) -> str:
    """The adapter's name inside a W&B metric, where a dot or a slash would open a nested key."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", adapter)


def _mend(path: Path) -> None:
    """End the last line that a killed run may have left half-written: complete it, or cut it off."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as handle:
        data = handle.read()
        if data.endswith(b"\n"):
            return
        start = data.rfind(b"\n") + 1
        try:
            json.loads(data[start:])
            handle.write(b"\n")
        except ValueError:
            handle.truncate(start)


def _open_wandb(run_dir: Path, config: TrackingConfig, run_config: dict[str, Any], name: str) -> wandb.Run:
    """Start or continue the run whose id lies in RUN/wandb_id; W&B's own files go below RUN/wandb."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    id_path = run_dir / WANDB_ID_FILE
    if not id_path.is_file():
        write_bytes(id_path, uuid.uuid4().hex[:12].encode())
    offline = config.wandb_mode == "offline"
    # Nothing but metrics and the config leaves the machine: no code, no git remote, no console output.
    settings = wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, x_save_requirements=False)
    try:
        return wandb.init(
            project=config.wandb_project,
            name=name,
            id=id_path.read_text().strip(),
            resume=None if offline else "allow",  # offline runs of one id become one run at `wandb sync`
            mode=config.wandb_mode,
            dir=str(run_dir),
            config=without_secrets(run_config),
            settings=settings,
        )
    except wandb.errors.Error as error:
        raise InputError(
            f"tracking.wandb_project {config.wandb_project!r}: W&B cannot be used ({error}); "
            "run `wandb login`, set tracking.wandb_mode to offline, or remove wandb_project"
        ) from error
