"""Progress of one phase: a bar on a terminal, plain lines in a log, and a file for other shells."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from translora.run.files import write_json
from translora.run.log import console

logger = logging.getLogger(__name__)
LINE_EVERY_SECONDS = 20.0
FILE_EVERY_SECONDS = 2.0
PROGRESS = "progress.json"
"""What the run is doing, as long as it does it: label, done, total, left_seconds (None: not known yet)."""


class Progress:
    """Counts up to `total` under a label. Use as a context manager.

    Args:
        run_dir: where `progress.json` is written.
    """

    def __init__(self, label: str, total: int, run_dir: Path) -> None:
        self.label, self.total, self.done = label, total, 0
        self._path = run_dir / PROGRESS
        self._start = self._last_line = time.monotonic()
        self._last_file = 0.0
        self._first: tuple[float, int] | None = None
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = RichProgress(*columns, console=console, transient=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        self._write()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._path.unlink(missing_ok=True)
        if kind is None:
            logger.info("%s: %d in %.0f s", self.label, self.total, time.monotonic() - self._start)

    def update(self, done: int, note: str = "") -> None:
        """Set the count; `note` (a loss, say) is shown behind the label."""
        self.done, now = done, time.monotonic()
        self._first = self._first or (now, done)  # what a killed run had done comes with the first update
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=f"{self.label} {note}".rstrip())
        elif now - self._last_line > LINE_EVERY_SECONDS:
            self._last_line = now
            logger.info("%s: %d/%d %s", self.label, done, self.total, note)
        if now - self._last_file > FILE_EVERY_SECONDS:
            self._write()

    def _write(self) -> None:
        self._last_file = time.monotonic()
        since, begun = self._first or (self._start, 0)
        rate = (self.done - begun) / max(self._last_file - since, 1e-9)
        left = round((self.total - self.done) / rate, 1) if rate > 0 else None
        write_json(self._path, {"label": self.label, "done": self.done, "total": self.total, "left_seconds": left})

    def fraction(self, done: int, total: int) -> None:
        """Set the count from `done` of `total` equal parts."""
        self.update(round(self.total * done / total))
