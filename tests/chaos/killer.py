"""Runs `translora migrate` again and again while processes of it are killed at random."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.fleet import Progress, finished_files, progress
from tests.integration.world import ROOT, command, environment
from translora.run.state import load_states

MARK = "TRANSLORA_CHAOS_RUN"
"""Environment variable by which every process of a run is known, whoever its parent is by now."""
KINDS = {"driver": 0.25, "raylet": 0.15, "gcs_server": 0.1, "worker": 0.5}
AT_START = 0.2
"""Share of the kills that do not wait for progress."""
STALL_SECONDS = 300.0
LAST_SHARE = 0.85
"""Of the run: no kill is planned beyond, so that all of them find something to kill."""


class ChaosError(AssertionError):
    """The run did not survive."""


@dataclass
class Tally:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    rewritten: list[str] = field(default_factory=list)
    """Finished files that were written again."""
    seconds: float = 0.0


def start(config: Path, mark: str, log: Path) -> subprocess.Popen[bytes]:
    """Start the command in a session of its own, its output appended to `log`."""
    with open(log, "ab") as handle:
        return subprocess.Popen(
            command("migrate", config),
            cwd=ROOT,
            env=environment() | {MARK: mark},
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def processes(mark: str) -> list[psutil.Process]:
    """Every living process that was started with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kind_of(process: psutil.Process, driver: int) -> str:
    """driver, raylet, gcs_server, worker (an actor or a task), or other (Ray's agents and monitors)."""
    if process.pid == driver:
        return "driver"
    name, title = process.name(), " ".join(process.cmdline()[:1])
    if name in ("raylet", "gcs_server"):
        return name
    agent = "Agent" in title or "Agent" in name
    return "worker" if title.startswith("ray::") and not agent else "other"


def kill_one(mark: str, driver: int, rng: random.Random, tally: Tally) -> str:
    """SIGKILL a process of a kind drawn at random, of those that there are; returns its kind."""
    by_kind: dict[str, list[psutil.Process]] = {}
    for process in processes(mark):
        with contextlib.suppress(psutil.Error):
            by_kind.setdefault(kind_of(process, driver), []).append(process)
    kinds = [kind for kind in KINDS if by_kind.get(kind)]
    kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
    victim = rng.choice(by_kind[kind])
    with contextlib.suppress(psutil.Error):
        tally.victims[" ".join(victim.cmdline()[:1]).rpartition("/")[2][:40] if kind == "worker" else kind] += 1
        os.kill(victim.pid, signal.SIGKILL)
    tally.kills[kind] += 1
    return kind


def undisturbed(config: Path, log: Path) -> float:
    """Run to the end; returns the wall seconds of the command."""
    begun = time.monotonic()
    mark = uuid.uuid4().hex
    driver = start(config, mark, log)
    code = driver.wait()
    seconds = time.monotonic() - begun
    if code not in (0, 1):
        raise ChaosError(f"the undisturbed run ended with {code}; see {log}")
    await_no_process(mark)
    return seconds


def disturbed(
    config: Path, run_dir: Path, whole: Progress, num_kills: int, seed: int, log: Path, say: Callable[[str], None]
) -> Tally:
    """Run with kills, starting the same command again after each end, until it is done.

    Raises:
        ChaosError: it hangs, ends with a code that asks for no restart, or leaves a process behind.
    """
    rng, tally, mark = random.Random(seed), Tally(), uuid.uuid4().hex
    due = sorted(rng.uniform(0, LAST_SHARE) for _ in range(num_kills))
    begun, known = time.monotonic(), dict[str, int]()
    while True:
        driver, started = start(config, mark, log), time.monotonic()
        tally.starts += 1
        seen, changed = progress(run_dir), started
        at_start = rng.uniform(0, 20) if rng.random() < AT_START else None
        moved_at: float | None = None
        while driver.poll() is None:
            time.sleep(0.1)
            now, state = time.monotonic(), progress(run_dir)
            if state != seen:
                seen, changed = state, now
                moved_at = moved_at or now + rng.uniform(0, 2)
            if now - changed > STALL_SECONDS:
                raise ChaosError(f"no progress for {STALL_SECONDS:.0f} s after {tally.kills}; see {log}")
            if tally.kills.total() == num_kills or state.share_of(whole) < due[tally.kills.total()]:
                continue
            ready = now - started > at_start if at_start is not None else moved_at is not None and now > moved_at
            if not ready:
                continue
            note_rewritten(run_dir, known, tally)
            kind = kill_one(mark, driver.pid, rng, tally)
            say(f"kill {tally.kills.total()}/{num_kills}: {kind} at {state.share_of(whole):.0%}, start {tally.starts}")
            moved_at, at_start = None, None
        tally.exits[driver.returncode] += 1
        # Ray's core ends a driver that has lost its GCS server with 1, which is our code for adapters that failed.
        if driver.returncode == 0 or (driver.returncode == 1 and is_done(run_dir)):
            break
        if driver.returncode == 2:
            raise ChaosError(f"the command says that its input cannot be used; see {log}")
    note_rewritten(run_dir, known, tally)
    tally.seconds = time.monotonic() - begun
    await_no_process(mark)
    return tally


def is_done(run_dir: Path) -> bool:
    """Whether every adapter has left its last phase."""
    return all(state.phase == "done" or state.status == "quarantined" for state in load_states(run_dir))


def note_rewritten(run_dir: Path, known: dict[str, int], tally: Tally) -> None:
    """Compare the finished files with those of the last look."""
    now = finished_files(run_dir)
    tally.rewritten += [name for name, written in known.items() if now.get(name) != written]
    known.clear()
    known |= now


def await_no_process(mark: str, seconds: float = 90.0) -> None:
    """Wait until every process of the run has ended by itself.

    Raises:
        ChaosError: one has not.
    """
    deadline = time.monotonic() + seconds
    while alive := processes(mark):
        if time.monotonic() > deadline:
            raise ChaosError(f"left behind: {[' '.join(process.cmdline()[:3]) for process in alive]}")
        time.sleep(0.5)
