"""launch/submit.sh against a real Ray cluster that wants a token."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from tests.integration.launching import (
    NAMES,
    fleet,
    free_port,
    statuses,
    user_environment,
    wait_until,
)
from tests.integration.world import ROOT, World

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Head:
    """A running `ray start --head`."""

    url: str
    token: Path

    def submit(self, config: Path, token: Path | None) -> subprocess.CompletedProcess[str]:
        own = {"RAY_AUTH_TOKEN_PATH": str(token)} if token else {"HOME": str(self.token.parent)}
        return subprocess.run(
            [ROOT / "launch" / "submit.sh", config],
            env=user_environment(RAY_API_SERVER_ADDRESS=self.url, **own),
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text("d41d8cd98f00b204e9800998ecf8427e")
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets have 107 characters
    port = free_port()
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    command += [f"--port={free_port()}", f"--ray-client-server-port={free_port()}", f"--temp-dir={temporary}"]
    command += [f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"]
    no_drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # idle actors of a finished job would be waited for
    ray = subprocess.Popen(
        command,
        env=user_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), **no_drain),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    head = Head(f"http://127.0.0.1:{port}", token)

    def answers() -> bool:
        assert ray.poll() is None, "ray start has ended"
        try:
            return requests.get(f"{head.url}/api/version", timeout=5).status_code in (200, 401)
        except requests.ConnectionError:
            return False

    try:
        wait_until(answers, "the dashboard answers", 60)
        yield head
    finally:
        family = psutil.Process(ray.pid).children(recursive=True)
        ray.terminate()  # it ends all that it has started
        ray.wait(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=30)
        shutil.rmtree(temporary, ignore_errors=True)
    assert not alive, f"orphans: {alive}"


def test_a_fleet_is_migrated_by_a_job(fleet_world: World, head: Head) -> None:
    done = head.submit(fleet(fleet_world, "submitted", resources={"num_actors": 1}), head.token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(NAMES)} of {len(NAMES)} migrated" in done.stdout, "translora's own words come through"
    assert statuses(fleet_world, "submitted") == dict.fromkeys(NAMES, "migrated")


def test_the_exit_code_is_the_one_of_the_job(fleet_world: World, head: Head) -> None:
    done = head.submit(fleet(fleet_world, "unusable", distill={"num_workers": 0}), head.token)
    assert done.returncode == 2 and "num_workers" in done.stdout, done.stdout + done.stderr
    missing = head.submit(fleet_world.root / "missing.yaml", head.token)
    assert missing.returncode == 2 and "missing.yaml: No such file" in missing.stderr


def test_who_has_no_token_or_another_one_is_refused(fleet_world: World, head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("00000000000000000000000000000000")
    config = fleet(fleet_world, "refused")
    for token in (wrong, None):
        done = head.submit(config, token)
        *_, last = done.stderr.strip().splitlines()
        assert done.returncode == 3 and ": not submitted: " in last and "uthentication" in last, done.stderr
        assert head.token.read_text() not in done.stdout + done.stderr
    assert requests.get(f"{head.url}/api/jobs/", timeout=10).status_code == 401
    assert not (fleet_world.root / "runs" / "refused").exists()
