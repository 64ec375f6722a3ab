"""Quiet logs: translora's own lines, other libraries' warnings and errors, and none of their chatter.

`setup_logging` comes before the first import of ray, torch or deepspeed, because most of them read
their environment once, at import.
"""

from __future__ import annotations

import builtins
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from translora.run.redact import printable, redact

console = Console(stderr=True)
"""The one console on stderr: log lines and progress bars share it, so that they do not overwrite each other."""

_NVIDIA = (Path("/dev/nvidia0"), Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
_RAY_DATA_LOGGING = Path(__file__).with_name("ray_data_logging.yaml")

# What every process of a run needs, verbose or not.
_BEHAVIOUR = {
    # Actors and ZeRO-3 ranks may share cores, where spinning threads cost tenfold; some microseconds of it pay.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_V2_ENABLED": "1",
    # An actor with 0 GPUs must see none: `gpus_per_actor: 0` means the CPU on a GPU machine too.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process per run, for a notice that nothing here reads
}
QUIET_MARK = "TRANSLORA_QUIET"
_QUIET = {
    QUIET_MARK: "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",  # torch.distributed under DeepSpeed 0.19
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "1",
    "WANDB_SILENT": "true",
}


class SafeFormatter(logging.Formatter):
    """A record, its traceback included, without secrets and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The text; a traceback keeps its lines."""
        return printable(redact(super().format(record)), keep="\n\t")


def has_cuda_device() -> bool:
    """Whether this machine shows a CUDA device, without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(path.exists() for path in _NVIDIA)


def quiet_environment(*, verbose: bool = False, on_gpu: bool | None = None) -> dict[str, str]:
    """Environment variables for this process and, through Ray's runtime_env, for the workers.

    What the user has set stays as it is. `on_gpu` says whether the workers train on GPUs (they may
    be other machines than this one); unset asks this machine.
    """
    wanted = dict(_BEHAVIOUR)
    if not (has_cuda_device() if on_gpu is None else on_gpu):
        wanted["DS_ACCELERATOR"] = "cpu"
    if not verbose:
        wanted |= _QUIET
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def setup_logging(verbose: bool = False) -> None:
    """Set up this process, the driver; call it before ray, torch or deepspeed are imported.

    On a terminal lines are short and share the console with progress bars; elsewhere they are plain and
    timestamped. `verbose` shows debug lines and lets the libraries speak.
    """
    os.environ.update(quiet_environment(verbose=verbose))
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(
            console=console, show_path=False, highlighter=NullHighlighter(), log_time_format="%H:%M:%S", markup=False
        )
        handler.setFormatter(SafeFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("translora").setLevel(logging.DEBUG if verbose else logging.INFO)
    if verbose:
        return
    logging.captureWarnings(True)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    os.environ.setdefault("RAY_DATA_LOGGING_CONFIG", str(_RAY_DATA_LOGGING))
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_not_token_notice)


def _not_token_notice(record: logging.LogRecord) -> bool:
    """Drop the notice that token authentication is on; the warning that it is off stays."""
    return not record.getMessage().startswith("Token authentication is enabled")


def quiet_worker() -> None:
    """Called first in a Ray Train worker: drops what libraries print, INFO lines and deprecation warnings.

    DeepSpeed announces its ops with print, which Ray Train shows twice, and Ray Train sets the root logger to INFO.
    Does nothing in a verbose run.
    """
    if os.environ.get(QUIET_MARK) != "1":
        return
    logging.getLogger().setLevel(logging.WARNING)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    speak = builtins.print

    def print_elsewhere_only(*values: Any, file: Any = None, **options: Any) -> None:
        if file is not None and file is not sys.stdout:
            speak(*values, file=file, **options)

    builtins.print = print_elsewhere_only
