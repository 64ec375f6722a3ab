"""How actors hold the bases of synthesis and gate: memory by engine, how many GPUs an actor gets, loading."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from translora.config import BaseModelConfig, FleetConfig
from translora.engine.fake import attention_shape
from translora.engine.memory import BANK_SHARE, VLLM_SHARE, Sizes, bank_numbers, union
from translora.engine.vllm_settings import MAX_LORAS, RANKS
from translora.errors import InputError
from translora.plan.hardware import Hardware
from translora.plan.inference import ROUNDS, Calls, prompt_pass_bytes, seconds
from translora.plan.shape import Shape, Shapes

TENSOR_PARALLEL = 0.75
"""Of the sum of its GPUs' speeds, what an actor of several has with vLLM; an assumption."""
BATCHED_TOKENS = 16384
"""Of a pass of vLLM, at most, unless `max_num_batched_tokens` says otherwise."""
SEQUENCES = 256
"""That vLLM decodes together, unless `max_num_seqs` says otherwise."""


@dataclass(frozen=True)
class Stage:
    """A phase on actors: a base, its rows, and the adapters on it."""

    name: str
    base: BaseModelConfig
    shape: Shape
    calls: Calls
    adapters: Sequence[Sizes]
    """Of the bank: teachers and discriminators, or students."""
    batch_size: int

    @property
    def options(self) -> Mapping[str, Any]:
        """vLLM's engine arguments; empty with transformers."""
        return self.base.vllm or {}

    def tensor_parallel(self, count: int) -> int:
        """GPUs that share a layer, of so many of an actor."""
        own: int = self.options.get("tensor_parallel_size", count // self.options.get("pipeline_parallel_size", 1))
        return own

    def runs_on(self, count: int) -> bool:
        """Whether an actor of so many GPUs can compute the base: vLLM deals out its heads to all of them."""
        if self.base.vllm is None:
            return True
        tensor = self.tensor_parallel(count)
        if tensor < 1 or tensor * self.options.get("pipeline_parallel_size", 1) != count:
            return False
        heads, groups, _ = attention_shape(self.shape.config.get_text_config())
        return heads % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)

    def speed(self, count: int) -> float:
        """Of an actor, in GPUs: transformers computes one part of a base after the other."""
        return count * TENSOR_PARALLEL if self.base.vllm is not None and count > 1 else 1.0

    def room(self, hardware: Hardware) -> float:
        """Bytes of a GPU for the base and its batches; of vLLM's the share that it takes of the whole."""
        if self.base.vllm is None:
            return hardware.room
        share = float(self.options.get("gpu_memory_utilization", VLLM_SHARE))
        return min(hardware.room, share * hardware.gpu.memory_bytes)

    def num_resident(self, count: int, hardware: Hardware) -> int:
        """Adapters that an actor holds at a time: all, or those of a block, as translora.actors.host decides."""
        if self.bank_bytes <= BANK_SHARE * count * hardware.gpu.memory_bytes:
            return len(self.adapters)
        return min(len(self.adapters), 2 * self.batch_size)

    @functools.cached_property
    def bank_bytes(self) -> int:
        """Of a bank of all adapters."""
        return bank_numbers(self.adapters) * self.shape.dtype.itemsize

    @functools.cached_property
    def ranks(self) -> tuple[tuple[str, int], ...]:
        """Of the bank, by module."""
        return tuple((module, rank) for module, (rank, _) in sorted(union(self.adapters).items()))

    @functools.cached_property
    def slot_bytes(self) -> int:
        """Of one of vLLM's slots, which are all alike: of every module, and of the greatest rank."""
        modules = union(self.adapters)
        most = max((own for own, _ in modules.values()), default=0)
        rank = min((value for value in RANKS if value >= most), default=most)
        return rank * sum(width for _, width in modules.values()) * self.shape.dtype.itemsize

    def token_bytes(self, count: int) -> float:
        """Keys and values of a token on each GPU: vLLM copies heads to those that would have none."""
        if self.base.vllm is None:
            return self.shape.cache_bytes / count
        tensor = self.tensor_parallel(count)
        dealt = 1 if self.shape.is_latent else min(tensor, attention_shape(self.shape.config.get_text_config())[1])
        return self.shape.cache_bytes / dealt / (count // tensor)

    def memory(self, count: int, hardware: Hardware) -> dict[str, float]:
        """Bytes of each GPU of an actor by what they are for; of vLLM the least that it starts with."""
        shape, item, vocabulary = self.shape, self.shape.dtype.itemsize, self.shape.config.get_text_config().vocab_size
        base = {"the base": shape.num_bytes / count}
        if self.base.vllm is None:
            rows = math.ceil(self.batch_size * self.calls.distinct)
            tokens = max(1, int(self.calls.context_tokens - self.calls.new_tokens))
            return base | {
                "adapters": self.bank_bytes * self.num_resident(count, hardware) / max(1, len(self.adapters)) / count,
                "keys and values": self.batch_size * self.calls.context_tokens * self.token_bytes(count),
                "pass over the prompts": prompt_pass_bytes(shape, rows, tokens, self.ranks),
                "logits": rows * vocabulary * (item + 4),  # of last tokens, in the base's dtype and in float32
            }
        tokens = self.options.get("max_num_batched_tokens", BATCHED_TOKENS)
        slots = min(len(self.adapters), self.options.get("max_loras", MAX_LORAS))
        return base | {
            # One factor of each pair is dealt out, the other is on every GPU.
            "adapters": slots * self.slot_bytes * (1 + 1 / count) / 2,
            "keys and values of one row": self.longest_row * self.token_bytes(count),
            "pass of max_num_batched_tokens": prompt_pass_bytes(shape, 1, tokens),
            "logits": self.options.get("max_num_seqs", SEQUENCES)
            * vocabulary
            * (item + 4)
            / self.tensor_parallel(count),
        }

    @property
    def longest_row(self) -> int:
        """Tokens that vLLM wants to have room for, whatever its rows are."""
        context = getattr(self.shape.config.get_text_config(), "max_position_embeddings", None) or 0
        asked = self.options.get("max_model_len", context)
        return int(asked if asked > 0 else self.calls.context_tokens)

    def rows_at_once(self, count: int, hardware: Hardware) -> int:
        """That decode together: the batch, of which vLLM queues what its memory does not hold."""
        if self.base.vllm is None:
            return self.batch_size
        memory = self.memory(count, hardware)
        free = self.room(hardware) - sum(memory.values()) + memory["keys and values of one row"]
        held = int(free / (self.calls.context_tokens * self.token_bytes(count)))
        return max(1, min(self.batch_size, self.options.get("max_num_seqs", SEQUENCES), held))

    def parts(self, count: int, hardware: Hardware) -> dict[str, float]:
        """Seconds by what takes them, without loading."""
        rows, num_actors = self.rows_at_once(count, hardware), hardware.num_groups(count)
        return seconds(self.calls, self.shape, hardware, rows, num_actors, self.speed(count))


def gpus_per_actor(stages: Sequence[Stage], config: FleetConfig, shapes: Shapes, hardware: Hardware) -> int:
    """Of those counts that fit, the one that is done first; where several are, the one with the most memory.

    Raises:
        InputError: vLLM cannot have any.
    """
    counts = [count for count in range(1, hardware.gpus_at_hand + 1) if all(one.runs_on(count) for one in stages)]
    if not counts:
        raise InputError(
            f"vllm: no actor of 1 to {hardware.gpus_at_hand} GPUs can be: tensor_parallel_size has to divide the "
            "attention heads, and times pipeline_parallel_size be no more than the GPUs of a machine; change them"
        )
    fitting = [
        count
        for count in counts
        if all(sum(one.memory(count, hardware).values()) <= one.room(hardware) for one in stages)
    ]
    if not fitting:
        return counts[-1]

    def total(count: int) -> float:
        loads = load_seconds(config, shapes, hardware, count)
        return sum(sum(one.parts(count, hardware).values()) + loads[one.name] for one in stages)

    return min(fitting, key=lambda count: (round(total(count), 3), -count))


def load_seconds(config: FleetConfig, shapes: Shapes, hardware: Hardware, per_actor: int) -> dict[str, float]:
    """Seconds of reading the bases: once each, or in every round where an actor cannot hold both."""
    source, target, generator = shapes.source, shapes.target, shapes.generator
    # As translora.actors.host decides when the second base comes: the first one stays where there is room beside it.
    memory = per_actor * hardware.gpu.memory_bytes

    def held(base: BaseModelConfig, num_bytes: float) -> float:
        share = (base.vllm or {}).get("gpu_memory_utilization", VLLM_SHARE)
        return num_bytes if base.vllm is None else float(share) * memory

    both = held(config.generator, generator.num_bytes) + held(config.source, 2 * source.num_bytes)
    times = 1 if both <= per_actor * hardware.room else ROUNDS
    readers = max(1, hardware.gpus_at_hand // per_actor)

    def read(shape: Shape, times: int) -> float:
        return times * readers * shape.num_bytes / hardware.load_rate

    return {
        "generate": read(generator, times),
        "screen and label": read(source, times),
        "gate": read(target, 1),
        "distill": target.num_bytes / hardware.num_nodes / hardware.load_rate,
    }
