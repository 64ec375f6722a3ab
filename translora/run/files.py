"""Atomic files and directories: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from translora.errors import InputError

if TYPE_CHECKING:
    import pyarrow

TEMPORARY_PREFIX = ".tmp-"


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"


def check_writable(path: Path, remedy: str, *, is_directory: bool = False) -> None:
    """Refuse at once what could not be written at the end, a file or a directory; makes what it will lie in.

    Raises:
        InputError: that cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fault = "" if os.access(path.parent, os.W_OK) else "Permission denied"
        if path.exists() and path.is_dir() != is_directory:
            fault = "Not a directory" if is_directory else "Is a directory"
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise InputError(f"{path}: cannot be written ({fault}); {remedy}")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` in one step; a reader sees the old or the new content, never a part."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # a write's own error names no file
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_parquet(path: Path, table: pyarrow.Table) -> None:
    """Replace `path` by a table as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def append_line(path: Path, line: str) -> None:
    """Append one line of text."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(f"{line}\n")


@contextlib.contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block succeeds, and vanishes when it fails.

    What was there is renamed, its successor takes its name, and only then it is removed: whoever reads `path` misses it
    for no longer than between two renames.
    """
    temporary, doomed = _temporary(path), _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir() and not path.is_symlink():  # over anything else nothing is put
            os.replace(path, doomed)
        try:
            os.replace(temporary, path)
        except OSError:
            if doomed.exists():
                os.replace(doomed, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that a killed process leaves it whole or gone, never in part."""
    if path.exists():
        doomed = _temporary(path)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def remove_temporaries(root: Path) -> None:
    """Remove what a killed process left half-written below `root`."""
    for leftover in list(root.rglob(f"{TEMPORARY_PREFIX}*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """Short content hash of plain values: names the directory of what was computed from them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all `parts` and on nothing else."""
    hashed = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(hashed[:8], "big") >> 1


def sha256_path(path: Path) -> str:
    """Hex sha256 of a file, or over the names and contents of all files below a directory."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listing = [(file.relative_to(path).as_posix(), sha256_file(file)) for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def full_disk(error: BaseException) -> bool:
    """Whether it is a full disk or a spent quota: that ends a run, and is no fault of the adapter that met it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that this program wrote; empty where there is none, or none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by one JSON object a line (ASCII, so that no Unicode line separator splits a row)."""
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (`object_pairs_hook`); a key that comes twice is refused, for every reader takes another."""
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise InputError(f"the key {key[:80]!r} comes twice")
        value[key] = item
    return value


def read_jsonl(path: str | Path, required: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a JSONL file, each an object whose `required` fields are non-empty strings.

    Raises:
        InputError: names the file, the line and what is wrong with it.
    """
    rows: list[dict[str, Any]] = []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # a byte-order mark, as Windows writes it, is no row's
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected JSONL with {', '.join(required)}") from error
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); write one JSON object a line") from error
        rows.append(check_row(row, required, f"{path}, line {number}"))
    if not rows:
        raise InputError(f"{path}: no rows; expected JSONL with {', '.join(required)}")
    return rows


def check_row(row: Any, required: tuple[str, ...], where: str) -> dict[str, Any]:
    """The row itself, an object whose `required` fields are non-empty strings.

    Raises:
        InputError: says `where` and what is wrong with it.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for field in required:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise InputError(f'{where}: "{field}" must be a non-empty string')
        if any("\ud800" <= character <= "\udfff" for character in row[field]):
            raise InputError(f'{where}: "{field}" holds half a surrogate pair; write it as UTF-8')
    return row
