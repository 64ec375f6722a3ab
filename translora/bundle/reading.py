"""Bounded reading of files that others wrote: JSON objects and the headers of safetensors files.

Nothing here loads torch. Every size is checked before memory is taken for it.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translora.errors import InputError
from translora.run.files import unique_keys

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_ADAPTER_HEADER_BYTES = 10_000_000  # some 50,000 tensors
MAX_DIMENSIONS = 8
MAX_JSON_BYTES = 10_000_000

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class TensorHeader:
    """Where and what one tensor of a safetensors file is; `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_json_object(path: Path, remedy: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most `max_bytes`.

    Raises:
        InputError: missing, too long, not JSON or not an object; names the file and `remedy`.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= max_bytes else b""
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; {remedy}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if size > max_bytes:
        raise InputError(f"{path}: {size:,} bytes, the limit is {max_bytes:,}; {remedy}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8, and numbers of 4300 digits
        raise InputError(f"{path}: not JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}; {remedy}")
    return value


def _entry(name: str, entry: Any, data_start: int) -> TensorHeader:
    """Check one tensor's header entry; raises KeyError, TypeError or InputError with what is wrong."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(shape) > MAX_DIMENSIONS:
        raise InputError(f"tensor {name!r}: {len(shape):,} dimensions")
    for number in (*shape, begin, end):
        if type(number) is not int or number < 0:
            raise InputError(f"tensor {name!r}: {number!r} is no size")
    num_bits = _BITS[dtype] * math.prod(shape)
    if end < begin or (end - begin) * 8 != num_bits:
        raise InputError(f"tensor {name!r}: {end - begin} bytes do not hold {dtype} {list(shape)}")
    return TensorHeader(dtype, tuple(shape), data_start + begin, end - begin)


def read_header(
    path: Path, remedy: str = "copy the file again", max_bytes: int = MAX_HEADER_BYTES
) -> dict[str, TensorHeader]:
    """Read the header of a safetensors file (8 bytes of length, JSON) and check it against the file's size.

    Args:
        max_bytes: longest header that is read.

    Raises:
        InputError: missing, truncated or not safetensors; names the file and `remedy`.
    """
    try:
        file_bytes = path.stat().st_size
        with open(path, "rb") as handle:
            prefix = handle.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise InputError(
                    f"{path}: truncated or not safetensors ({file_bytes:,} bytes cannot hold its header); {remedy}"
                )
            if header_bytes > max_bytes:
                raise InputError(f"{path}: a header of {header_bytes:,} bytes, the limit is {max_bytes:,}; {remedy}")
            raw = json.loads(handle.read(header_bytes), object_pairs_hook=unique_keys)
        data_start = 8 + header_bytes
        if not isinstance(raw, dict):
            raise TypeError("its header is no JSON object")
        tensors = {name: _entry(name, entry, data_start) for name, entry in raw.items() if name != "__metadata__"}
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; {remedy}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a safetensors file (bad header: {error}); {remedy}") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path}: not a safetensors file (bad header: {error}); {remedy}") from error
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.num_bytes)):
        if tensor.start != position:
            raise InputError(f"{path}: not a safetensors file (its tensors overlap or leave gaps); {remedy}")
        position += tensor.num_bytes
    if position != file_bytes:
        what = "truncated" if position > file_bytes else "has extra bytes at its end"
        raise InputError(f"{path}: {what}: its header describes {position:,} bytes, it has {file_bytes:,}; {remedy}")
    return tensors
