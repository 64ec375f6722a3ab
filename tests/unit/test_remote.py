"""Bundles behind a URL: the same as on disk, copied once, each fault its own."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.tiny import make_base, make_bundle
from tests.unit.test_run import config
from translora.bundle import inspect_base, remote
from translora.bundle.manifest import BundleError
from translora.bundle.remote import TRIES, expand_remote, fetch
from translora.config import AdapterEntry, FleetConfig, load_config
from translora.engine.loading import load_tokenizer
from translora.run.entries import expand_entries
from translora.run.files import sha256_path, write_json
from translora.run.member import Member, Run
from translora.run.recipes import Seals
from translora.run.state import AdapterState
from translora.run.tracker import Tracker
from translora.run.verify import verify_fleet

STORE = fsspec.filesystem("memory")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("remote") / "base")


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Iterator[Path]:
    """Two bundles at memory://bucket/bundles; returns a local copy of one."""
    for seed, name in enumerate("ab"):
        make_bundle(tmp_path / "local" / name, base, seed=seed)
        STORE.put(str(tmp_path / "local" / name), f"/bucket/bundles/{name}", recursive=True)
    yield tmp_path / "local" / "a"
    STORE.rm("/bucket", recursive=True)


def verified(run_dir: Path, base: Path, *bundles: str) -> dict[str, Member | AdapterState]:
    settings = config(run_dir, source={"model": str(base)}, target={"model": str(base)})
    info, tokenizer = inspect_base(str(base)), load_tokenizer(settings.source)
    entries, faults = expand_entries([AdapterEntry(bundle=bundle) for bundle in bundles])
    with Tracker(run_dir, settings.tracking, {}, "test") as tracker:
        run = Run(settings, info, info, info, tracker, tokenizer, tokenizer)
        return verify_fleet(run, entries, Seals(run_dir, settings, (info, info, info)), faults)


def test_a_url_with_a_glob_is_a_fleet(store: Path, base: Path, tmp_path: Path) -> None:
    found = verified(tmp_path / "run", base, "memory://bucket/bundles/*")
    assert found.keys() == {"a", "b"}
    member = found["a"]
    assert isinstance(member, Member) and member.bundle.path == tmp_path / "run/downloads/a"
    assert sha256_path(member.bundle.path) == sha256_path(store)


def test_a_remote_directory_whose_name_is_none_is_quarantined_and_stops_nobody(
    store: Path, base: Path, tmp_path: Path
) -> None:
    for name in (".hidden", "a:b"):
        STORE.put(str(store), f"/bucket/bundles/{name}", recursive=True)
    found = verified(tmp_path / "run", base, "memory://bucket/bundles/*", "memory://bucket/bundles/.hidden")
    assert {name for name, one in found.items() if isinstance(one, Member)} == {"a", "b", "a:b"}
    (hidden,) = (one for one in found.values() if isinstance(one, AdapterState))
    assert hidden.name.startswith("unnamed-") and hidden.status == "quarantined"
    assert "bucket/bundles/.hidden: the directory's name cannot be an adapter's; rename it" in hidden.reason
    assert sorted(path.name for path in (tmp_path / "run/downloads").iterdir() if path.is_dir()) == ["a", "a:b", "b"]


def test_a_url_is_one_bundle_however_it_is_spelled(store: Path) -> None:
    entries = [AdapterEntry(bundle=f"memory://bucket/bundles/{name}") for name in ("*", "a", "a/")]
    assert expand_entries(entries)[0].keys() == {"a", "b"}


def test_a_bundle_is_copied_again_when_it_changed_and_not_before(store: Path, tmp_path: Path) -> None:
    directory = tmp_path / "downloads/a"

    def copied_at() -> int:
        fetch("memory://bucket/bundles/a", directory)
        return (directory / "adapter_config.json").stat().st_mtime_ns

    first = copied_at()
    assert copied_at() == first
    STORE.pipe("/bucket/bundles/a/README.md", b"# New")
    assert copied_at() > first and (directory / "README.md").read_text() == "# New"
    (tmp_path / "downloads/a.json").unlink()
    second = copied_at()
    assert second > first, "without a record nothing is known of a copy"
    STORE.rm("/bucket/bundles/a/README.md")
    assert copied_at() > second and not (directory / "README.md").exists()


@pytest.mark.parametrize("version", [{"blob_id": "{}", "xet_hash": "x"}, {"ETag": "{}"}, {}], ids=str)
def test_a_change_that_keeps_every_size_is_seen(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: dict[str, str]
) -> None:
    """As the hub's store and S3 describe a file; one that tells no version is copied every time."""
    counts = {"number": 1}

    def find(_: object, root: str, detail: bool) -> dict[str, dict[str, object]]:
        own = {key: value.format(counts["number"]) for key, value in version.items()}
        return {f"{root}/README.md": {"name": f"{root}/README.md", "size": 4, "type": "file", **own}}

    monkeypatch.setattr(type(STORE), "find", find)
    for number, text in enumerate((b"one.", b"two."), 1):
        counts["number"] = number
        STORE.pipe("/bucket/bundles/a/README.md", text)
        fetch("memory://bucket/bundles/a", tmp_path / "a")
        assert (tmp_path / "a" / "README.md").read_bytes() == text


def test_a_bundle_that_is_not_there_or_damaged_is_quarantined_alone(store: Path, base: Path, tmp_path: Path) -> None:
    STORE.pipe("/bucket/bundles/b/adapter_model.safetensors", b"damaged")
    found = verified(tmp_path / "run", base, "memory://bucket/bundles/*", "memory://bucket/bundles/gone")
    assert isinstance(found["a"], Member)
    reasons = {name: state.reason for name, state in found.items() if isinstance(state, AdapterState)}
    assert "adapter_model.safetensors: changed or damaged" in reasons["b"]
    assert reasons["gone"].startswith("memory://bucket/bundles/gone: no such directory")


def test_a_store_that_fails_is_asked_a_few_times(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    whole = STORE.get_file

    def now_and_then(remote: str, local: str, **options: object) -> None:
        asked.append(remote)
        if len(asked) < 3:
            raise ConnectionResetError("reset by peer")
        whole(remote, local, **options)

    monkeypatch.setattr("translora.bundle.remote.time.sleep", lambda _: None)
    monkeypatch.setattr(type(STORE), "get_file", lambda _, *arguments, **options: now_and_then(*arguments, **options))
    fetch("memory://bucket/bundles/a", tmp_path / "a")
    assert sha256_path(tmp_path / "a") == sha256_path(store)
    monkeypatch.setattr(type(STORE), "get_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError("denied")))
    with pytest.raises(BundleError, match=rf"bundles/b: cannot be copied, {TRIES} times tried \(denied\)"):
        fetch("memory://bucket/bundles/b", tmp_path / "b")
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".tmp-*"))


def test_a_bundle_that_is_too_large_is_not_copied(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("translora.bundle.remote.MAX_BUNDLE_BYTES", 1000)
    with pytest.raises(BundleError, match="bytes, the limit is 1,000"):
        fetch("memory://bucket/bundles/a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_no_fault_of_the_bundle(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(type(STORE), "get_file", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        fetch("memory://bucket/bundles/a", tmp_path / "a")
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_file_that_would_leave_the_bundle_is_refused(store: Path, tmp_path: Path) -> None:
    STORE.store["/bucket/bundles/a/../../outside"] = STORE.store["/bucket/bundles/a/adapter_config.json"]
    try:
        with pytest.raises(BundleError, match="is not a path inside the bundle"):
            fetch("memory://bucket/bundles/a", tmp_path / "a")
    finally:
        del STORE.store["/bucket/bundles/a/../../outside"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nope://bucket/*", "Protocol not known: nope"),
        ("s3://bucket/*", "s3fs"),
        ("memory://bucket/none/*", "matches no directory"),
    ],
)
def test_a_url_that_cannot_be_used_is_named(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_entries([AdapterEntry(bundle=url)])


def test_a_store_that_fails_is_asked_again_and_ends_the_run_as_a_broken_cluster_does(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet file is no worse for it: the same command continues."""
    asked, listing = [], MemoryFileSystem.glob

    def glob(self: MemoryFileSystem, path: str, **options: Any) -> Any:
        asked.append(path)
        if len(asked) < fails_until:
            raise TimeoutError("503 slow down")
        return listing(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "glob", glob)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    entries = [AdapterEntry(bundle="memory://bucket/bundles/*")]
    fails_until = 3
    assert expand_entries(entries)[0].keys() == {"a", "b"}
    asked.clear()
    fails_until = 9
    with pytest.raises(ConnectionError, match=r"bundles/\*: cannot be listed \(503 slow down\)"):
        expand_entries(entries)
    assert len(asked) == 3


def test_a_config_file_leaves_urls_as_they_are(tmp_path: Path) -> None:
    raw = {"run_dir": "run", "source": {"model": "a"}, "target": {"model": "b"}, "adapters": ["gs://bucket/bundles/*"]}
    write_json(tmp_path / "fleet.yaml", raw)
    assert load_config(tmp_path / "fleet.yaml", FleetConfig).adapters[0].bundle == "gs://bucket/bundles/*"


def test_a_local_url_works_like_the_directory(store: Path) -> None:
    assert expand_remote(f"file://{store.parent}/?") == [f"file://{store.parent}/{name}" for name in "ab"]
