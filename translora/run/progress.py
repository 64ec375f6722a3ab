"""Progress of one phase: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from translora.run.log import console

logger = logging.getLogger(__name__)
LINE_EVERY_SECONDS = 20.0


class Progress:
    """Counts up to `total` under a label. Use as a context manager."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._start = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = RichProgress(*columns, console=console, transient=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            logger.info("%s: %d in %.0f s", self.label, self.total, time.monotonic() - self._start)

    def update(self, done: int, note: str = "") -> None:
        """Set the count; `note` (a loss, say) is shown behind the label."""
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=f"{self.label} {note}".rstrip())
        elif time.monotonic() - self._last_line > LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            logger.info("%s: %d/%d %s", self.label, done, self.total, note)

    def fraction(self, done: int, total: int) -> None:
        """Set the count from `done` of `total` equal parts."""
        self.update(round(self.total * done / total))
