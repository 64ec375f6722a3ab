"""torch's build lock, with torch's own code as its holder."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from translora.distill.build_lock import free, free_build_locks, is_held


def hold(lock: str, held) -> None:  # type: ignore[no-untyped-def]
    assert FileBaton(lock).try_acquire()
    held.set()
    time.sleep(600)


def test_a_lock_goes_with_its_holder_and_not_before(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=hold, args=(str(lock), held))
    holder.start()
    assert held.wait(60) and is_held(lock)
    os.utime(lock, (0, 0))
    waiting = threading.Thread(target=free, args=(lock, 0.2))
    waiting.start()
    time.sleep(1)
    assert lock.exists(), "its holder compiles"
    holder.kill()
    holder.join()
    assert not is_held(lock)
    waiting.join(60)
    assert not lock.exists()
    free(lock)


def test_a_young_lock_may_be_another_machines(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    start = time.monotonic()
    free(tmp_path / "lock", 0.5)
    assert time.monotonic() - start > 0.4 and not (tmp_path / "lock").exists()


def test_the_directory_is_the_one_that_torch_builds_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    free_build_locks()
    assert not lock.exists()
