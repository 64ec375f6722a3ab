"""The plan of a fleet: for each phase what is where in memory, how long it takes, and what does not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from translora.config import BaseModelConfig, FleetConfig
from translora.distill.ds_config import read_ds_config
from translora.distill.memory import lora_weights
from translora.engine.memory import VLLM_SHARE
from translora.engine.vllm_settings import check_rank
from translora.plan.hardware import Hardware
from translora.plan.inference import (
    ROUNDS,
    TENSOR_PARALLEL,
    Calls,
    gate_calls,
    generate_calls,
    label_calls,
    num_resident,
    prompt_pass_bytes,
    seconds,
)
from translora.plan.shape import Shape, Shapes
from translora.plan.training import TrainingPlan, is_offloaded, plan_training
from translora.plan.work import Work, training_sizes


@dataclass
class PhasePlan:
    """One phase on one kind of process."""

    name: str
    base: str
    layout: str
    """How the GPUs are used."""
    step: str
    """The batch, or the gang."""
    memory: dict[str, float]
    """Bytes of a GPU by what they are for."""
    parts: dict[str, float]
    """Seconds by what takes them."""
    gathered_bytes: float = 0.0
    """By each GPU in one pass."""
    problem: str = ""
    """Why it does not fit, and what to change."""

    @property
    def hours(self) -> float:
        """Of the phase."""
        return sum(self.parts.values()) / 3600

    @property
    def bound(self) -> str:
        """What takes most of the time."""
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass
class FleetPlan:
    """All of it."""

    hardware: Hardware
    work: Work
    phases: list[PhasePlan]
    training: TrainingPlan
    settings: dict[str, dict[str, Any]]
    """What the fleet file should say for this hardware."""
    disk: dict[str, float] = field(default_factory=dict)
    """Bytes of the run directory by what they are for."""
    note: str = ""
    """What the plan does not know."""

    @property
    def problems(self) -> list[str]:
        """What does not fit."""
        return [phase.problem for phase in self.phases if phase.problem]

    @property
    def hours(self) -> float:
        """Of all phases, one after the other."""
        return sum(phase.hours for phase in self.phases)

    @property
    def adapters_per_gpu_hour(self) -> float:
        """Of the whole fleet on all GPUs."""
        return len(self.work.adapters) / (self.hours * self.hardware.num_gpus)


def plan_fleet(config: FleetConfig, shapes: Shapes, hardware: Hardware, work: Work) -> FleetPlan:
    """Plan every phase on all GPUs, with the code that the run chooses by.

    Raises:
        ValueError: a DeepSpeed config, a target module or vLLM's GPUs cannot be used, a LoRA's rank is above vLLM's, or
            the students are no LoRAs.
    """
    if config.distill.peft is not None:
        raise ValueError(
            "distill.peft: the plan knows students that are LoRAs; leave it out to plan for `distill.lora`"
        )
    check_rank(config.distill.lora.total_rank, config.target, "distill.lora")
    source, target, generator = shapes.source, shapes.target, shapes.generator
    ds_config = read_ds_config(config.distill.ds_config, shapes.trained.dtype)
    training = plan_training(shapes.trained, config.distill, ds_config, training_sizes(config, work), hardware)
    adapted = target.adapted(config.distill.lora.target_modules)
    num_weights = lora_weights(adapted, config.distill.lora.total_rank)
    num_adapters = len(work.adapters)
    bases = {"generate": config.generator, "screen and label": config.source, "gate": config.target}
    stages = (  # and how many adapters are on the base
        ("generate", generator, generate_calls(config, work), 0),
        ("screen and label", source, label_calls(config, work), 2 * num_adapters),
        ("gate", target, gate_calls(config, work), num_adapters),
    )
    batch = config.synthesis.batch_size
    passes = {name: prompt_pass(shape, calls, batch) for name, shape, calls, _ in stages}
    files = max((one.adapter_bytes or 4 * num_weights for one in work.adapters), default=0)

    def resident(num_adapters: int, count: int) -> int:
        return num_resident(files, num_adapters, batch, count * hardware.gpu.memory_bytes)

    def on_gpus(count: int) -> list[dict[str, float]]:
        """Memory of each stage on actors of so many GPUs."""
        found = []
        for name, shape, calls, on_base in stages:
            bank = resident(on_base, count) * max(files // 2, shape.dtype.itemsize * num_weights)
            cache = batch * calls.context_tokens * shape.cache_bytes
            spread = {"the base": shape.num_bytes, "adapters": bank, "keys and values": cache}
            found.append(
                {what: size / count for what, size in spread.items()} | {"pass over the prompts": passes[name]}
            )
        return found

    rooms = {name: room_of(base, hardware) for name, base in bases.items()}
    counts = [
        count
        for count in range(1, hardware.gpus_at_hand + 1)
        if all(works_on(bases[name], shape, count) for name, shape, *_ in stages)
    ]
    if not counts:
        raise ValueError("vllm: its GPUs do not divide a base's attention heads, or are more than a machine has")
    fitting = [
        count
        for count in counts
        if all(sum(own.values()) <= rooms[name] for (name, *_), own in zip(stages, on_gpus(count), strict=True))
    ]
    # A count that leaves no GPU of a machine without work comes first.
    per_actor = min(fitting, key=lambda count: (hardware.gpus_at_hand % count > 0, count)) if fitting else counts[-1]
    num_actors = hardware.num_gpus // per_actor
    loads = load_seconds(config, shapes, hardware, per_actor)
    together = per_actor * TENSOR_PARALLEL if per_actor > 1 else 1.0
    phases = [
        PhasePlan(
            name,
            shape.name,
            f"{num_actors} actors of {per_actor} GPU" + ("s" if per_actor > 1 else ""),
            f"{batch} rows",
            memory,
            {
                **seconds(calls, shape, hardware, batch, num_actors, together if bases[name].vllm is not None else 1.0),
                "loading": loads[name],
            },
        )
        for (name, shape, calls, _), memory in zip(stages, on_gpus(per_actor), strict=True)
    ]
    phases.insert(2, distill_phase(target, training, hardware, loads["distill"]))
    for phase in phases:
        phase.problem = too_large(phase, config, hardware, rooms.get(phase.name, hardware.room), training.gang_size)
    settings: dict[str, dict[str, Any]] = {
        "resources": {"num_actors": num_actors, "gpus_per_actor": per_actor},
        "distill": {"num_workers": hardware.num_gpus, "tokens_per_pass": training.tokens_wanted},
    }
    rows = sum(one.num_samples / work.acceptance * (one.input_tokens + one.answer_tokens) for one in work.adapters)
    disk = {
        "students and discriminators": 2 * num_adapters * 4.0 * num_weights,
        "checkpoints of the gangs": training.gang_size * hardware.num_gpus * 12.0 * num_weights,
        "synthetic sets and blocks": 3 * 4 * rows,
    }
    notes = []
    if any(base.vllm is not None for base in bases.values()):
        copied = sum(resident(on_base, per_actor) for name, *_, on_base in stages if bases[name].vllm is not None)
        disk["vLLM's copies of adapters, on each machine"] = copied * files * max(1, hardware.gpus_at_hand // per_actor)
        notes.append(
            f"vllm: an actor's GPUs work together, at {TENSOR_PARALLEL:.0%} of their speeds (assumed); the memory is "
            "the least that vllm.gpu_memory_utilization has to give it"
        )
    if is_offloaded(ds_config):
        share = target.num_bytes * hardware.gpus_at_hand / hardware.num_gpus
        notes.append(f"offloaded: {share / 1e9:.0f} GB of the base in the memory of each machine, beside all else")
    return FleetPlan(hardware, work, phases, training, settings, disk, "\n".join(notes))


def works_on(base: BaseModelConfig, shape: Shape, num_gpus: int) -> bool:
    """Whether a base can be computed by an actor of so many GPUs: vLLM deals its heads out to all of them."""
    if base.vllm is None:
        return True
    tensor, pipeline = (base.vllm.get(f"{kind}_parallel_size") for kind in ("tensor", "pipeline"))
    if tensor is not None and tensor * (pipeline or 1) != num_gpus:
        return False
    return shape.config.get_text_config().num_attention_heads % (tensor or num_gpus) == 0


def room_of(base: BaseModelConfig, hardware: Hardware) -> float:
    """Bytes of a GPU for a base and its batches; of vLLM's the share that the fleet file gives it."""
    share = (base.vllm or {}).get("gpu_memory_utilization")
    return hardware.room if share is None else min(hardware.room, float(share) * hardware.gpu.memory_bytes)


def prompt_pass(shape: Shape, calls: Calls, batch_size: int) -> int:
    """Bytes of a pass over the prompts of a batch that differ."""
    num_rows = math.ceil(batch_size * calls.distinct)
    num_tokens = max(1, int(calls.context_tokens - calls.new_tokens))
    return prompt_pass_bytes(shape, num_rows, num_tokens)


def load_seconds(config: FleetConfig, shapes: Shapes, hardware: Hardware, per_actor: int) -> dict[str, float]:
    """Seconds of reading the bases: once each, or in every round where an actor cannot hold both."""
    source, target, generator = shapes.source, shapes.target, shapes.generator
    num_actors = hardware.num_gpus // per_actor
    per_node = max(1, hardware.gpus_at_hand // per_actor)
    # As translora.engine.host decides when the second base comes: the first one stays where there is room beside it.
    memory = per_actor * hardware.gpu.memory_bytes

    def held(base: BaseModelConfig, num_bytes: float) -> float:
        share = (base.vllm or {}).get("gpu_memory_utilization", VLLM_SHARE)
        return num_bytes if base.vllm is None else float(share) * memory

    both = held(config.generator, generator.num_bytes) + held(config.source, 2 * source.num_bytes)
    times = 1 if both <= per_actor * hardware.room else ROUNDS
    readers = min(num_actors, per_node)

    def read(shape: Shape, times: int) -> float:
        return times * readers * shape.num_bytes / hardware.load_rate

    num_nodes = max(1, hardware.num_gpus // hardware.gpus_per_node)
    return {
        "generate": read(generator, times),
        "screen and label": read(source, times),
        "gate": read(target, 1),
        "distill": target.num_bytes / num_nodes / hardware.load_rate,
    }


def distill_phase(shape: Shape, training: TrainingPlan, hardware: Hardware, loading: float) -> PhasePlan:
    """The distillation as a line of the plan."""
    longer = "gathering" if training.gather_seconds > training.compute_seconds else "arithmetic"
    return PhasePlan(
        name="distill",
        base=shape.name,
        layout=f"{hardware.num_gpus} workers, ZeRO-3",
        step=f"K = {training.gang_size}, {training.tokens_per_pass:,.0f} tokens",
        memory=training.memory,
        parts={longer: training.seconds, "loading": loading},
        gathered_bytes=training.gathered_bytes,
    )


def too_large(phase: PhasePlan, config: FleetConfig, hardware: Hardware, room: float, gang_size: int) -> str:
    """Why a phase does not fit and what to change; empty where it does."""
    needed = sum(phase.memory.values())
    if needed <= room:
        return ""
    largest = max(phase.memory, key=lambda part: phase.memory[part])
    why = (
        f"{phase.name}: {needed / 1e9:.0f} GB a GPU, of which {hardware.gpu.name} has {room / 1e9:.0f} for it; most is "
        f"{largest} ({phase.memory[largest] / 1e9:.0f} GB)"
    )
    if phase.name != "distill":
        if room < hardware.room:
            return f"{why}; raise vllm.gpu_memory_utilization, or lower synthesis.batch_size"
        if phase.memory["the base"] > room:
            return f"{why}; take larger GPUs, or more of them in a machine"
        return f"{why}; lower synthesis.batch_size, or take more or larger GPUs"
    if phase.memory["its part of the base"] + phase.memory["gathered layers and head"] > room:
        return f"{why}; take more GPUs, or set distill.ds_config to zero3-offload.json"
    if gang_size > 1:
        return f"{why}; set distill.gang_size to auto"
    if largest == "students":
        return f"{why}; lower distill.lora.rank, or name fewer distill.lora.target_modules"
    if not config.distill.gradient_checkpointing:
        return f"{why}; set distill.gradient_checkpointing to true, or lower distill.micro_batch_size"
    return f"{why}; lower distill.micro_batch_size or distill.max_length"
