"""The plan of a fleet: for each phase what is where in memory, how long it takes, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from translora.config import FleetConfig
from translora.distill.ds_config import PLAIN, is_resident, read_ds_config
from translora.distill.memory import checkpoint_bytes
from translora.engine.memory import num_weights
from translora.engine.vllm_settings import check_rank
from translora.errors import InputError
from translora.plan.actors import TENSOR_PARALLEL, Stage, gpus_per_actor, load_seconds
from translora.plan.hardware import Hardware
from translora.plan.inference import gate_calls, generate_calls, label_calls
from translora.plan.shape import Shape, Shapes
from translora.plan.training import TrainingPlan, is_offloaded, plan_training
from translora.plan.work import Work, training_sizes
from translora.run.state import BY_DISCRIMINATOR, LEAVING_DISCRIMINATOR


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
    room: float
    """Bytes of a GPU that the phase may take."""
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
        InputError: a DeepSpeed config, a target module or vLLM's GPUs cannot be used, a LoRA's rank is above vLLM's, or
            the students are no LoRAs.
    """
    if config.distill.peft is not None:
        raise InputError(
            "distill.peft: the plan knows students that are LoRAs; leave it out to plan for `distill.lora`"
        )
    check_rank(config.distill.lora.total_rank, config.target, "distill.lora")
    target, num_adapters = shapes.target, len(work.adapters)
    ds_config = read_ds_config(config.distill.ds_config, shapes.trained.dtype)
    training = plan_training(shapes.trained, config.distill, ds_config, training_sizes(config, work), hardware)
    adapted, lora = target.adapted(config.distill.lora.target_modules), config.distill.lora
    student = {name: (lora.total_rank, num_out + num_in) for name, (num_out, num_in) in adapted.items()}
    teachers = [one.sizes or student for one in work.adapters]
    judges = [one.judge_sizes or student for one in work.adapters if one.screen in BY_DISCRIMINATOR]
    trained = num_adapters + sum(one.screen in LEAVING_DISCRIMINATOR for one in work.adapters)
    batch = config.synthesis.batch_size
    on_source, students = [*teachers, *judges], [student] * num_adapters
    stages = [
        Stage("generate", config.generator, shapes.generator, generate_calls(config, work), [], batch),
        Stage("screen and label", config.source, shapes.source, label_calls(config, work), on_source, batch),
        Stage("gate", config.target, target, gate_calls(config, work), students, batch),
    ]
    per_actor = gpus_per_actor(stages, config, shapes, hardware)
    num_actors = hardware.num_groups(per_actor)
    loads = load_seconds(config, shapes, hardware, per_actor)
    phases = [
        PhasePlan(
            stage.name,
            stage.shape.name,
            f"{counted(num_actors, 'actor')} of {counted(per_actor, 'GPU')}",
            counted(stage.rows_at_once(per_actor, hardware), "row"),
            stage.memory(per_actor, hardware),
            stage.room(hardware),
            {**stage.parts(per_actor, hardware), "loading": loads[stage.name]},
        )
        for stage in stages
    ]
    is_whole = is_resident(ds_config, shapes.trained.weights.total)
    phases.insert(2, distill_phase(target, training, hardware, loads["distill"]))
    for phase in phases:
        phase.problem = too_large(phase, config, hardware, training.gang_size, is_whole=is_whole)
    settings: dict[str, dict[str, Any]] = {
        "resources": {"num_actors": num_actors, "gpus_per_actor": per_actor},
        "distill": {"num_workers": hardware.num_gpus, "tokens_per_pass": training.tokens_wanted},
    }
    rows = sum(work.num_generated(one, config) * (one.input_tokens + one.answer_tokens) for one in work.adapters)
    disk = {
        "students and discriminators": trained * 4.0 * num_weights(student),
        "checkpoints of the gangs": training.checkpointed * checkpoint_bytes(adapted, lora),
        "synthetic sets and blocks": 3 * 4 * rows,
    }
    notes = []
    if in_vllm := [stage for stage in stages if stage.base.vllm is not None]:
        copied = max(
            4 * sum(sorted(map(num_weights, one.adapters))[-one.num_resident(per_actor, hardware) :]) for one in in_vllm
        )
        disk["vLLM's copies of adapters, on each machine"] = copied * max(1, hardware.gpus_at_hand // per_actor)
        notes.append(
            f"vllm: an actor's GPUs work together, at {TENSOR_PARALLEL:.0%} of their speeds (assumed); the memory is "
            "the least that it starts with, the rest of its share holds more rows"
        )
    if is_offloaded(ds_config):
        share = target.num_bytes * hardware.gpus_at_hand / hardware.num_gpus
        notes.append(f"offloaded: {share / 1e9:.0f} GB of the base in the memory of each machine, beside all else")
    return FleetPlan(hardware, work, phases, training, settings, disk, "\n".join(notes))


def counted(count: int, noun: str) -> str:
    """So many of them."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def distill_phase(shape: Shape, training: TrainingPlan, hardware: Hardware, loading: float) -> PhasePlan:
    """The distillation as a line of the plan."""
    longer = "gathering" if training.gather_seconds > training.compute_seconds else "arithmetic"
    return PhasePlan(
        name="distill",
        base=shape.name,
        layout=f"{counted(hardware.num_gpus, 'worker')}, ZeRO-3",
        step=f"K = {training.gang_size}, {training.tokens_per_pass:,.0f} tokens",
        memory=training.memory,
        room=hardware.room,
        parts={longer: training.seconds, "loading": loading},
        gathered_bytes=training.gathered_bytes,
    )


def too_large(phase: PhasePlan, config: FleetConfig, hardware: Hardware, gang_size: int, *, is_whole: bool) -> str:
    """Why a phase does not fit and what to change; empty where it does.

    Args:
        is_whole: whether every GPU keeps all of the base that the students are trained on.
    """
    needed, room = sum(phase.memory.values()), phase.room
    if needed <= room:
        return ""
    largest = max(phase.memory, key=lambda part: phase.memory[part])
    why = (
        f"{phase.name}: {needed / 1e9:.0f} GB a GPU, of which {hardware.gpu.name} has {room / 1e9:.0f} for it; most is "
        f"{largest} ({phase.memory[largest] / 1e9:.0f} GB)"
    )
    if phase.name != "distill":
        if phase.memory["the base"] > hardware.room:
            return f"{why}; take larger GPUs, or more of them in a machine"
        if "keys and values of one row" in phase.memory:
            return f"{why}; raise vllm.gpu_memory_utilization, or lower vllm.max_model_len or max_num_batched_tokens"
        return f"{why}; lower synthesis.batch_size, or take more or larger GPUs"
    if phase.memory["its part of the base"] + phase.memory["gathered layers and head"] > room:
        if is_whole:
            return f"{why}; set distill.ds_config to {PLAIN}, with which a GPU gathers a layer at a time"
        return f"{why}; take more GPUs, or set distill.ds_config to zero3-offload.json"
    if gang_size > 1:
        return f"{why}; set distill.gang_size to auto"
    if largest == "students":
        return f"{why}; lower distill.lora.rank, or name fewer distill.lora.target_modules"
    if not config.distill.gradient_checkpointing:
        return f"{why}; set distill.gradient_checkpointing to true, or lower distill.micro_batch_size"
    return f"{why}; lower distill.micro_batch_size or distill.max_length"
