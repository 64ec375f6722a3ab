"""launch/migrate.sbatch and the nightly line on a real Slurm of this one machine."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.launching import NAMES, fleet, statuses, wait_until
from tests.integration.slurm import Slurm, running_slurm, why_not
from tests.integration.world import ROOT, World

pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(why_not() is not None, reason=f"no Slurm: {why_not()}")]
LAUNCH = ROOT / "launch"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with (
        tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp", ignore_cleanup_errors=True) as root,
        running_slurm(Path(root) / "s") as slurm,
    ):
        yield slurm


def log_of(slurm: Slurm, job: str) -> str:
    path = slurm.root / f"slurm-{job}.out"
    return path.read_text() if path.is_file() else ""


def finish(slurm: Slurm, job: str, seconds: float) -> dict[str, str]:
    """Wait for the job's last state."""
    active = ("PENDING", "RUNNING", "COMPLETING")
    wait_until(lambda: slurm.job(job)["JobState"] not in active, f"job {job} ends", seconds, every=0.5)
    return slurm.job(job)


def test_a_preempted_job_is_queued_again_and_finishes_and_the_night_after_has_nothing_to_do(
    fleet_world: World, slurm: Slurm
) -> None:
    run = fleet_world.root / "runs" / "preempted"
    job = slurm.submit(LAUNCH / "migrate.sbatch", fleet(fleet_world, "preempted"))

    # The warning of --signal=B:TERM, in the middle of the synthesis: translora ends, the script asks for more time.
    wait_until(lambda: list(run.glob("rounds/*/*.parquet")), "blocks of the synthesis", 120)
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", "queued again", 90, every=0.5)
    assert "translora: terminated; what is finished is kept" in log_of(slurm, job)
    kept = {path: path.stat().st_mtime_ns for path in run.glob("rounds/*/*.parquet")}

    # A preemption, in the middle of the distillation: Slurm ends all processes and queues the job again.
    wait_until(lambda: list(run.glob("gangs/*/gang-*.safetensors")), "a checkpoint", 400)
    slurm.run("scontrol", "requeue", job)

    assert (end := finish(slurm, job, 300))["JobState"] == "COMPLETED", log_of(slurm, job)
    assert (end["Restarts"], end["ExitCode"]) == ("2", "0:0")
    assert statuses(fleet_world, "preempted") == dict.fromkeys(NAMES, "migrated")
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items()), "nothing was computed twice"
    token = slurm.root / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0 and token.read_text() not in log_of(slurm, job)

    night = nightly(slurm, fleet_world.root / "preempted.yaml")
    assert finish(slurm, night, 400)["JobState"] == "COMPLETED"
    assert f"{len(NAMES)} of {len(NAMES)} migrated" in (log := (slurm.root / "shared" / "nightly.log").read_text())
    assert "generate" not in log and "training" not in log


def nightly(slurm: Slurm, config: Path) -> str:
    """Run the command of launch/nightly.crontab as cron does; returns its job."""
    (line,) = (line for line in (LAUNCH / "nightly.crontab").read_text().splitlines() if not line.startswith("#"))
    found = re.fullmatch(r"15 1 \* \* \* (.+)", line)
    assert found is not None
    shared = slurm.root / "shared"
    (shared / ".venv" / "bin").mkdir(parents=True)
    (shared / ".venv" / "bin" / "activate").touch()  # the test's environment is active
    (shared / "launch").symlink_to(LAUNCH)
    command = found[1].replace("/shared/translora", str(shared)).replace("/shared/fleets/nightly.yaml", str(config))
    said = slurm.run("sh", "-c", command.replace("--nodes=4", "--nodes=1"))
    return said.split()[-1]


def test_each_task_of_an_array_takes_its_own_fleet_and_ends_with_its_exit_code(
    fleet_world: World, slurm: Slurm
) -> None:
    bad = fleet(fleet_world, "bad", distill={"num_workers": 0})
    worse = fleet(fleet_world, "worse", gate={"retries": -1})
    job = slurm.submit("--array=0-1", LAUNCH / "migrate.sbatch", bad, worse)
    for task, word in (("0", "num_workers"), ("1", "retries")):
        end = finish(slurm, f"{job}_{task}", 400)
        assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
        assert word in log_of(slurm, f"{job}_{task}")
    done = subprocess.run(["bash", LAUNCH / "migrate.sbatch"], capture_output=True, text=True)
    assert done.returncode == 1 and "usage: sbatch" in done.stderr
