"""A fleet on several nodes, which are killed in the middle and replaced."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from tests.integration.launching import NAMES, fleet, free_port, statuses, user_environment, wait_until
from tests.integration.world import ROOT, World, command

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without CPUs, as on a real cluster, and two nodes with one each; all are processes of this machine."""
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def test_a_fleet_outlives_the_loss_of_a_node_in_synthesis_and_of_one_in_distillation(
    fleet_world: World, nodes: Cluster
) -> None:
    # Two actors and two training workers on nodes of one CPU: there is one on each node.
    resources = {"num_actors": 2, "ray_address": nodes.address}
    config = fleet(fleet_world, "nodes", resources=resources, distill={"num_workers": 2, "epochs": 12})
    run, log = fleet_world.root / "runs" / "nodes", fleet_world.root / "nodes.log"
    with open(log, "w") as stream:
        driver = subprocess.Popen(
            command("migrate", config), cwd=ROOT, env=user_environment(), stdout=stream, stderr=stream
        )
        for pattern in ("rounds/*/*.parquet", "gangs/*/gang-*.safetensors"):
            wait_until(lambda p=pattern: driver.poll() is not None or list(run.glob(p)), pattern, 300)
            assert driver.poll() is None, log.read_text()
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            nodes.add_node(num_cpus=1)
        code = driver.wait(timeout=400)
    assert code == 0, log.read_text()
    assert statuses(fleet_world, "nodes") == dict.fromkeys(NAMES, "migrated")
