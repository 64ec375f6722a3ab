"""launch/ and ray_cluster.yaml: read by Ray's own loader, and of one mind with the constraints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = (ROOT / "ray_cluster.yaml", ROOT / "launch" / "ray_cluster.aws.yaml")


def loaded(path: Path) -> dict[str, Any]:
    """The file as `ray up` sees it: defaults filled in, checked against the schema; no cloud is asked."""
    from ray.autoscaler._private.util import prepare_config, validate_config  # what `ray up` calls (ray 2.60)

    config: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return config


def start_commands(config: dict[str, Any]) -> list[str]:
    lines = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [line for line in lines if "ray start" in line]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_ray_accepts_the_cluster_file_and_every_node_starts_with_token_and_file_limit(path: Path) -> None:
    config = loaded(path)
    head, worker = start_commands(config)
    assert "--head" in head and "--dashboard-host=127.0.0.1" in head and "--address=$RAY_HEAD_IP:6379" in worker
    for command in (head, worker):
        assert re.search(r"\bRAY_AUTH_MODE=token\b.* ray start", command)
        (limit,) = re.findall(r"ulimit -n (\d+)", command)
        assert int(limit) >= 65535
    (token,) = (remote for remote, local in config["file_mounts"].items() if local == "~/.ray/auth_token")
    assert token.endswith("/.ray/auth_token")
    assert "chmod 600 ~/.ray/auth_token" in config["head_setup_commands"]
    assert "chmod 600 ~/.ray/auth_token" in config["worker_setup_commands"]


def test_one_file_is_for_machines_of_ones_own_and_one_for_a_cloud() -> None:
    local, cloud = map(loaded, CLUSTERS)
    assert local["provider"]["type"] == "local" and local["max_workers"] == len(local["provider"]["worker_ips"])
    assert cloud["provider"]["type"] == "aws" and cloud["max_workers"] == 8
    assert cloud["available_node_types"][cloud["head_node_type"]]["resources"] == {"CPU": 0}
    # The head takes no actor at home either, where Ray counts the cores itself.
    assert "--num-cpus=0" in start_commands(local)[0]


def test_a_mistake_in_a_cluster_file_is_found_by_the_schema(tmp_path: Path) -> None:
    config = yaml.safe_load(CLUSTERS[1].read_text())
    config["available_node_types"]["gpu"]["max_worker"] = 8
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        loaded(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_the_cluster_files_and_the_constraints_name_the_same_versions(path: Path) -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    (ray,) = re.findall(r"^ray==(\S+)$", constraints, re.MULTILINE)
    (python,) = re.findall(r"\(Python (\d\.\d+)", constraints)
    text = path.read_text()
    assert set(re.findall(r"\bray(?:\[[a-z,]+\]==| )(\d+\.\d+\.\d+)", text)) == {ray}
    assert set(re.findall(r"\bpython ?(\d\.\d+)", text)) == {python}


def test_a_node_with_other_versions_is_refused_at_its_set_up() -> None:
    import ray

    _, check = loaded(CLUSTERS[0])["setup_commands"]
    check = check.replace("/shared/translora/.venv/bin/python", sys.executable)
    here = f"ray {ray.__version__}, python {sys.version_info.major}.{sys.version_info.minor}"
    for wanted, code in ((here, 0), ("ray 2.59.0, python 3.11", 1)):
        command = check.replace("ray 2.60.0, python 3.11", wanted)
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert f"{here}; this cluster is made for ray 2.59.0, python 3.11" in done.stderr


def test_launchers_keep_secrets_off_command_lines_and_install_nothing() -> None:
    for path in (ROOT / "launch" / "submit.sh", ROOT / "launch" / "migrate.sbatch"):
        text = path.read_text()
        assert "export RAY_AUTH_MODE=token" in text
        assert not re.search(r"RAY_AUTH_TOKEN=|pkill|killall|\bpip\b|\bsleep\b", text)
        subprocess.run(["bash", "-n", path], check=True)
