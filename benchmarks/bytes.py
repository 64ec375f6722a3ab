"""Bytes that ZeRO-3 gathers per adapter and step: one adapter at a time against gangs, on real DeepSpeed.

    python -m benchmarks.bytes

Two CPU workers train on a small random base; DeepSpeed's own communication log counts what they gather. A second table
compares two layouts of the same gang: whole adapters per rank (translora's), and every adapter's batch shared by all
ranks, whose LoRA gradients must then be reduced. (The third, micro-batches in turn under one gather, is an arm of
benchmarks.gang: its bytes are the gang's, its matrix products are one adapter's.)
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from benchmarks.gang import ratio_cell
from tests.ranks import NUM_RANKS, run_ranks
from tests.tiny import make_base
from translora.config import TrainConfig
from translora.run.files import write_jsonl

NUM_STEPS = 6
ROWS = [{"input": f"Please send order {index} to the new address.", "answer": "billing"} for index in range(8)]


@dataclass(frozen=True)
class Traffic:
    """What one worker gathered in a training of `num_adapters` adapters."""

    num_adapters: int
    num_gathers: int
    num_bytes: int
    reduced_bytes: int
    """LoRA gradients that a worker gave to an all-reduce."""
    seconds: float
    awaited_bytes: int
    """Of the base, that the memory for the worker's first gang leaves out."""

    @property
    def bytes_per_adapter_step(self) -> float:
        return self.num_bytes / self.num_adapters / NUM_STEPS

    @property
    def gathers_per_adapter_step(self) -> float:
        return self.num_gathers / self.num_adapters / NUM_STEPS


def ds_config(directory: Path, *, resident: bool = False) -> Path:
    """A shipped ZeRO-3 config, with the log on."""
    name = "zero3-resident.json" if resident else "zero3.json"
    config: dict[str, Any] = json.loads((Path(__file__).parents[1] / "ds_configs" / name).read_text())
    config["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
    if not resident:
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


def worker(
    rank: int,
    base: str,
    directory: str,
    gangs: list[tuple[int, bool]],
    rows: int,
    recompute: bool,
    answers: mp.SimpleQueue,
) -> None:
    """Train one gang of each (size, shared) on one resident base; rank 0 answers with the traffic of each."""
    os.environ |= {"MASTER_ADDR": "localhost", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    import deepspeed.comm as ds_comm

    from translora.config import BaseModelConfig
    from translora.distill import zero3
    from translora.distill.job import TrainJob
    from translora.distill.plan import Layout
    from translora.distill.train import train_on

    root = Path(directory)
    settings = {"batch_size": rows, "micro_batch_size": rows, "dtype": "bfloat16", "gradient_checkpointing": recompute}
    config = TrainConfig.model_validate({**settings, "ds_config": f"{directory}/zero3.json"})
    resident = zero3.ShardedBase(BaseModelConfig(model=base), config)
    awaited = resident.awaited_bytes()
    # The first gang is not counted: ZeRO-3 learns the order of the modules.
    for number, (size, shared) in enumerate([(1, True), *gangs]):
        own = config.model_copy(update={"gang_size": size if shared else max(1, size // NUM_RANKS)})
        layout = Layout(NUM_RANKS, (tuple(range(size)),)) if shared else None
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
        train_on(resident, jobs, own, here / "gangs", "base", layout)
        seconds = time.monotonic() - start
        if rank == 0 and number > 0:
            gathers = [sizes for name, sizes in ds_comm.comms_logger.comms_dict.items() if "all_gather" in name]
            counts = [(num_bytes, record[0]) for sizes in gathers for num_bytes, record in sizes.items()]
            total = sum(num_bytes * count for num_bytes, count in counts)
            num_parameters = sum(8 * (out + inner) for out, inner in resident.bank.shapes.values())
            reduced = 4 * num_parameters * size * NUM_STEPS if shared else 0
            answers.put((size, sum(count for _, count in counts), total, reduced, seconds, awaited))


def measure(
    gangs: list[tuple[int, bool]],
    hidden_size: int = 128,
    num_layers: int = 4,
    num_rows: int = 8,
    *,
    recompute: bool = False,
    resident: bool = False,
) -> list[Traffic]:
    """Traffic of a worker for gangs of these (sizes, shared batches?), one behind the other on the same base.

    Args:
        recompute: distill.gradient_checkpointing.
        resident: with zero3-resident.json.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        base = make_base(directory / "base", hidden_size=hidden_size, num_layers=num_layers)
        write_jsonl(directory / "rows.jsonl", ROWS[:num_rows])
        ds_config(directory, resident=resident)
        answers = mp.get_context("spawn").SimpleQueue()
        run_ranks(worker, directory, str(base), name, gangs, num_rows, recompute, answers)
        return [Traffic(*answers.get()) for _ in gangs]


def sequence_table() -> Table:
    """Gangs of growing size against one adapter at a time."""
    table = Table(title="gathered by one of two workers, real ZeRO-3")
    for column in ("K", "bytes per adapter-step", "of K = 1", "gathers per adapter-step"):
        table.add_column(column, justify="right")
    alone, *gangs = measure([(1, True), (2, False), (4, False), (8, False)])
    (recomputed,) = measure([(8, False)], recompute=True)
    (resident,) = measure([(8, False)], resident=True)
    notes = {id(recomputed): ", recomputed", id(resident): ", zero3-resident.json"}
    for traffic in (alone, *gangs, recomputed, resident):
        share = traffic.bytes_per_adapter_step / alone.bytes_per_adapter_step
        table.add_row(
            f"{traffic.num_adapters}{notes.get(id(traffic), '')}",
            f"{traffic.bytes_per_adapter_step / 1e6:.2f} MB",
            f"{share:.3f}",
            f"{traffic.gathers_per_adapter_step:.1f}",
        )
    return table


def layout_table(rounds: int = 5) -> Table:
    """Eight adapters, two layouts in turn."""
    arms = {"whole adapters per rank": False, "batches shared by the ranks": True}
    traffic = measure([(8, shared) for _ in range(rounds) for shared in arms.values()], 256, 6)
    table = Table(title=f"8 adapters on two workers, {NUM_STEPS} steps, {rounds} rounds in turn")
    for column in ("layout", "gathered", "reduced", "seconds, median", "against the first (quartiles)"):
        table.add_column(column, justify="right")
    first = [entry.seconds for entry in traffic[:: len(arms)]]
    for number, label in enumerate(arms):
        own = traffic[number :: len(arms)]
        table.add_row(
            label,
            f"{own[0].num_bytes / 1e6:.1f} MB",
            f"{own[0].reduced_bytes / 1e6:.1f} MB",
            f"{statistics.median(entry.seconds for entry in own):.2f}",
            ratio_cell([entry.seconds for entry in own], first),
        )
    return table


def main() -> None:
    """Print both tables."""
    Console(width=120).print(sequence_table())
    Console(width=120).print(layout_table())


if __name__ == "__main__":
    main()
