"""A plan as tables, or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import yaml
from rich.console import Console, Group, RenderableType
from rich.table import Table

from translora.plan.fleet import FleetPlan


def as_json(plans: Sequence[FleetPlan]) -> str:
    """All numbers; bytes, seconds and hours as their names say."""
    found = []
    for plan in plans:
        one = {
            "gpu": plan.hardware.gpu.name,
            "num_gpus": plan.hardware.num_gpus,
            "num_adapters": len(plan.work.adapters),
            "phases": [
                {**dataclasses.asdict(phase), "hours": phase.hours, "bound": phase.bound} for phase in plan.phases
            ],
            "training": dataclasses.asdict(plan.training),
            "hours": plan.hours,
            "adapters_per_gpu_hour": plan.adapters_per_gpu_hour,
            "disk": plan.disk,
            "settings": plan.settings,
            "problems": plan.problems,
        }
        found.append(one)
    return json.dumps(found, indent=1)


def gigabytes(num_bytes: float) -> str:
    """With one decimal where it matters."""
    value = num_bytes / 1e9
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def render(plan: FleetPlan) -> RenderableType:
    """The tables of one plan."""
    hardware = plan.hardware
    table = Table(
        title=f"{len(plan.work.adapters)} adapters on {hardware.num_gpus} x {hardware.gpu.name}",
        title_justify="left",
        caption=f"{plan.work.origin}; {plan.work.mean_acceptance:.0%} of the inputs accepted",
        caption_justify="left",
    )
    for column in ("phase", "base", "GPUs", "batch, gang", "GB a GPU", "gathered a pass", "hours", "bound by"):
        table.add_column(column, justify="right" if column in ("GB a GPU", "gathered a pass", "hours") else "left")
    for phase in plan.phases:
        needed = sum(phase.memory.values())
        gathered = f"{gigabytes(phase.gathered_bytes)} GB" if phase.gathered_bytes else ""
        fits = f"{gigabytes(needed)} of {gigabytes(phase.room)}"
        table.add_row(
            phase.name, phase.base, phase.layout, phase.step, fits, gathered, f"{phase.hours:.2f}", phase.bound
        )
    memory = Table(title="Memory, GB a GPU", title_justify="left")
    memory.add_column("phase")
    memory.add_column("what is there")
    for phase in plan.phases:
        memory.add_row(phase.name, ", ".join(f"{what} {gigabytes(size)}" for what, size in phase.memory.items()))
    training = plan.training
    kept, recomputed = training.activations["kept"], training.activations["recomputed"]
    lines = [
        f"one student's activations: {gigabytes(kept)} GB kept, {gigabytes(recomputed)} GB with gradient_checkpointing",
        f"a pass of the distillation: {training.compute_seconds:.2f} s of arithmetic, {training.gather_seconds:.2f} s "
        f"of gathering; {training.passes:,} passes of the worker that has most to do",
        f"whole fleet: {plan.hours:.1f} hours, {plan.adapters_per_gpu_hour:.2f} adapters per GPU-hour",
        "disk: " + ", ".join(f"{what} {gigabytes(size)} GB" for what, size in plan.disk.items()),
    ]
    if plan.note:
        lines.append(plan.note)
    if plan.problems:
        lines += [f"does not fit: {problem}" for problem in plan.problems]
    else:
        lines += ["settings for the fleet file:", yaml.safe_dump(plan.settings, sort_keys=False).rstrip()]
    return Group(table, memory, *lines)


def print_plans(plans: Sequence[FleetPlan], console: Console) -> None:
    """One after the other."""
    for plan in plans:
        console.print(render(plan), markup=False, highlight=False)
        console.print()
