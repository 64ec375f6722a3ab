"""Run directories that cannot be used: of something else, of another run, damaged, or at work."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs.workshop import Bench, Case
from translora.config import FleetConfig
from translora.errors import InputError
from translora.run.lease import hold
from translora.run.rundir import open_run
from translora.run.state import AdapterState, load_states, save_state


def config(bench: Bench, **changes: object) -> FleetConfig:
    raw = {
        "run_dir": bench.directory / "run",
        "source": {"model": "old"},
        "target": {"model": "new"},
        "adapters": [{"bundle": "x"}],
    }
    return FleetConfig.model_validate(raw | changes)


def opened(bench: Bench, **changes: object) -> None:
    """Open the run directory as a migration does."""
    settings = config(bench, **changes)
    with open_run(settings.run_dir, settings):
        pass


def after(prepare: Callable[[Bench], object], **changes: object) -> Callable[[Bench], object]:
    """Put something there, then open the run."""

    def act(bench: Bench) -> None:
        prepare(bench)
        opened(bench, **changes)

    return act


def with_work(bench: Bench) -> None:
    opened(bench)
    (bench.directory / "run" / "rounds").mkdir()


def of_prepare(bench: Bench) -> None:
    """The run of another command."""
    (bench.directory / "run").mkdir()
    bench.file("run/config.json", '{"run_dir": "run", "output_dir": "bundles", "tasks": []}')


def at_work(bench: Bench) -> None:
    opened(bench)
    with hold(bench.directory / "run" / "lock"):
        try:
            opened(bench)
        except InputError as error:  # who it is and when differs from time to time
            raise InputError(
                re.sub(r"pid \d+ on .* ago", "pid 4711 on node-7, sign of life 3 s ago", str(error))
            ) from error


def foreign(bench: Bench) -> None:
    (bench.directory / "run").mkdir()
    bench.file("run/thesis.tex", "keep me")


def damaged(name: str, content: str) -> Callable[[Bench], object]:
    """A run in which a file was damaged."""

    def act(bench: Bench) -> None:
        with_work(bench)
        bench.file(f"run/{name}", content)

    return act


def shown(prepare: Callable[[Bench], object]) -> Callable[[Bench], object]:
    """Put something there, then ask for its states, as `status` and `report` do."""

    def act(bench: Bench) -> AdapterState:
        prepare(bench)
        (state,) = load_states(bench.directory / "run")
        return state

    return act


def state_of(content: str) -> Callable[[Bench], object]:
    """A run with one adapter, whose state is this."""

    def act(bench: Bench) -> None:
        opened(bench)
        save_state(bench.directory / "run", AdapterState(name="orders", bundle="orders"))
        bench.file("run/adapters/orders/state.json", content)

    return act


CASES = [
    Case("a run directory that is a file", after(lambda bench: bench.file("run", "")), "give a directory that you can"),
    Case("a run directory below a file", lambda bench: opened(
        bench, run_dir=bench.file("notes", "") / "run"), "cannot be used as run_dir"),
    Case("a run directory that holds something else", after(foreign), "is not empty and no run directory"),
    Case("the run directory of a prepare", after(of_prepare), "is the run of `translora prepare`; give another"),
    Case("a run that another process works on", at_work, "another process works on this run"),
    Case("a run of other settings", after(
        with_work, seed=1), "was made with other settings (seed 0 -> 1); set it back, or give another run_dir"),
    Case("a run of another base", after(
        with_work, target={"model": "newer"}), "target.model 'new' -> 'newer'"),
    Case("a run whose config is damaged", after(damaged("config.json", '{"run_dir": ')), "config.json: not readable"),
    Case("the status of no run", shown(lambda bench: None), "not a run directory (no config.json)"),
    Case("the status of a damaged run", shown(damaged("config.json", "{")), "config.json: cannot be read"),
    Case("the status of an evaluation", shown(
        damaged("config.json", '{"arms": {}, "output": "results.md"}')), "the run of a `translora evaluate`"),
    Case("the status of a prepare run", shown(
        damaged("config.json", '{"tasks": [], "output_dir": "bundles"}')), "the run of a `translora prepare`"),
    Case("a state that was cut short", shown(state_of('{"name": "orders", "bun')), "state.json: truncated, damaged"),
    Case("a state of a newer version", shown(
        state_of('{"name": "orders", "bundle": "x", "of_the_future": 1}')), "or of another version of translora"),
    Case("an adapter whose state is damaged", lambda bench: bench.migrate(
        _after_damage(bench)), "delete it: the adapter is migrated anew"),
]  # fmt: skip


def _after_damage(bench: Bench) -> Path:
    run = bench.directory / "run" / "adapters" / "orders"
    run.mkdir(parents=True)
    bench.file("run/adapters/orders/state.json", "{")
    bench.file("run/config.json", '{"run_dir": "run"}')
    os.utime(bench.file("run/lock", ""), (0, 0))  # of a driver that gave no sign of life for long
    return bench.bundle()
