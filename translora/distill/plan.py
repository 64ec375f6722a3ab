"""Who trains what, and how many at a time: ranks, queues and the size of the gang.

Every pass gathers the whole base twice, forward and backward, whoever trains in it: 4 N bytes of N two-byte weights,
against 4 N FLOPs a token (6 N with recomputation). Gathering is less than a share s of the computing from T tokens a
pass on,

    T = F / (B * s),        F: FLOP/s a worker reaches, B: bytes/s it gathers,

whatever the size of the base. The gang is as large as it takes to fill such a pass, unless memory ends before that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from translora.config import TrainConfig

TOKENS_PER_PASS = {"cuda": 16384, "cpu": 4096}
"""T for s = 0.1: 400 TFLOP/s against 250 GB/s of gathered weights; a thread's 180 GFLOP/s against gloo's 0.45 GB/s."""
MEMORY_SHARE = 0.6
"""Of what is free after loading; the rest is the gathered layers, the logits' chunk and the allocator's."""


@dataclass(frozen=True)
class JobSize:
    """What the plan has to know of a job."""

    num_steps: int
    mean_tokens: float
    """Of a sample."""
    max_tokens: int


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


def activation_bytes_per_token(model: Any, bytes_per_element: int, *, recompute: bool) -> int:
    """What the backward pass keeps of one token, estimated from the shape of a decoder.

    A layer keeps about six hidden states (residuals, norms, attention's in- and output), queries, keys and values, and
    three intermediate states of the MLP; with recomputation one hidden state, and one layer's all at a time.
    """
    hidden, layers = model.hidden_size, model.num_hidden_layers
    heads, groups = model.num_attention_heads, getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or hidden // heads
    layer = 6 * hidden + 2 * (heads + groups) * head_dim + 3 * model.intermediate_size
    return bytes_per_element * (layers * hidden + layer if recompute else layers * layer)


def choose_gang_size(
    sizes: Sequence[JobSize],
    layout: Layout,
    config: TrainConfig,
    *,
    device: str,
    free_bytes: int,
    activation_bytes: int,
    adapter_bytes: int,
) -> int:
    """Students that a worker trains in one pass (K of the gang is this times the number of groups).

    Args:
        device: cpu or cuda.
        free_bytes: memory that a worker has left when the base is loaded.
        activation_bytes: per token, see activation_bytes_per_token.
        adapter_bytes: of one student: weights, gradient and two moments in float32.
    """
    longest_queue = max(1, max(len(queue) for queue in layout.queues))
    if config.gang_size != "auto":
        return min(config.gang_size, longest_queue)
    samples = min(config.micro_batch_size, math.ceil(config.batch_size / layout.ranks_per_group))
    mean_tokens = max(1.0, sum(size.mean_tokens for size in sizes) / max(1, len(sizes)))
    max_tokens = max((size.max_tokens for size in sizes), default=1)
    wanted = math.ceil(TOKENS_PER_PASS[device] / (samples * mean_tokens))
    each = adapter_bytes + samples * max_tokens * activation_bytes
    return max(1, min(wanted, int(MEMORY_SHARE * free_bytes / each), longest_queue))
