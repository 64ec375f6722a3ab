"""One driver at a time on a run directory: a lease that a living driver renews.

No flock: on a shared file system it is missing, or holds on one host alone. A lease is a file that one process can
create. Its owner touches it every RENEW_SECONDS. On the owner's own host a second driver looks whether that process
lives; from any other host it takes the lease over when it was not renewed for LEASE_SECONDS. Ages are differences of
the file server's own times, so the hosts' clocks do not matter.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import logging
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from translora.errors import InputError
from translora.run.files import TEMPORARY_PREFIX

logger = logging.getLogger(__name__)
LEASE_SECONDS = 60.0
RENEW_SECONDS = 5.0
POLL_SECONDS = 1.0
_SAME_START_SECONDS = 5.0
"""Start times of a process as read twice may differ by this: they are computed from the adjusted clock."""


class LeaseLostError(RuntimeError):
    """Another driver took the run over, because this one gave no sign of life (it was suspended, say)."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease."""

    host: str
    place: str
    """Boot and process namespace: where `pid` means this process."""
    pid: int
    started: float
    """Its start, in seconds since the epoch by its own clock."""
    token: str
    """Different for every lease ever taken."""

    @property
    def is_near(self) -> bool:
        """Whether its process can be looked at from here."""
        return self.place == _place()

    @property
    def is_alive(self) -> bool:
        """Whether its process, which is near, still runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < _SAME_START_SECONDS
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass(frozen=True)
class Seen:
    """A lease as it lies on disk; the owner is unknown while it is being written."""

    owner: Owner | None
    renewed: float
    """Its time of modification."""


def look(path: Path) -> Seen | None:
    """The lease at `path`, or None where there is none; opening it makes a network file system ask its server."""
    try:
        with open(path, "rb") as handle:
            raw, renewed = handle.read(), os.fstat(handle.fileno()).st_mtime
    except FileNotFoundError:
        return None
    try:
        return Seen(Owner(**json.loads(raw)), renewed)
    except (ValueError, TypeError):
        return Seen(None, renewed)


def await_end(path: Path, *, remove: bool) -> None:
    """Return when no living driver holds the lease; waits at most LEASE_SECONDS for a sign of life from another host.

    Args:
        path: of the lease.
        remove: take a dead driver's lease away.

    Raises:
        InputError: a living driver holds it.
    """
    first: Seen | None = None
    while (seen := look(path)) is not None:
        age = _now(path) - seen.renewed
        if seen.owner is not None and seen.owner.is_near:
            if seen.owner.is_alive:
                raise _held(path, seen.owner, age)
            break
        if age >= LEASE_SECONDS:
            break
        if first is None or first.owner is None:
            first = seen
            logger.warning(
                "%s: a driver%s worked here %.0f s ago; waiting up to %.0f s for a sign of life",
                path.parent,
                f" on {seen.owner.host}" if seen.owner else "",
                age,
                LEASE_SECONDS - age,
            )
        elif seen.renewed != first.renewed:
            raise _held(path, seen.owner, age)
        time.sleep(POLL_SECONDS)
    if seen is not None and remove:
        _take_away(path, seen)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lease at `path` until the block ends, and renew it all the while.

    Raises:
        InputError: a living driver holds it.
        LeaseLostError: another driver took it over inside the block.
        OSError: the directory cannot be written.
    """
    process = psutil.Process()
    own = Owner(platform.node(), _place(), process.pid, process.create_time(), uuid.uuid4().hex)
    while not _create(path, own):
        await_end(path, remove=True)
    ended, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # the file server may be away for a while
                seen = look(path)
                if seen is None:
                    _create(path, own)
                elif seen.owner == own:
                    os.utime(path)
                elif seen.owner is not None:
                    lost.set()
                    # SIGINT is ignored, and then does nothing here, in what a shell starts in the background.
                    handled = callable(signal.getsignal(signal.SIGTERM))
                    _thread.interrupt_main(signal.SIGTERM if handled else signal.SIGINT)
                    return

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise LeaseLostError(f"{path.parent}: another driver took this run over") from None
        raise
    finally:
        ended.set()
        renewing.join()
        seen = look(path)
        if seen is not None and seen.owner == own:
            path.unlink(missing_ok=True)


def _place() -> str:
    """Boot and process namespace of this process: two containers of one host count as two hosts."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _create(path: Path, owner: Owner) -> bool:
    """Create the lease if there is none: the one step that only one process can do, on network file systems too."""
    try:
        with open(path, "x", encoding="utf-8") as handle:
            json.dump(asdict(owner), handle)
    except FileExistsError:
        return False
    except OSError:  # a full disk: an empty lease would be waited for
        path.unlink(missing_ok=True)
        raise
    return True


def _now(path: Path) -> float:
    """The file server's time."""
    probe = path.parent / f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        with open(probe, "xb") as handle:
            handle.write(b".")
            handle.flush()
            return os.fstat(handle.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _take_away(path: Path, seen: Seen) -> None:
    """Remove the lease that was seen; one that somebody else has put in its place meanwhile goes back."""
    aside = path.parent / f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    found = look(aside)
    if found is not None and found.owner != seen.owner:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    if seen.owner is not None:
        logger.warning(
            "%s: took over from the driver on %s (pid %d), which is dead", path.parent, seen.owner.host, seen.owner.pid
        )


def _held(path: Path, owner: Owner | None, age: float) -> InputError:
    who = f"pid {owner.pid} on {owner.host}, " if owner else ""
    return InputError(
        f"{path.parent}: another process works on this run ({who}sign of life {max(0.0, age):.0f} s ago); "
        "wait for it, or give another run_dir"
    )


def describe(path: Path) -> dict[str, Any] | None:
    """Who holds the lease and whether it lives, as plain values; None where nobody does. For a look from any host."""
    seen = look(path)
    if seen is None or seen.owner is None:
        return None
    owner, now = seen.owner, time.time()
    if not owner.is_near:
        with contextlib.suppress(OSError):  # who looks may not write here, and goes by the own clock
            now = _now(path)
    age = max(0.0, now - seen.renewed)
    alive = owner.is_alive if owner.is_near else age < LEASE_SECONDS
    return {"host": owner.host, "pid": owner.pid, "seconds_since_sign": round(age, 1), "alive": alive}
