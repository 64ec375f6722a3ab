"""A real Slurm of one machine: munged, slurmctld and slurmd in a process namespace of their own.

The namespace keeps the launcher's `ray stop` away from every other Ray on this machine, and when it ends, nothing that
was started in it is left.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.integration.launching import free_port, user_environment, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
PROCESSES = """\
export PATH="$PATH:/usr/sbin" SLURM_CONF="$1/slurm.conf"
munged --foreground --force --key-file="$1/munge.key" --socket="$1/munge.socket" --pid-file="$1/munged.pid" \\
  --log-file="$1/munged.log" --seed-file="$1/munged.seed" &
slurmctld -D & slurmd -D &
wait
"""
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP
"""


def why_not() -> str | None:
    """Why there can be no Slurm here; None if there can be one."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [program for program in PROGRAMS if shutil.which(program, path=path) is None]:
        return f"no {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    if subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True).returncode:
        return "process namespaces are not allowed here"
    return None


@dataclass(frozen=True)
class Slurm:
    """Its commands, run in a user's environment; the user's home is `root`."""

    root: Path

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.root,
            env=user_environment(
                SLURM_CONF=str(self.root / "slurm.conf"),
                HOME=str(self.root),
                RAY_PORT=str(free_port()),
                RAY_TMPDIR=f"{self.root.parent}/r",
            ),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *command: str | Path) -> str:
        """The job's number."""
        return self.run("sbatch", "--parsable", *command).strip()

    def job(self, job: str) -> dict[str, str]:
        """JobState, Restarts, ExitCode and so on."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextlib.contextmanager
def running_slurm(root: Path) -> Iterator[Slurm]:
    for directory in ("state", "spool"):
        (root / directory).mkdir(parents=True)
    (root / "munge.key").write_bytes(secrets.token_bytes(128))
    (root / "munge.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    ports = {"controller_port": free_port(), "node_port": free_port()}
    (root / "slurm.conf").write_text(CONFIG.format(root=root, host=host, cpus=os.cpu_count(), **ports))
    with open(root / "daemons.log", "w") as log:
        daemons = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", PROCESSES, "-", str(root)],
            stdout=log,
            stderr=log,
        )
    slurm = Slurm(root)
    try:
        wait_until((root / "munge.socket").exists, "munged listens", 20)
        wait_until(lambda: _stands(slurm, daemons), "the node is idle", 30)
        yield slurm
    finally:
        daemons.kill()  # and with it, by --kill-child, the namespace's first process and all the others
        daemons.wait()
    wait_until(lambda: not _left(root), "every process of the namespace has ended", 20, every=0.5)


def _left(root: Path) -> list[str]:
    """Command lines on this machine that name a file below `root`."""
    lines = (" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(root) in line]


def _stands(slurm: Slurm, daemons: subprocess.Popen[bytes]) -> bool:
    assert daemons.poll() is None, (slurm.root / "daemons.log").read_text()
    try:
        return slurm.run("sinfo", "--noheader", "--format=%T").strip() == "idle"
    except AssertionError:  # the controller does not answer yet
        return False
