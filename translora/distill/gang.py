"""The gang: students that are trained side by side in the same passes over one frozen base, and share nothing else.

Each student has its own float32 factors, AdamW, step count, schedule, clipping and data order, seeded by its own name;
its tokens meet its own factors in their own shapes. So a student ends as it would alone, whoever its neighbours are,
and leaves when it is done: the next one of the queue takes its slot.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from translora.config import TrainConfig
from translora.distill.data import Packed, Sample
from translora.distill.job import FAILURE, TrainJob
from translora.distill.slots import LoraSlots, ResidentBase, Shard, Slots
from translora.distill.student import Student
from translora.lora.peft_io import read_lora
from translora.lora.warm_start import copy_adapter
from translora.run.files import append_line, write_json


class Gang:
    """The students of this rank, by slot, and the queue behind them.

    Args:
        base: resident.
        queue: jobs of this rank's group, in order.
        num_slots: students at a time.
        base_name: written into the adapters' configs.
        group: the ranks that share each student's batch; None when this rank has its students for itself.
        done: names of the jobs that an earlier start finished.
        refused: names of those that were given up before.
        slots: where the students are put; the base's bank when unset.
    """

    def __init__(
        self,
        base: ResidentBase,
        queue: Sequence[TrainJob],
        config: TrainConfig,
        num_slots: int,
        *,
        base_name: str,
        group: dist.ProcessGroup | None,
        done: Collection[str] = (),
        refused: Collection[str] = (),
        slots: Slots | None = None,
    ) -> None:
        self.tokenizer, self.place = base.tokenizer, base.place
        self.slots = slots or LoraSlots(base, num_slots, config.lora.flat_sigma)
        self.queue, self.config, self.num_slots = list(queue), config, num_slots
        self.recipes = [job.recipe(config, base.identity) for job in queue]
        self.done, self.refused = {*done, *refused}, set(refused)
        self.base_name, self.group = base_name, group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.num_ranks = 1 if group is None else dist.get_world_size(group)
        self.students: dict[int, Student] = {}
        self.next = 0
        self.step_seconds = 0.0
        """Of the passes of this step: each student's share of them is logged, as what it cost."""
        self.saved: dict[str, tuple[dict[str, torch.Tensor], list[float]]] = {}
        """States of an earlier start, by recipe."""
        self.given_up: dict[str, str] = {}
        """Why jobs of the queue ended before their last step, by name."""

    def fill(self) -> None:
        """Open the next jobs of the queue in the free slots; done ones are skipped, unusable ones given up."""
        for slot in range(self.num_slots):
            while slot not in self.students and self.next < len(self.queue):
                index = self.next
                self.next += 1
                if self.queue[index].name not in self.done:
                    self.open(slot, index)

    def open(self, slot: int, index: int) -> None:
        """Begin a job of the queue in a slot, or go on with it where an earlier start left it."""
        job, recipe = self.queue[index], self.recipes[index]
        if job.name in self.refused:  # a checkpoint may know it
            return
        Path(job.work_dir).mkdir(parents=True, exist_ok=True)
        try:
            samples = job.samples(self.tokenizer, self.config)
            lora = job.settings(self.config).lora
            weights = self.slots.new_weights(job.seed, lora)
            if job.start is not None:
                copy_adapter(read_lora(job.start), weights, lora.scaling)
            hooks = self.slots.hooks(job.seed, lora)
            student = Student(job, recipe, samples, weights, self.config, self.place, self.slots.dtype, hooks)
        except ValueError as error:
            self.give_up(job, error)
            return
        if recipe in self.saved:
            student.restore(*self.saved.pop(recipe))
        self.students[slot] = student
        self.slots.open(slot, student)

    def close(self, slot: int) -> None:
        """Free a slot."""
        del self.students[slot]
        self.slots.close(slot)

    def give_up(self, job: TrainJob, error: Exception | str) -> None:
        """Record why a job ends here; its neighbours go on."""
        self.given_up[job.name] = str(error)
        if self.rank == 0:
            write_json(Path(job.work_dir) / FAILURE, {"reason": str(error)})

    def shards(self) -> list[list[Shard]]:
        """This rank's samples of the next step, by pass: the n-th micro-batch of every student.

        A student's batch is cut by its own length alone, so its gradients add up in the same order in any company.
        """
        passes: list[list[Shard]] = []
        for slot, student in self.students.items():
            student.begin_step()
            batch = student.batch()
            weight = 1 / sum(sample.num_trained for sample in batch)
            share = batch[self.rank :: self.num_ranks]
            for index, start in enumerate(range(0, len(share), self.config.micro_batch_size)):
                if index == len(passes):
                    passes.append([])
                passes[index].append((slot, share[start : start + self.config.micro_batch_size], weight))
        return passes

    def ballast(self) -> list[Shard]:
        """A pass of one token for a rank that has nothing to do while others have: collectives must match."""
        return [(self.num_slots, [Sample([0], [0])], 0.0)]

    def note(self, batch: Packed, losses_L: torch.Tensor) -> None:
        """Add a pass's losses to those of the students."""
        for slot, part in batch.answers.items():
            if slot in self.students:
                self.students[slot].loss += losses_L[part].sum()

    def update(self) -> bool:
        """Step every student; those that are done or broken leave. Returns whether one left."""
        before = len(self.students)
        for slot, student in list(self.students.items()):
            try:
                student.update(self.group)
                if self.rank == 0:
                    seconds = round(time.monotonic() - student.start, 3)
                    row = {"step": student.step, "num_steps": student.num_steps, "loss": student.losses[-1]}
                    row |= {"seconds": seconds, "gang_seconds": round(self.step_seconds / before, 5)}
                    append_line(Path(student.job.work_dir) / "train.jsonl", json.dumps(row))
                    # A resumed gang may repeat the last steps of one that was written just before the kill.
                    if student.is_done and not student.job.is_made(student.recipe):
                        student.write(self.slots, self.base_name)
                if student.is_done:
                    self.close(slot)
            except FloatingPointError as error:
                self.give_up(student.job, error)
                self.close(slot)
        return len(self.students) < before
