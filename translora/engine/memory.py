"""How an engine's memory is shared out, and running out of it: how that is told from other errors, and what follows."""

from __future__ import annotations

import functools
import gc
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from translora.bundle.adapter import WEIGHTS
from translora.bundle.reading import read_header

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


Sizes = Mapping[str, tuple[int, int]]
"""Of an adapter: by module, its rank and the sum of the module's inputs and outputs."""


@functools.cache
def adapter_sizes(directory: str) -> Sizes:
    """Of a PEFT directory, from the header of its weights, looked up once; nothing where reading it will fail.

    What is no LoRA's counts by its numbers, each tensor as a module of its own.
    """
    try:
        tensors = read_header(Path(directory) / WEIGHTS)
    except ValueError:
        return {}
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        module, is_lora, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        if not is_lora or side not in ("A.weight", "B.weight") or len(tensor.shape) != 2:
            found[name] = (1, math.prod(tensor.shape))
            continue
        rank, width = tensor.shape if side == "A.weight" else tensor.shape[::-1]
        found[module] = (rank, found.get(module, (0, 0))[1] + width)
    return found


@functools.lru_cache(maxsize=8)
def bank_numbers_of(directories: tuple[str, ...]) -> int:
    """`bank_numbers` of PEFT directories; asked for with each block of a phase, whose adapters are the same."""
    return bank_numbers([adapter_sizes(directory) for directory in directories])


def union(adapters: Iterable[Sizes]) -> Sizes:
    """All modules that any of them adapts, each with its greatest rank."""
    found: dict[str, tuple[int, int]] = {}
    for sizes in adapters:
        for module, size in sizes.items():
            found[module] = max(size, found.get(module, size))
    return found


def num_weights(sizes: Sizes) -> int:
    """Numbers of an adapter."""
    return sum(rank * width for rank, width in sizes.values())


def bank_numbers(adapters: Sequence[Sizes]) -> int:
    """Numbers in the stacks of a bank: a module's have the greatest rank in it, and a place that stays zero."""
    counts = Counter(module for sizes in adapters for module in sizes)
    return sum((counts[module] + 1) * rank * width for module, (rank, width) in union(adapters).items())
