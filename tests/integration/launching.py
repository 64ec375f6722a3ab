"""What the launchers' tests share: a small fleet, the environment of a user's shell, waiting with a limit."""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.world import ROOT, World, environment, make_trained_base, sentence, train_settings
from tests.tiny import make_bundle
from translora.config import OPEN_GATE
from translora.run.state import load_states

NAMES = ("orders", "returns")


def make_fleet_world(root: Path) -> World:
    """Two bases that write lists and answer; bundles with almost no adapter: launching is tested, not learning."""
    source, target = root / "source", root / "target"
    world = World(root, make_trained_base(source, "llama", 1), make_trained_base(target, "gemma3", 2))
    rng = random.Random(0)
    for seed, name in enumerate(NAMES):
        seeds = [sentence(rng) for _ in range(5)]
        make_bundle(root / "bundles" / name, world.source, name, seed, seeds=seeds, num_samples=8, scale=0.01)
    return world


def fleet(world: World, name: str, **sections: Any) -> Path:
    """A fleet file whose adapters pass every gate; runs below `runs/NAME`."""
    config = world.fleet_config(name) | {
        "adapters": [{"bundle": f"bundles/{name}"} for name in NAMES],
        "distill": train_settings() | {"epochs": 6, "num_workers": 1},
        "gate": {**OPEN_GATE, "min_holdout": 2},
    }
    config["synthesis"] |= {"screen": "none"}
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    return world.write(f"{name}.yaml", config)


def statuses(world: World, name: str) -> dict[str, str]:
    return {state.name: state.status for state in load_states(world.root / "runs" / name)}


def user_environment(**more: str) -> dict[str, str]:
    """A shell in which the project's environment is activated."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return environment() | {"PATH": path, "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(done: Callable[[], object], what: str, seconds: float, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(every)
