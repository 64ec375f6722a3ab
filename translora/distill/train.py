"""The training loop: a gang of adapters side by side on one resident base that ZeRO-3 partitions over the ranks.

`train_worker` runs on every rank of the Ray Train worker group. The base is loaded once; each rank has its own
students and its own queue, and all ranks walk through the base together, pass by pass.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from translora.config import BaseModelConfig, TrainConfig
from translora.distill import zero3
from translora.distill.checkpoint import ASKED, is_asked_for, read_checkpoints, saved_gang_size, write_checkpoint
from translora.distill.data import num_steps
from translora.distill.gang import Gang
from translora.distill.job import TrainJob
from translora.distill.peft_slot import peft_slot
from translora.distill.plan import JobSize, Layout, choose_gang_size, lay_out
from translora.distill.shrink import given_up, largest, note_out_of_memory, read_notes
from translora.distill.slots import ResidentBase, Shard, Slots
from translora.engine.head import cross_entropy, divergence
from translora.engine.loading import hide_gpus
from translora.engine.memory import is_out_of_memory
from translora.run.files import write_json
from translora.run.log import quiet_worker
from translora.run.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train(
    base: ResidentBase,
    gang: Gang,
    checkpoint: Path,
    every_steps: int,
    every_seconds: float = math.inf,
    watchdog: Watchdog = Watchdog(None),  # noqa: B008 (has no state)
) -> None:
    """Train the gang and its queue to the end; every rank calls this.

    Args:
        checkpoint: is written when a student left, every so many steps or seconds, whichever comes first, and when the
            driver asks for it because it has to end.
        watchdog: is told of every pass.
    """
    step, saved = 0, time.monotonic()
    while True:
        held: Sequence[Shard] = ()
        try:
            gang.fill()
            passes = gang.shards()
            num_passes = most_of_all_ranks(len(passes), gang.place)
            if num_passes == 0:
                return
            begun = time.monotonic()
            for index in range(num_passes):
                watchdog.alive()
                held = passes[index] if index < len(passes) else gang.ballast()
                run_pass(base, gang, held)
            held = ()
            gang.step_seconds = time.monotonic() - begun
            one_left = gang.update()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                note_pass(checkpoint.parent, gang, held, error)
            raise
        step += 1
        due = step % every_steps == 0 or time.monotonic() - saved > every_seconds or is_asked_for(checkpoint)
        if gang.rank == 0 and (one_left or due):
            write_checkpoint(checkpoint, gang)
            saved = time.monotonic()


def run_pass(base: ResidentBase, gang: Gang, shards: Sequence[Shard]) -> None:
    """One forward and backward pass of a packed batch; adds to the students' gradients and losses."""
    top_k = gang.config.kl_top_k if gang.config.loss == "kl" else None
    batch = gang.slots.pack(shards, top_k)
    hidden_TD = gang.slots.hidden(batch)
    with base.gathered_head() as head:
        hidden_LD = hidden_TD[batch.positions_L]
        if batch.teacher is None:
            losses_L = cross_entropy(hidden_LD, head, batch.labels_L, batch.weights_L)
        else:
            losses_L = divergence(hidden_LD, head, *batch.teacher, batch.weights_L)
    # The sum of the students' means: every student's gradients are those of its own mean.
    base.backward(losses_L.sum())
    gang.note(batch, losses_L.detach())


def note_pass(directory: Path, gang: Gang, shards: Sequence[Shard], error: BaseException) -> None:
    """Leave a note of what was in the pass that was too much for the memory; between passes, of the whole gang."""
    sizes = [len(samples) for _, samples, _ in shards] or [gang.config.micro_batch_size]
    slots = [slot for slot, _, _ in shards] or list(gang.students)
    note_out_of_memory(
        directory,
        dist.get_rank(),
        gang_size=gang.num_slots,
        micro_batch_size=max(sizes),
        jobs=[gang.students[slot].job.name for slot in slots if slot in gang.students],
        error=error,
    )


def most_of_all_ranks(count: int, place: torch.device) -> int:
    """The largest count of all ranks."""
    most = torch.tensor(count, device=place)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def train_on(
    base: zero3.ShardedBase,
    jobs: Sequence[TrainJob],
    config: TrainConfig,
    directory: Path,
    base_name: str,
    layout: Layout | None = None,
    watchdog: Watchdog = Watchdog(None),  # noqa: B008 (has no state)
    slots: Slots | None = None,
    label: str = "gang",
) -> None:
    """Train every job on a resident base; every rank calls this. A rerun with the same directory goes on.

    Args:
        directory: for the gangs' checkpoints, plan.json and notes of passes that were too large, shared by all ranks.
        base_name: written into the adapters' configs.
        layout: which ranks train what; whole adapters per rank when unset.
        slots: where the students are put; the base's bank when unset.
        label: of the checkpoints.
    """
    found = look_at_files(base, jobs, config, directory)
    micro_batch_size = largest(found.notes, "micro_batch_size", config.micro_batch_size)
    config = config.model_copy(update={"micro_batch_size": micro_batch_size})
    layout = layout or lay_out(found.sizes, dist.get_world_size())
    gang_size = agree_on_gang_size(base, config, layout, found, directory)
    own, group = own_group(layout)
    queue, too_large = [jobs[index] for index in layout.queues[own]], given_up(found.notes)
    gang = Gang(
        base,
        queue,
        config,
        gang_size,
        base_name=base_name,
        group=group,
        done=found.done,
        refused=too_large,
        slots=slots,
    )
    for job in queue:
        if job.name in too_large and job.name not in found.done:
            gang.give_up(job, too_large[job.name])
    names = [f"{label}-{number:04d}.safetensors" for number in range(len(layout.queues))]
    checkpoint = directory / names[own]
    read_checkpoints(directory, checkpoint.name, gang)
    dist.barrier()  # nobody replaces a file that another rank still reads
    if dist.get_rank() == 0:
        (directory / ASKED).unlink(missing_ok=True)
        write_json(directory / "plan.json", {"checkpoints": names})
    train(base, gang, checkpoint, config.checkpoint_every_steps, config.checkpoint_every_seconds, watchdog)


@dataclass(frozen=True)
class Found:
    """What lies there before a training."""

    sizes: list[JobSize]
    done: list[str]
    """Jobs whose output is there already."""
    notes: list[dict[str, Any]]
    """Of passes that were too large for the memory."""


def look_at_files(base: zero3.ShardedBase, jobs: Sequence[TrainJob], config: TrainConfig, directory: Path) -> Found:
    """One rank looks at the files and tells the others: they must not differ in what they saw."""
    told: list[Found | None] = [None]
    if dist.get_rank() == 0:
        sizes = [measure(job, base.tokenizer, config) for job in jobs]
        done = [job.name for job in jobs if job.is_done(config, base.identity)]
        told[0] = Found(sizes, done, read_notes(directory))
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]


def agree_on_gang_size(
    base: zero3.ShardedBase, config: TrainConfig, layout: Layout, found: Found, directory: Path
) -> int:
    """How many students train side by side on every rank: as configured, as in the checkpoints, or what fits all.

    Args:
        directory: of the checkpoints.
    """
    gang_size = saved_gang_size(directory) if config.gang_size == "auto" else None
    if gang_size is None:
        free_bytes, gang_bytes = base.free_bytes(), functools.partial(base.gang_bytes, config)
        gang_size = choose_gang_size(
            found.sizes, layout, config, device=base.place.type, free_bytes=free_bytes, gang_bytes=gang_bytes
        )
    return largest(found.notes, "gang_size", -most_of_all_ranks(-gang_size, base.place))


def own_group(layout: Layout) -> tuple[int, dist.ProcessGroup | None]:
    """The number of this rank's group, and the group, where it is of several ranks; every rank makes every group."""
    rank, size = dist.get_rank(), layout.ranks_per_group
    groups = [
        dist.new_group(list(range(first, first + size))) if size > 1 else None
        for first in range(0, dist.get_world_size(), size)
    ]
    return rank // size, groups[rank // size]


def measure(job: TrainJob, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> JobSize:
    """Steps and sample lengths of a job; one without a usable sample, which the gang will give up, has none."""
    try:
        samples = job.samples(tokenizer, config)
    except ValueError:
        return JobSize(0, 0.0, 0)
    lengths = sorted(sample.num_tokens for sample in samples)
    longest = max(len(one.prompt_ids) + len(one.answer_ids) for sample in samples for one in sample.answers)
    steps = num_steps(len(samples), job.epochs, config.batch_size)
    # A few samples may have many answers, by soft labels: a pass has no more tokens than the longest of them together.
    most = math.ceil(fmean(lengths[-config.micro_batch_size :]))
    return JobSize(steps, fmean(lengths), max(longest, most))


def train_worker(spec: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker: load the base once, then train every job."""
    quiet_worker()
    if not spec["use_gpu"]:
        hide_gpus()
        share = len(os.sched_getaffinity(0)) // ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, min(share, spec["max_threads"])))
    config = TrainConfig.model_validate(spec["train"])
    watchdog = Watchdog(spec["limit_seconds"])
    watchdog.alive()
    base = zero3.ShardedBase(BaseModelConfig.model_validate(spec["base"]), config)
    jobs = [TrainJob(**job) for job in spec["jobs"]]
    train_all(base, jobs, config, Path(spec["directory"]), spec["base_name"], watchdog)
    watchdog.stop()


def train_all(
    base: zero3.ShardedBase,
    jobs: Sequence[TrainJob],
    config: TrainConfig,
    directory: Path,
    base_name: str,
    watchdog: Watchdog,
) -> None:
    """First the LoRAs in gangs, then what only PEFT can put on the base, one at a time on all ranks together."""
    if loras := [job for job in jobs if job.peft is None]:
        train_on(base, loras, config, directory, base_name, watchdog=watchdog)
    methods: dict[str, list[TrainJob]] = {}
    for job in jobs:
        if job.peft is not None:
            methods.setdefault(json.dumps(job.peft, sort_keys=True), []).append(job)
    alone = config.model_copy(update={"gang_size": 1})
    for number, (method, own) in enumerate(methods.items()):
        layout = Layout(dist.get_world_size(), (tuple(range(len(own))),))
        with peft_slot(base, json.loads(method)) as slots:
            train_on(base, own, alone, directory, base_name, layout, watchdog, slots, label=f"peft-{number}")
