"""Starting or joining Ray, quietly. The only place that calls `ray.init`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from translora.config import ResourceConfig
from translora.errors import InputError
from translora.run.faults import RunFailedError
from translora.run.log import quiet_environment
from translora.run.signals import TERMINATED, exit_code, unwind_on_sigterm

logger = logging.getLogger(__name__)

RAY_PROCESSES = ("gcs_server", "raylet")
BROKEN = 3
"""Exit code: the cluster failed."""
WATCH_SECONDS = 2.0
HEAD_SECONDS = 10.0
"""That a cluster's head node may take to answer."""
# Ray 2.60 logs "has constructor arguments in the object store" as an error whenever Ray Data starts an actor
# (ray #53727); its C++ log has no finer switch than the level. Failures reach the driver as exceptions all the same.
_CORE_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
_CORE_LOG_NOTICE = b"Set ray log level from environment variable"


def start_ray(*, address: str | None = None, on_gpu: bool = False, verbose: bool = False) -> bool:
    """Join the cluster at `address`, or start a local one; call `setup_logging` first.

    Args:
        address: as in `ray.init`.
        on_gpu: the workers get GPUs.
        verbose: let Ray speak.

    Returns:
        Whether a local Ray was started, which cannot grow.
    """
    import ray

    if ray.is_initialized():
        return False
    from ray._private.services import canonicalize_bootstrap_address  # no public name (ray 2.60)

    # RAY_ADDRESS first, then `address`, then a cluster that `ray start` left on this machine; None is a new local one.
    try:
        found = canonicalize_bootstrap_address(address)
    except ValueError as error:
        given = os.environ.get("RAY_ADDRESS") or address
        raise InputError(f"{given}: no address of a Ray cluster ({error}); give HOST:PORT, or auto") from error
    if found is not None:
        left_over = "resources.ray_address" if address else "what `ray start` left here (`ray stop` removes it)"
        wait_for_head(found, "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else left_over)
    arguments = ray_arguments(address=found, on_gpu=on_gpu, verbose=verbose)
    if verbose or _CORE_LOG_LEVEL in os.environ:
        ray.init(**arguments)
    else:
        # putenv reaches the C++ core of this process, but not os.environ, from which Ray starts its daemons: those
        # keep reporting, a worker killed for want of memory among other things.
        os.putenv(_CORE_LOG_LEVEL, "fatal")
        with _without_notice():
            ray.init(**arguments)
    unwind_on_sigterm()
    if found is None:
        threading.Thread(target=_end_with_ray, daemon=True).start()
    return found is None


def wait_for_head(address: str, setting: str) -> None:
    """Wait until something answers at a cluster's address; `ray.init` would try for a quarter of an hour, silently.

    Args:
        address: HOST:PORT of the head node; URLs (ray://) are left to Ray.
        setting: where the address is from.

    Raises:
        RunFailedError: nothing does within `HEAD_SECONDS`.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():
        return
    deadline = time.monotonic() + HEAD_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() + WATCH_SECONDS > deadline:
                raise RunFailedError(
                    f"{address}: no Ray cluster answers there ({error.strerror or error}); start its head node, or "
                    f"correct {setting}"
                ) from error
            logger.warning("%s: no Ray cluster answers there yet (%s)", address, error.strerror or error)
            time.sleep(WATCH_SECONDS)


def _end_with_ray() -> None:
    """End this process with an exit code of its own when the local Ray that it started has died.

    Ray's core would end it after a minute without a word, and with 1, the code for adapters that failed (ray 2.60). Not
    by unwinding: with its GCS server or raylet gone, Ray's own shutdown can wait for ever. Every file is replaced as a
    whole, so nothing is lost.
    """
    import ray
    from ray._private import worker  # no public name (ray 2.60)

    while ray.is_initialized():
        node = worker._global_node
        dead = [] if node is None else [name for name, _ in node.dead_processes() if name in RAY_PROCESSES]
        if dead and exit_code() == TERMINATED:
            return  # the signal went to all processes; the main thread ends with its code
        if dead and ray.is_initialized():
            sys.stderr.write(f"translora: Ray's {dead[0]} died; what is finished is kept, the same command continues\n")
            sys.stderr.flush()
            os._exit(BROKEN)
        time.sleep(WATCH_SECONDS)


def check_resources(resources: ResourceConfig, num_workers: int, *, may_grow: bool = False) -> None:
    """Refuse settings that would wait for ever on the machines there are; on a cluster, which may grow, only warn.

    Raises:
        InputError: names the setting to lower.
    """
    import ray

    has, machines = ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    actors, messages = "resources.num_actors x resources.", []
    for setting, kind, amount in (
        ("resources.gpus_per_actor", "GPU", resources.gpus_per_actor),
        ("resources.cpus_per_actor", "CPU", resources.cpus_per_actor),
    ):
        if amount > (largest := max((machine.get(kind, 0) for machine in machines), default=0)):
            messages.append(f"{setting} is {amount:g}, and no machine has more than {largest:g} {kind}s; lower it")
    for setting, kind, amount in (
        (f"{actors}gpus_per_actor", "GPU", resources.num_actors * resources.gpus_per_actor),
        (f"{actors}cpus_per_actor", "CPU", resources.num_actors * resources.cpus_per_actor),
        ("num_workers (of distill or train)", "GPU" if resources.gpus_per_actor > 0 else "CPU", num_workers),
    ):
        if amount > has.get(kind, 0):
            messages.append(
                f"{setting} asks for {amount:g} {kind}s, Ray has {has.get(kind, 0):g}; lower it or add nodes"
            )
    for message in messages:
        if not may_grow:
            raise InputError(message)
        logger.warning(message)


def ray_arguments(*, address: str | None = None, on_gpu: bool = False, verbose: bool = False) -> dict[str, Any]:
    """Keyword arguments for `ray.init`: the cluster or a new local Ray, the workers' environment, quiet logs."""
    environment = quiet_environment(verbose=verbose, on_gpu=on_gpu)
    arguments: dict[str, Any] = {"logging_level": "INFO" if verbose else "WARNING"}
    if address is not None:
        arguments["address"] = address
    else:
        # Ray Train asks the state API for its controller and finds the API by searching this machine; with two Ray
        # instances on it that search fails. So the port is chosen here and told to the workers.
        port = _free_port()
        arguments |= {"address": "local", "dashboard_port": port}
        environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    arguments["runtime_env"] = {"env_vars": environment}
    return arguments


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _without_notice() -> Iterator[None]:
    """Hold back what is written to stderr, C++ included, and release it without Ray's note on its log level."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if _CORE_LOG_NOTICE not in line:
                    os.write(2, line)
