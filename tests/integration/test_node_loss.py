"""A fleet on several nodes, one of which is killed in the middle."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from tests.integration.launching import NAMES, fleet, statuses, user_environment, wait_until
from tests.integration.world import ROOT, World, command

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without CPUs, as on a real cluster, and two nodes that work; all are processes of this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


@pytest.mark.parametrize("pattern", ["rounds/*/*.parquet", "gangs/*/gang-*.safetensors"], ids=["synthesis", "distill"])
def test_a_fleet_outlives_a_node(
    fleet_world: World, nodes: Cluster, pattern: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    config = fleet(fleet_world, name, resources={"num_actors": 2, "ray_address": nodes.address})
    run = fleet_world.root / "runs" / name
    with open(fleet_world.root / f"{name}.log", "w+") as log:
        driver = subprocess.Popen(command("migrate", config), cwd=ROOT, env=user_environment(), stdout=log, stderr=log)
        wait_until(lambda: driver.poll() is not None or list(run.glob(pattern)), pattern, 120)
        assert driver.poll() is None
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        code = driver.wait(timeout=240)
        log.seek(0)
        assert code == 0, log.read()
    assert statuses(fleet_world, name) == dict.fromkeys(NAMES, "migrated")
