"""What the distillation takes: the gang, its passes, and the base that they gather."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from translora.config import TrainConfig
from translora.distill.ds_config import check_partitions, is_resident
from translora.distill.memory import gathered_weights, known_activations, known_gang_bytes, student_bytes
from translora.distill.pass_memory import PassSize
from translora.distill.plan import TOKENS_PER_PASS, GangBytes, JobSize, choose_gang_size, lay_out
from translora.plan.hardware import LINK_SHARE, Hardware
from translora.plan.shape import Shape

EXPOSED = 0.2
"""Of the shorter of gathering and computing: what the one does not hide of the other."""
GATHER_SHARE = 0.1
"""Of the computing: how much gathering a pass is made large enough for."""


@dataclass(frozen=True)
class TrainingPlan:
    """One worker's part of it; every GPU is a worker."""

    gang_size: int
    """Students in one pass of a worker."""
    tokens_wanted: int
    """What a pass would be filled with if memory allows: distill.tokens_per_pass."""
    passes: int
    """Of the worker that has most to do."""
    tokens_per_pass: float
    samples_per_student: int
    checkpointed: int
    """Students in the checkpoints of all workers."""
    memory: dict[str, float]
    """Bytes of a GPU by what they are for."""
    activations: dict[str, float]
    """Bytes of one student's activations, `kept` and `recomputed`."""
    gathered_bytes: float
    """By each GPU in one pass."""
    compute_seconds: float
    """Of one pass."""
    gather_seconds: float
    """Of one pass."""

    @property
    def pass_seconds(self) -> float:
        """Of one pass, with what overlaps of the two."""
        longer, shorter = sorted((self.compute_seconds, self.gather_seconds), reverse=True)
        return longer + EXPOSED * shorter

    @property
    def seconds(self) -> float:
        """Of all passes."""
        return self.passes * self.pass_seconds


@dataclass(frozen=True)
class Gathering:
    """How the base comes together in one pass: forward, in the forward pass again, backward."""

    num_bytes: float
    """That each GPU receives."""
    seconds: float
    """With what comes from the machine's memory, where the base is offloaded to it."""
    copy_bytes: float
    """Of a second copy that each machine keeps of the base (ZeRO++, arXiv 2306.10209), a GPU's part of it."""


def gathering(shape: Shape, ds_config: dict[str, Any], hardware: Hardware, *, recompute: bool) -> Gathering:
    """Every GPU gathers what the others hold, in each direction; what is computed again is gathered a third time.

    With ZeRO++ all comes from the GPU's own machine, for the copy there never expires while the base is frozen, and in
    int8.

    Args:
        recompute: distill.gradient_checkpointing.
    """
    if is_resident(ds_config, shape.weights.total):
        return Gathering(0.0, 0.0, 0.0)  # once, before the first pass
    zero, workers = ds_config["zero_optimization"], hardware.num_gpus
    size = shape.num_bytes / (shape.dtype.itemsize if zero.get("zero_quantized_weights") else 1)
    rate, copy, peers = hardware.gather_rate, 0.0, workers
    node = min(int(zero.get("zero_hpz_partition_size", 1)), workers)
    if node > 1:
        peers, rate = node, LINK_SHARE * hardware.gpu.link_rate
        copy = shape.num_bytes / node
    times = 3 if recompute else 2
    num_bytes = times * size * (peers - 1) / peers
    from_host = times * size / workers / (LINK_SHARE * hardware.gpu.host_rate) if is_offloaded(ds_config) else 0.0
    return Gathering(num_bytes, num_bytes / rate + from_host, copy)


def is_offloaded(ds_config: dict[str, Any]) -> bool:
    """Whether the GPUs' parts of the base lie in their machines' memory."""
    return ds_config["zero_optimization"].get("offload_param", {}).get("device") == "cpu"


@functools.cache
def pass_memory(shape: Shape, train: str, num_samples: int, num_tokens: int) -> tuple[GangBytes, dict[str, float]]:
    """What a gang takes, and one student's activations, kept and recomputed.

    Args:
        train: the TrainConfig as JSON.
    """
    config = TrainConfig.model_validate_json(train)
    adapted = shape.adapted(config.lora.target_modules)
    need = known_gang_bytes(shape.config, shape.dtype, config, adapted, num_samples, num_tokens, flash=True)
    other = config.model_copy(update={"gradient_checkpointing": not config.gradient_checkpointing})
    size = PassSize(1, num_samples, num_tokens, num_tokens, flash=True)
    beside = known_activations(shape.config, shape.dtype, other, size)
    kept, recomputed = (beside, need.activations) if config.gradient_checkpointing else (need.activations, beside)
    return need, {"kept": kept, "recomputed": recomputed}


def queue_passes(num_steps: Sequence[int], gang_size: int) -> int:
    """Steps of a gang until its queue is done: whoever is done makes room for the next, and takes one step in each."""
    ends = [0] * min(gang_size, len(num_steps))
    for steps in num_steps:
        slot = ends.index(min(ends))
        ends[slot] += steps
    return max(ends, default=0)


def plan_training(
    shape: Shape, train: TrainConfig, ds_config: dict[str, Any], sizes: list[JobSize], hardware: Hardware
) -> TrainingPlan:
    """Lay the trainings out as the run does, on as many workers as there are GPUs.

    Args:
        shape: of the target base.
        ds_config: the DeepSpeed config that `train` names.
        sizes: the trainings.
    """
    num_workers = hardware.num_gpus
    layout = lay_out(sizes, num_workers)
    samples = min(train.micro_batch_size, math.ceil(train.batch_size / layout.ranks_per_group))
    adapted = shape.adapted(train.lora.target_modules)
    max_tokens = max(size.max_tokens for size in sizes)
    mean_tokens = sum(s.num_steps * s.mean_tokens for s in sizes) / sum(s.num_steps for s in sizes)
    memory: dict[str, float] = {
        "its part of the base": 0 if is_offloaded(ds_config) else shape.num_bytes / num_workers,
        "gathered layers and head": gathered_weights(shape.weights, ds_config) * shape.dtype.itemsize,
    }
    check_partitions(ds_config, num_workers, f"distill.ds_config {train.ds_config}")
    gathered = gathering(shape, ds_config, hardware, recompute=train.gradient_checkpointing)
    if gathered.copy_bytes:
        memory["the machine's copy"] = gathered.copy_bytes
    free = hardware.room - sum(memory.values())
    need, activations = pass_memory(shape, train.model_dump_json(), samples, max_tokens)
    weights = shape.num_active
    if train.lora.flat_sigma:  # the noise is multiplied as the weights are
        weights += sum(num_out * num_in for num_out, num_in in adapted.values())
    flops_per_token = (6 if train.gradient_checkpointing else 4) * weights
    wanted = gathered.seconds / GATHER_SHARE * hardware.train_flops / flops_per_token
    wanted = max(wanted, TOKENS_PER_PASS["cuda"])  # as in the run, which does not know the links
    tokens_per_pass = math.ceil(wanted) if train.tokens_per_pass == "auto" else train.tokens_per_pass
    gang = choose_gang_size(
        sizes,
        layout,
        train.model_copy(update={"tokens_per_pass": tokens_per_pass}),
        device="cuda",
        free_bytes=int(free),
        gang_bytes=lambda num_samples, num_tokens: need,
    )
    own = student_bytes(adapted, train.lora, shape.dtype)
    memory["students"] = gang * own
    passing = need.of(gang) - gang * own
    memory["activations"] = min(passing, gang * need.activations)
    memory["logits and gradients"] = passing - memory["activations"]
    micro = math.ceil(math.ceil(train.batch_size / layout.ranks_per_group) / samples)
    passes = max(queue_passes([sizes[index].num_steps for index in queue], gang) for queue in layout.queues) * micro
    tokens = min(gang, max(map(len, layout.queues))) * samples * mean_tokens
    return TrainingPlan(
        gang_size=gang,
        tokens_wanted=tokens_per_pass,
        passes=passes,
        tokens_per_pass=tokens,
        samples_per_student=samples,
        checkpointed=sum(min(gang, len(queue)) for queue in layout.queues),
        memory=memory,
        activations=activations,
        gathered_bytes=gathered.num_bytes,
        compute_seconds=flops_per_token * tokens / hardware.train_flops,
        gather_seconds=gathered.seconds,
    )
