"""A process that hangs ends itself: its caller sees a dead worker, which is tried again, and not an endless wait."""

from __future__ import annotations

import faulthandler
import sys


class Watchdog:
    """Ends the process when the next `alive` is too long in coming, and writes each thread's stack to stderr.

    The clock is a thread in C (faulthandler), so that it also ends a process whose interpreter is stuck. One a process.

    Args:
        seconds: the limit; None for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def alive(self) -> None:
        """Start the clock anew."""
        if self.seconds is not None and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def stop(self) -> None:
        """Stop the clock: there is nothing to wait for."""
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()
