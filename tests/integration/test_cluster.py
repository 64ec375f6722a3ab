import subprocess
import sys

import pytest

from translora.config import ResourceConfig
from translora.run.cluster import check_resources


def test_settings_that_would_wait_for_ever_are_refused(ray_cluster: None) -> None:
    import ray

    has = ray.cluster_resources()["CPU"]
    check_resources(ResourceConfig(), num_workers=1)
    with pytest.raises(ValueError, match=r"cpus_per_actor is .*, and no machine has more than .* CPUs.*; lower it"):
        check_resources(ResourceConfig(cpus_per_actor=has + 1), num_workers=1)
    with pytest.raises(ValueError, match=r"cpus_per_actor asks for .* CPUs, Ray has .*; lower it"):
        check_resources(ResourceConfig(num_actors=int(has) + 1, cpus_per_actor=1), num_workers=1)
    with pytest.raises(ValueError, match=r"num_workers \(of distill or train\) asks for"):
        check_resources(ResourceConfig(), num_workers=int(has) + 1)
    with pytest.raises(ValueError, match=r"gpus_per_actor is 64, and no machine has more than \d+ GPUs"):
        check_resources(ResourceConfig(gpus_per_actor=64), num_workers=1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_driver_whose_local_ray_died_ends_with_the_code_that_asks_for_a_restart(name: str) -> None:
    script = (
        "import psutil, time\n"
        "from translora.run.log import setup_logging\n"
        "setup_logging()\n"
        "from translora.run.cluster import start_ray\n"
        "start_ray()\n"
        f"[one.kill() for one in psutil.Process().children(recursive=True) if one.name() == {name!r}]\n"
        "time.sleep(100)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 3, done.stderr
    assert f"translora: Ray's {name} died; what is finished is kept, the same command continues" in done.stderr
