"""How an engine's memory is shared out, and running out of it: how that is told from other errors, and what follows."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import torch

from translora.bundle.adapter import WEIGHTS

BANK_SHARE = 0.25
"""Of a machine's memory: most for the adapters of a bank."""
VLLM_SHARE = 0.92
"""Of a GPU's memory: what vLLM takes unless it is told otherwise."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (whose allocator raises a RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back what no tensor uses any more. Not inside an `except`: its traceback holds the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@functools.cache
def weights_bytes(adapter: str) -> int:
    """Size of an adapter's weights on disk, looked up once; 0 where there is none, which reading it will say."""
    try:
        return (Path(adapter) / WEIGHTS).stat().st_size
    except OSError:
        return 0
