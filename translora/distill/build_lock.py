"""DeepSpeed compiles small ops at their first use, those of ZeRO++ for one.

A process that is killed meanwhile leaves torch's lock behind. torch waits for such a lock for ever
(torch.utils.file_baton), and with it every later training on the machine.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import deepspeed
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)
PATIENCE = 120.0
"""Seconds that a lock is left alone which no process of this machine holds: one of another machine with the same home
directory might, and compiles for less than that."""


def leave_out_unused_op() -> None:
    """Have DeepSpeed not compile what it has for tensor-parallel inference on CPUs; to be called before it starts."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def free_build_locks() -> None:
    """Remove the locks of torch's extensions whose holders are gone; waits for those that may not be."""
    root = Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False)).parent
    for lock in root.glob("*/lock"):
        free(lock)


def free(lock: Path, patience: float = PATIENCE) -> None:
    """Wait until a lock is gone, and remove it where no process here holds it and it is `patience` seconds old."""
    while (age := age_of(lock)) is not None:
        if not is_held(lock):
            if age > patience:
                logger.warning("%s: left by a process that was killed while it compiled; removed", lock)
                lock.unlink(missing_ok=True)
                return
            logger.info("%s: nobody on this machine holds it; removed in %.0f s", lock, patience - age)
        time.sleep(min(5.0, max(0.1, patience - age)))


def age_of(lock: Path) -> float | None:
    """Seconds since it was made; None where it is not there."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def is_held(lock: Path) -> bool:
    """Whether a process of this machine, and of this user, has the lock open, as its holder does until it ends."""
    wanted = os.path.realpath(lock)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == wanted:
                return True
        except OSError:  # the process ended, or is another user's
            continue
    return False
