"""What Ray could not repair, told apart: a full disk, a base that no worker can use, and everything else."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator

from translora.errors import InputError

logger = logging.getLogger(__name__)
DISK_FULL = os.strerror(errno.ENOSPC)


class RunFailedError(RuntimeError):
    """Ray or a worker failed for good; not the user's input, not an adapter."""


@contextlib.contextmanager
def cluster_faults() -> Iterator[None]:
    """Show the traceback of what Ray could not repair, and end with one line and an exit code of its own."""
    import ray.exceptions
    import ray.train

    try:
        yield
    except (ray.exceptions.RayError, ray.train.TrainingFailedError, ConnectionError) as error:
        if DISK_FULL in str(error):
            raise RunFailedError(f"a worker could not write: {DISK_FULL}; free some space") from error
        logger.error("the cluster or a worker failed", exc_info=True)
        if (refusal := worker_refusal(error)) is not None:
            raise InputError(str(refusal)) from error
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RunFailedError(lines[-1] if lines else type(error).__name__) from error


def worker_refusal(error: BaseException) -> InputError | None:
    """What a worker said of a base that it cannot use: a rerun would not change it. None for faults."""
    from ray.exceptions import RayError

    from translora.bundle.base import UnusableBaseError

    if isinstance(error, UnusableBaseError) and not isinstance(error, RayError):
        return error
    # Of Ray's tasks, of its training's workers and controller, and of what a worker raised (ray 2.60).
    failures = getattr(error, "worker_failures", {})
    links = [getattr(error, name, None) for name in ("cause", "controller_failure", "_base_exc", "__cause__")]
    for link in (*failures.values(), *links):
        if isinstance(link, BaseException) and (found := worker_refusal(link)) is not None:
            return found
    return None
