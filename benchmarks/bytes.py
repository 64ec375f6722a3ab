"""Bytes that ZeRO-3 gathers per adapter and step: one adapter at a time against gangs, on real DeepSpeed.

    python -m benchmarks.bytes

Two CPU workers train on a small random base; DeepSpeed's own communication log counts what they gather.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from tests.tiny import make_base
from translora.config import TrainConfig
from translora.run.files import write_jsonl

NUM_WORKERS = 2
NUM_STEPS = 6
ROWS = [{"input": f"Please send order {index} to the new address.", "answer": "billing"} for index in range(8)]


@dataclass(frozen=True)
class Traffic:
    """What one worker gathered in a training of `num_adapters` adapters."""

    num_adapters: int
    num_gathers: int
    num_bytes: int
    seconds: float

    @property
    def bytes_per_adapter_step(self) -> float:
        return self.num_bytes / self.num_adapters / NUM_STEPS

    @property
    def gathers_per_adapter_step(self) -> float:
        return self.num_gathers / self.num_adapters / NUM_STEPS


def ds_config(directory: Path) -> Path:
    """The shipped ZeRO-3 config, with the log on."""
    config: dict[str, Any] = json.loads((Path(__file__).parents[1] / "ds_configs" / "zero3.json").read_text())
    config["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
    # The proportions of a large base: no matrix stays gathered, nor from its forward pass to its backward pass.
    config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 1000,
        "stage3_prefetch_bucket_size": 100_000,
        "stage3_max_live_parameters": 200_000,
        "stage3_max_reuse_distance": 0,
    }
    path = directory / "zero3.json"
    path.write_text(json.dumps(config))
    return path


def worker(rank: int, base: str, directory: str, gang_sizes: list[int], answers: mp.SimpleQueue) -> None:
    """Train one gang of each size on one resident base; rank 0 answers with the traffic of each."""
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "WORLD_SIZE": str(NUM_WORKERS)}
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    import deepspeed.comm as ds_comm
    import torch.distributed as dist

    from translora.config import BaseModelConfig
    from translora.distill import zero3
    from translora.distill.job import TrainJob
    from translora.distill.train import train_on

    store = dist.FileStore(f"{directory}/store", NUM_WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_WORKERS)
    root = Path(directory)
    settings = {"batch_size": len(ROWS), "micro_batch_size": len(ROWS), "dtype": "bfloat16"}
    config = TrainConfig.model_validate({**settings, "ds_config": f"{directory}/zero3.json"})
    resident = zero3.ShardedBase(BaseModelConfig(model=base), config)
    for number, size in enumerate((1, *gang_sizes)):  # the first is not counted: ZeRO-3 learns the order of the modules
        own = config.model_copy(update={"gang_size": max(1, size // NUM_WORKERS)})
        here = root / str(number)
        jobs = [
            TrainJob(
                name=f"adapter-{index}",
                data=str(root / "rows.jsonl"),
                output=str(here / f"adapter-{index}"),
                work_dir=str(here / f"work-{index}"),
                seed=index,
                epochs=NUM_STEPS,
                learning_rate=1e-3,
            )
            for index in range(size)
        ]
        ds_comm.comms_logger.comms_dict.clear()
        start = time.monotonic()
        train_on(resident, jobs, own, here / "gangs", base_name="base")
        seconds = time.monotonic() - start
        if rank == 0 and number > 0:
            gathers = [sizes for name, sizes in ds_comm.comms_logger.comms_dict.items() if "all_gather" in name]
            counts = [(num_bytes, record[0]) for sizes in gathers for num_bytes, record in sizes.items()]
            total = sum(num_bytes * count for num_bytes, count in counts)
            answers.put((size, sum(count for _, count in counts), total, seconds))
    dist.barrier()


def measure(gang_sizes: list[int], hidden_size: int = 128, num_layers: int = 4) -> list[Traffic]:
    """Traffic of a worker for gangs of these sizes, one behind the other on the same base."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        base = make_base(directory / "base", hidden_size=hidden_size, num_layers=num_layers)
        write_jsonl(directory / "rows.jsonl", ROWS)
        ds_config(directory)
        answers = mp.get_context("spawn").SimpleQueue()
        mp.spawn(worker, args=(str(base), str(directory), gang_sizes, answers), nprocs=NUM_WORKERS)
        return [Traffic(*answers.get()) for _ in gang_sizes]


def main() -> None:
    """Print the table."""
    table = Table(title="gathered by one of two workers, real ZeRO-3")
    for column in ("K", "bytes per adapter-step", "of K = 1", "gathers per adapter-step", "seconds"):
        table.add_column(column, justify="right")
    alone, *gangs = measure([1, 2, 4, 8])
    for traffic in (alone, *gangs):
        share = traffic.bytes_per_adapter_step / alone.bytes_per_adapter_step
        table.add_row(
            str(traffic.num_adapters),
            f"{traffic.bytes_per_adapter_step / 1e6:.2f} MB",
            f"{share:.3f}",
            f"{traffic.gathers_per_adapter_step:.1f}",
            f"{traffic.seconds:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
