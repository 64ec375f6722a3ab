"""What a discriminator learns to refuse: inputs that the source base invents from the seeds (arXiv 2405.17258)."""

from __future__ import annotations

from translora.bundle.base import BaseInfo
from translora.bundle.task import Task
from translora.config import PrepareConfig
from translora.run.files import derive_seed
from translora.synthesis.actors import run_rows
from translora.synthesis.calls import Row
from translora.synthesis.discriminator import UNSEEN_SHARE, Inputs, hold_out
from translora.synthesis.hosts import Hosts
from translora.synthesis.prompts import generation_order, generation_row, normalise
from translora.synthesis.stages import generate_block


def invent_negatives(config: PrepareConfig, tasks: list[Task], base: BaseInfo) -> dict[str, list[str]]:
    """Inputs invented by the source base from the seeds: the discriminator's negatives."""
    rows: list[Row] = []
    for task in tasks:
        most = config.discriminator.max_samples // 2 * UNSEEN_SHARE // (UNSEEN_SHARE - 1)
        count = min(len(task.rows), most)
        for sample_id in range(count):
            orderings = config.synthesis.num_orderings
            rows.append(generation_row(task.entry.name, task.seeds, sample_id, config.seed, sample_id % orderings))
    with Hosts(config.resources) as hosts:
        generated = run_rows(
            "invent negatives",
            rows,
            generate_block,
            base=config.source,
            hosts=hosts,
            batch_size=config.synthesis.batch_size,
            run_dir=config.run_dir,
            place="negatives/invented",
            weights=base.identity,
            settings={"sampling": config.synthesis.sampling.model_dump()},
            order=generation_order,
        )
    real = {task.entry.name: {normalise(row["input"]) for row in task.rows} for task in tasks}
    negatives: dict[str, list[str]] = {task.entry.name: [] for task in tasks}
    for row in sorted(generated, key=lambda row: (row["adapter"], row["sample_id"])):
        key = normalise(row["text"])
        if row["finished"] and key and key not in real[row["adapter"]]:
            real[row["adapter"]].add(key)
            negatives[row["adapter"]].append(row["text"])
    return negatives


def part_inputs(
    config: PrepareConfig, tasks: list[Task], negatives: dict[str, list[str]]
) -> tuple[dict[str, Inputs], dict[str, Inputs]]:
    """What each discriminator is trained on, and what it is measured on where there is enough for it; by task."""
    known, unseen = {}, {}
    for task in tasks:
        name = task.entry.name
        inputs = Inputs([row["input"] for row in task.rows], negatives[name])
        known[name], rest = hold_out(inputs, derive_seed(config.seed, name, "discriminator"))
        if rest is not None:
            unseen[name] = rest
    return known, unseen
