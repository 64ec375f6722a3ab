"""Bundles behind a URL (s3://, gs://, abfs://, hf://, …), found and copied with fsspec.

Object stores other than the local ones need their own package (s3fs, gcsfs, adlfs); credentials are found as those
packages do. What is copied is then read and verified like any other bundle.
"""

from __future__ import annotations

import glob
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from translora.bundle.manifest import MAX_BUNDLE_BYTES, MAX_FILES, BundleError
from translora.errors import InputError
from translora.run.files import digest, full_disk, read_object, replace_directory, write_json
from translora.run.redact import first_line

TRIES = 3
NUM_THREADS = 8
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "content_md5", "blob_id", "xet_hash", "sha"),
    *("LastModified", "last_modified", "mtime", "modify", "modificationTime", "created"),
)
"""What file systems call the version of a file, its contents' first; the first one that is there is compared."""


def is_remote(path: str) -> bool:
    """Whether a bundle or a glob is a URL."""
    return "://" in path


def expand_remote(pattern: str) -> list[str]:
    """URLs of the directories that a URL with `*`, `?` or `[]` matches; the URL itself where it has none of them.

    Raises:
        InputError: the file system is not known or not installed, or there is no such place.
        ConnectionError: it cannot be reached, or fails.
    """
    if not glob.has_magic(pattern):
        return [pattern.rstrip("/")]
    fs, path = _open(pattern)
    for attempt in range(TRIES):
        try:
            found = fs.glob(path, detail=True)
            break
        except Exception as error:  # a fault boundary: each store has errors of its own
            fault = f"adapters: {pattern}: cannot be listed ({first_line(error, 300)})"
            if isinstance(error, FileNotFoundError | PermissionError):
                raise InputError(fault) from error
            if attempt + 1 == TRIES:
                raise ConnectionError(fault) from error
            time.sleep(2**attempt)
    return sorted(fs.unstrip_protocol(name).rstrip("/") for name, info in found.items() if info["type"] == "directory")


def canonical_url(url: str) -> str:
    """The URL as its file system spells it, where that is installed; `expand_remote` gives such."""
    try:
        fs, path = _open(url)
        return str(fs.unstrip_protocol(path)).rstrip("/")
    except Exception:  # a fault boundary: what is wrong with it is said when it is copied
        return url.rstrip("/")


def fetch(url: str, directory: Path) -> None:
    """Copy a remote bundle to `directory`, if it is not there already in the version that the store has now.

    A store that tells no version is copied from every time.

    Raises:
        BundleError: it cannot be read; names the URL.
    """
    record = directory.parent / f"{directory.name}.json"
    for attempt in range(TRIES):
        try:
            fs, root = _open(url)
            files = _list(fs, root, url)
            listing = digest(url, [[name, size, version] for name, _, size, version in files])
            known = all(version for _, _, _, version in files)
            if known and directory.is_dir() and read_object(record).get("listing") == listing:
                return
            with replace_directory(directory) as temporary:
                for name, remote, _, _ in files:
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    fs.get_file(remote, str(temporary / name))
            write_json(record, {"url": url, "listing": listing})
            return
        except BundleError:
            raise
        except Exception as error:  # a fault boundary: each store has errors of its own
            if full_disk(error):
                raise
            if attempt + 1 == TRIES:
                raise BundleError(f"{url}: cannot be copied, {TRIES} times tried ({first_line(error, 300)})") from error
            time.sleep(2**attempt)


def fetch_all(urls: dict[str, str], directory: Path) -> dict[str, str]:
    """Copy remote bundles (URL by name) to `directory`/name; returns the reasons of those that cannot be had."""

    def one(item: tuple[str, str]) -> tuple[str, str]:
        try:
            fetch(item[1], directory / item[0])
        except BundleError as error:
            return item[0], str(error)
        return item[0], ""

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return {name: reason for name, reason in pool.map(one, urls.items()) if reason}


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise BundleError(f"{url}: {first_line(error, 300)}; give a URL whose file system is installed") from error
    return fs, path


def _list(fs: Any, root: str, url: str) -> list[tuple[str, str, int, str]]:
    """Relative path, remote path, bytes and version of each file; paths that would leave the bundle are refused."""
    fs.invalidate_cache()
    found = fs.find(root, detail=True)
    if not found:
        raise BundleError(f"{url}: no such directory; give the directory of a bundle")
    if len(found) > MAX_FILES:
        raise BundleError(f"{url}: more than {MAX_FILES} files; give the directory of one bundle")
    num_bytes = sum(int(info.get("size") or 0) for info in found.values())
    if num_bytes > MAX_BUNDLE_BYTES:
        raise BundleError(
            f"{url}: {num_bytes:,} bytes, the limit is {MAX_BUNDLE_BYTES:,}; give the directory of one bundle"
        )
    files = []
    for remote, info in sorted(found.items()):
        name = remote.removeprefix(root.rstrip("/")).lstrip("/")
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or "\\" in name or "\0" in name:
            raise BundleError(f"{url}: {remote!r} is not a path inside the bundle")
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
        files.append((name, remote, int(info.get("size") or 0), version))
    return files
