"""The small form of tests/chaos, and a disk that is full in the middle of a run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.chaos.__main__ import run
from tests.chaos.fleet import finished_files, leftovers, results, write_config
from tests.integration.world import ROOT, command, environment

pytestmark = pytest.mark.timeout(900)
NUM_ADAPTERS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


def test_a_fleet_survives_random_kills(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = run(root, NUM_ADAPTERS, num_kills=3, seed=1)
    shown = capsys.readouterr().out
    assert not faults, f"{faults}\n{shown}\n{(root / 'disturbed.log').read_text()[-4000:]}"
    assert f"{NUM_ADAPTERS} of {NUM_ADAPTERS} adapters done, {NUM_ADAPTERS} equal" in shown


@pytest.fixture
def small_disk(root: Path) -> Iterator[Path]:
    """A file system of its own, too small for a run; it needs the right to mount one."""
    disk = root / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_ends_in_one_line_and_the_same_command_continues(root: Path, small_disk: Path) -> None:
    config = write_config(root, "disk/run")
    once = yaml.safe_load(config.read_text())
    once["distill"]["max_failures"] = 0  # the disk stays full, however often the workers start again
    config.write_text(yaml.safe_dump(once))
    ends = []
    kept: dict[str, int] = {}
    for size in ("300k", "900k", "64m"):
        subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)
        done = subprocess.run(command("migrate", config), cwd=ROOT, env=environment(), capture_output=True, text=True)
        ends.append(done.returncode)
        now = finished_files(small_disk / "run")
        assert kept.items() <= now.items(), "nothing that was finished is lost or written again"
        kept = now
        if done.returncode in (0, 1):
            break
        assert done.returncode == 3
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("translora: "))
        assert "No space left on device" in line and line.endswith("the same command continues")
        assert not list((small_disk / "run").rglob(".tmp-*"))
    assert len(ends) > 1, "the first disk was large enough"
    assert results(small_disk / "run").keys() == results(root / "undisturbed").keys()
    assert results(small_disk / "run") == results(root / "undisturbed")
    assert not leftovers(small_disk / "run")
    shutil.rmtree(small_disk / "run")
