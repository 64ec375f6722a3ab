from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from translora.run.log import setup_logging

if TYPE_CHECKING:
    from tests.integration.world import World

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Ray joins a cluster that it finds in its folder for temporary files: the other test process's is not to be found.
    folder = Path(f"/tmp/ray-{worker}-{os.getuid()}")  # short: Ray's sockets have 107 characters
    folder.mkdir(exist_ok=True)
    os.environ["RAY_TMPDIR"] = str(folder)


@pytest.fixture(scope="session", autouse=True)
def trained_bases(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One folder for the bases that the test processes of this run train."""
    from tests.integration.world import BASES

    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "bases"
    folder.mkdir(exist_ok=True)
    os.environ[BASES] = str(folder)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A real local Ray for the tests of a module that start no process of their own; none is left for the others."""
    setup_logging()
    import ray

    from translora.run.cluster import ray_arguments

    ray.init(**ray_arguments(), num_cpus=3)  # one test trains on three workers, whatever the machine has
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def fleet_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Bases and bundles for the tests of the launchers; each test has run directories of its own in it."""
    from tests.integration.launching import make_fleet_world

    return make_fleet_world(tmp_path_factory.mktemp("fleet"))
