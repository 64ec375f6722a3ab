from collections.abc import Iterator

import pytest

from translora.run.log import setup_logging


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A real local Ray for the tests of a module that start no process of their own; none is left for the others."""
    setup_logging()
    import ray

    from translora.run.cluster import ray_arguments

    ray.init(**ray_arguments(), num_cpus=3)  # one test trains on three workers, whatever the machine has
    yield
    ray.shutdown()
