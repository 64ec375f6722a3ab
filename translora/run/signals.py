"""Ctrl-C and SIGTERM end a run in the same way: it unwinds, says one line, and the same command continues it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes, as a shell reports the two signals."""
_received: list[int] = []


def unwind_on_sigterm() -> None:
    """Let SIGTERM unwind the main thread as Ctrl-C does, and a second one end the process at once.

    To be called again after `ray.init`, whose own handler ends in an abort of the C++ core (ray 2.60).
    """

    def unwind(signum: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _received.append(signum)
        raise KeyboardInterrupt  # not a class of its own: Ray's C++ core lets no other one through

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, unwind)


def exit_code() -> int:
    """The exit code of a run that ended with KeyboardInterrupt, by the signal that raised it."""
    return TERMINATED if signal.SIGTERM in _received else INTERRUPTED


@contextlib.contextmanager
def interruptible_fit() -> Iterator[None]:
    """Around Ray Train's `fit`, which replaces the SIGINT handler for good and turns Ctrl-C into SystemExit(1)."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
