import pytest

from translora.config import ResourceConfig
from translora.run.cluster import check_resources


def test_settings_that_would_wait_for_ever_are_refused(ray_cluster: None) -> None:
    import ray

    has = ray.cluster_resources()["CPU"]
    check_resources(ResourceConfig(), num_workers=1)
    with pytest.raises(ValueError, match=r"cpus_per_actor asks for .* CPUs, Ray has .*; lower it"):
        check_resources(ResourceConfig(cpus_per_actor=has + 1), num_workers=1)
    with pytest.raises(ValueError, match=r"num_workers \(of distill or train\) asks for"):
        check_resources(ResourceConfig(), num_workers=int(has) + 1)
    with pytest.raises(ValueError, match=r"gpus_per_actor asks for 64 GPUs"):
        check_resources(ResourceConfig(gpus_per_actor=64), num_workers=1)
