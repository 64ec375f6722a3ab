"""Who trains what, and how many at a time: ranks, queues and the size of the gang.

Every pass gathers the whole base twice, forward and backward, whoever trains in it: 4 N bytes of N two-byte weights,
against 4 N FLOPs a token (6 N with recomputation). Gathering is less than a share s of the computing from T tokens a
pass on,

    T = F / (B * s),        F: FLOP/s a worker reaches, B: bytes/s it gathers,

whatever the size of the base. The gang is as large as it takes to fill such a pass, unless memory ends before that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from translora.config import TrainConfig

TOKENS_PER_PASS = {"cuda": 16384, "cpu": 4096}
"""T for s = 0.1: 400 TFLOP/s against 250 GB/s of gathered weights; a thread's 180 GFLOP/s against gloo's 0.45 GB/s."""
MEMORY_SHARE = 0.85
"""Of what is free beside the base; the rest is what an allocator cannot use."""


@dataclass(frozen=True)
class GangBytes:
    """Bytes of a gang of K students and its pass, in the loss and at the fullest place of the backward pass.

    A line is (fixed, student): fixed + K * student. The loss has two, and takes the smaller of both: until its chunk is
    full of logits it grows by every position, and then hardly.
    """

    backward: tuple[int, int]
    loss: tuple[tuple[int, int], ...] = ()
    activations: int = 0
    """What one student's forward pass leaves for the backward pass."""

    def of(self, gang_size: int) -> int:
        """At the fuller of the two moments."""
        loss = [fixed + gang_size * student for fixed, student in self.loss]
        return max(self.backward[0] + gang_size * self.backward[1], min(loss, default=0))

    def largest(self, free_bytes: float) -> int:
        """The largest gang that takes no more than that; 0 where one student is too many."""

        def most(fixed: int, student: int) -> int:
            return math.floor((free_bytes - fixed) / student)

        return max(0, min(most(*self.backward), max((most(*line) for line in self.loss), default=most(*self.backward))))


@dataclass(frozen=True)
class JobSize:
    """What the plan has to know of a job."""

    num_steps: int
    mean_tokens: float
    """Of a sample."""
    max_tokens: int
    """Of a sample, where a pass has as many samples as it may; a sequence is no longer."""


@dataclass(frozen=True)
class Layout:
    """Groups of ranks and the jobs of each. One group trains an adapter; with many adapters a group is one rank."""

    ranks_per_group: int
    queues: tuple[tuple[int, ...], ...]
    """Job indices by group, in the order in which they are begun."""


def lay_out(sizes: Sequence[JobSize], num_workers: int) -> Layout:
    """Give each job to a group, the longest first, always to the group with the least to do.

    Whole adapters per rank: no LoRA gradient is ever reduced, and an adapter's result does not depend on the number of
    workers. Only where there are fewer jobs than ranks do ranks share an adapter's batch.
    """
    share = max(1, num_workers // max(1, len(sizes)))
    ranks_per_group = max(divisor for divisor in range(1, share + 1) if num_workers % divisor == 0)
    queues: list[list[int]] = [[] for _ in range(num_workers // ranks_per_group)]
    work = [0.0] * len(queues)
    costs = [size.num_steps * size.mean_tokens for size in sizes]
    for index in sorted(range(len(sizes)), key=lambda index: -costs[index]):
        group = work.index(min(work))
        queues[group].append(index)
        work[group] += costs[index]
    return Layout(ranks_per_group, tuple(tuple(queue) for queue in queues))


def choose_gang_size(
    sizes: Sequence[JobSize],
    layout: Layout,
    config: TrainConfig,
    *,
    device: str,
    free_bytes: int,
    gang_bytes: Callable[[int, int], GangBytes],
) -> int:
    """Students that a worker trains in one pass (K of the gang is this times the number of groups).

    Args:
        device: cpu or cuda.
        free_bytes: memory that a worker has left when the base is loaded.
        gang_bytes: what a gang takes of it, given a student's samples in a pass and their tokens.
    """
    longest_queue = max(1, max(len(queue) for queue in layout.queues))
    if config.gang_size != "auto":
        return min(config.gang_size, longest_queue)
    samples = min(config.micro_batch_size, math.ceil(config.batch_size / layout.ranks_per_group))
    mean_tokens = max(1.0, sum(size.mean_tokens for size in sizes) / max(1, len(sizes)))
    max_tokens = max((size.max_tokens for size in sizes), default=1)
    tokens = TOKENS_PER_PASS[device] if config.tokens_per_pass == "auto" else config.tokens_per_pass
    wanted = math.ceil(tokens / (samples * mean_tokens))
    return max(1, min(wanted, gang_bytes(samples, max_tokens).largest(MEMORY_SHARE * free_bytes), longest_queue))
