"""One driver at a time: on this host by its process, from another host by its signs of life."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from translora.config import FleetConfig
from translora.run import lease
from translora.run.lease import LeaseLostError, Owner, await_end, hold, look
from translora.run.rundir import LOCK, check_free, open_run
from translora.run.signals import unwind_on_sigterm

FAR = Owner("node-7", "node-7 another-boot pid:[1]", 4711, 0.0, "a")


def write(path: Path, owner: Owner = FAR, age: float = 0.0) -> None:
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age, time.time() - age))


def hold_until(path: Path, held, leave) -> None:  # type: ignore[no-untyped-def]
    with hold(path):
        held.set()
        leave.wait(60)


def test_a_driver_of_another_host_is_looked_at_by_the_file_servers_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "lock")
    real = time.time
    monkeypatch.setattr(lease.time, "time", lambda: real() + 10 * lease.LEASE_SECONDS)
    found = lease.describe(tmp_path / "lock")
    assert found is not None and found["alive"] and found["seconds_since_sign"] < lease.LEASE_SECONDS
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_on_this_host_the_process_decides(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    first = context.Process(target=hold_until, args=(tmp_path / "lock", held, leave))
    first.start()
    assert held.wait(60)
    os.utime(tmp_path / "lock", (0, 0))  # no sign of life for decades, and yet it lives
    with pytest.raises(ValueError, match=rf"another process works on this run \(pid {first.pid} on .*; wait for it"):
        await_end(tmp_path / "lock", remove=True)
    os.kill(first.pid or 0, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while first.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    start = time.monotonic()
    with hold(tmp_path / "lock"):
        assert time.monotonic() - start < 2, "a dead process is not waited for"
        seen = look(tmp_path / "lock")
        assert seen is not None and seen.owner is not None and seen.owner.pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_open_to_one_driver_at_a_time(tmp_path: Path) -> None:
    raw = {"run_dir": tmp_path, "source": {"model": "a"}, "target": {"model": "b"}, "adapters": [{"bundle": "x"}]}
    config = FleetConfig.model_validate(raw)
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    first = context.Process(target=hold_until, args=(tmp_path / LOCK, held, leave))
    first.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match="another process works on this run"), open_run(tmp_path, config):
        pass
    with pytest.raises(ValueError, match="another process works on this run"):
        check_free(tmp_path)
    first.kill()
    first.join()
    with open_run(tmp_path, config):
        pass


def test_a_pid_that_was_given_to_another_process_is_no_sign_of_life(tmp_path: Path) -> None:
    with hold(tmp_path / "lock"):
        own = look(tmp_path / "lock")
    assert own is not None and own.owner is not None
    write(tmp_path / "lock", Owner(own.owner.host, own.owner.place, os.getpid(), own.owner.started - 3600, "b"))
    with hold(tmp_path / "lock"):
        pass


def test_another_hosts_driver_is_refused_as_soon_as_it_renews(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    write(path, age=10)
    renewing = threading.Timer(1.5, lambda: os.utime(path))
    renewing.start()
    start = time.monotonic()
    with pytest.raises(ValueError, match="pid 4711 on node-7, sign of life"), hold(path):
        pass
    assert 1 < time.monotonic() - start < 10
    seen = look(path)
    assert seen is not None and seen.owner == FAR, "and keeps its lease"


@pytest.mark.parametrize("owner", [FAR, None])
def test_another_hosts_dead_driver_is_replaced_when_its_time_is_over(
    tmp_path: Path, owner: Owner | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    write(path)
    if owner is None:
        path.write_text("")
    monkeypatch.setattr(lease, "LEASE_SECONDS", 2.0)
    start = time.monotonic()
    with hold(path):
        assert 1 < time.monotonic() - start < 6
    write(path, age=3)
    start = time.monotonic()
    with hold(path):
        assert time.monotonic() - start < 1, "it was over already"


def test_a_driver_that_was_suspended_for_too_long_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    path = tmp_path / "lock"
    before = signal.getsignal(signal.SIGTERM)
    unwind_on_sigterm()
    try:
        with pytest.raises(LeaseLostError, match="another driver took this run over"), hold(path):
            path.unlink()
            write(path)
            time.sleep(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    seen = look(path)
    assert seen is not None and seen.owner == FAR, "the other one's lease is left alone"


def test_a_lease_is_renewed_and_comes_back_when_somebody_deletes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    path = tmp_path / "lock"
    with hold(path):
        os.utime(path, (0, 0))
        time.sleep(1)
        assert time.time() - path.stat().st_mtime < 5
        path.unlink()
        time.sleep(1)
        assert path.is_file()


def contend(path: Path, start, results) -> None:  # type: ignore[no-untyped-def]
    start.wait(60)
    try:
        with hold(path):
            results.put(os.getpid())
            time.sleep(3)
    except ValueError:
        results.put(None)


def test_of_many_drivers_that_find_a_dead_ones_lease_one_gets_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    write(tmp_path / "lock", age=1000)
    start, results = context.Barrier(6), context.Queue()
    drivers = [context.Process(target=contend, args=(tmp_path / "lock", start, results)) for _ in range(6)]
    for driver in drivers:
        driver.start()
    winners = [results.get(timeout=60) for _ in drivers]
    for driver in drivers:
        driver.join()
    assert sum(winner is not None for winner in winners) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_empty_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("translora.run.lease.json.dump", full)
    with pytest.raises(OSError, match="No space left"), hold(tmp_path / "lock"):
        pass
    assert list(tmp_path.iterdir()) == []
