"""The actors that hold bases: they outlive the datasets whose blocks they compute."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import ray.data
import ray.exceptions

from translora.actors.calls import RETRY_SECONDS, STANDING_SECONDS
from translora.config import ResourceConfig

logger = logging.getLogger(__name__)
WAIT_SECONDS = 30.0
"""How long the first host that is ready waits for the others; those that come later join at the next stage."""
SILENT_SECONDS = 120.0
"""How long the first one may take before the log says what is waited for."""


class Hosts:
    """Actors of the cluster that each hold bases; started when first needed, ended with the `with` block.

    Args:
        resources: number and size of the actors.
        run_dir: where their finished blocks and their progress lie.
        batch_size: rows of a block.
    """

    def __init__(self, resources: ResourceConfig, run_dir: Path, batch_size: int) -> None:
        self.resources, self.run_dir, self.batch_size = resources, run_dir, batch_size
        self._actors: list[Any] = []
        self._standing: list[Any] = []
        """Those that have had room on the cluster."""

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            if (
                kind is None and self._standing
            ):  # what an engine has beside its actor, processes and files, would outlive it
                ray.get([actor.close.remote() for actor in self._standing], timeout=WAIT_SECONDS)
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self._actors.clear()
        self._standing.clear()

    def get(self, most: int) -> list[Any]:
        """Handles of the hosts that stand, `most` of them at most; waits for the first."""
        from translora.actors.host import EngineHost

        resources = self.resources
        on_cpu = resources.gpus_per_actor == 0
        remote = ray.remote(EngineHost).options(
            num_gpus=resources.gpus_per_actor,
            num_cpus=resources.cpus_per_actor,
            max_restarts=-1,  # what ends an actor again and again is looked for in its rows, see calls
        )
        wanted = min(resources.num_actors, most)
        while len(self._actors) < wanted:
            num_threads = max(1, int(resources.cpus_per_actor)) if on_cpu else None
            self._actors.append(
                remote.remote(num_threads, hosts_of_a_machine(resources), resources.worker_timeout_seconds)
            )
        deadline = None  # from the first death on: a cluster may take long to make room
        while True:
            asked = {actor.ready.remote(): actor for actor in self._actors[:wanted]}
            while not ray.wait(list(asked), num_returns=1, timeout=SILENT_SECONDS)[0]:
                logger.warning(
                    "no actor stands yet: each asks for %g GPUs and %g CPUs of one machine; none has them free, or the "
                    "first actor still starts",
                    resources.gpus_per_actor,
                    resources.cpus_per_actor,
                )
            ready, waiting = ray.wait(list(asked), num_returns=wanted, timeout=WAIT_SECONDS)
            standing, fault = [], None
            for reference in ready:
                try:
                    ray.get(reference)
                    standing.append(asked[reference])
                except ray.exceptions.RayActorError as error:  # it died a moment ago and starts again
                    fault = error
            if standing:
                break
            deadline = deadline or time.monotonic() + STANDING_SECONDS
            if time.monotonic() > deadline and fault is not None:
                raise fault
            time.sleep(RETRY_SECONDS)
        if waiting:
            logger.warning("%d of %d actors stand, the cluster has no room for the others yet", len(standing), wanted)
        self._standing += [actor for actor in standing if actor not in self._standing]
        return standing


def hosts_of_a_machine(resources: ResourceConfig) -> int:
    """The most actors that one machine of the cluster has CPUs for, and so may have to share its memory."""
    cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    room = int(max(cpus, default=0.0) // resources.cpus_per_actor)
    return min(resources.num_actors, room) or resources.num_actors
