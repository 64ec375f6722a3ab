"""Processes that work together in tests: a group of one, and ranks that are spawned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

NUM_RANKS = 2


@contextmanager
def group_of_one(directory: Path) -> Iterator[None]:
    """A gloo group with this process alone, for code that reduces over the workers."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{directory}/store", 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_ranks(work: Callable[..., None], directory: Path, *args: Any) -> None:
    """Call work(rank, *args) on two processes with a gloo group, one thread each.

    Raises:
        torch.multiprocessing.ProcessRaisedException: the first rank's error.
    """
    torch.multiprocessing.spawn(_run_rank, (work, str(directory), args), nprocs=NUM_RANKS)


def _run_rank(rank: int, work: Callable[..., None], directory: str, args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store-{work.__name__}", NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    work(rank, *args)
    dist.barrier()
    sys.stdout.flush()
    # DeepSpeed holds on to the group, so gloo's threads outlive destroy_process_group: one that asks for the GIL
    # while the interpreter ends aborts the process.
    os._exit(0)
