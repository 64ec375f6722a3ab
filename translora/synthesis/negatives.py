"""What a discriminator learns to refuse: inputs that the source base invents from the seeds (arXiv 2405.17258)."""

from __future__ import annotations

from translora.actors.blocks import generate_block
from translora.actors.calls import Row
from translora.actors.hosts import Hosts
from translora.actors.rows import run_rows
from translora.bundle.base import BaseInfo
from translora.bundle.task import Task
from translora.config import PrepareConfig
from translora.run.files import derive_seed, digest, read_object, write_json
from translora.synthesis.discriminator import UNSEEN_SHARE, Inputs, hold_out
from translora.synthesis.prompts import generation_order, generation_row, normalise


def invent_negatives(
    config: PrepareConfig, tasks: list[Task], base: BaseInfo, faults: dict[str, str]
) -> dict[str, list[str]]:
    """Inputs invented by the source base from the seeds: the discriminator's negatives, by task.

    What was invented for a task is kept in RUN/negatives: tasks that come later do not have it invented again.

    Args:
        faults: gets why a task's rows cannot be computed, by its name; it is missing from the result.
    """
    settings = {"sampling": config.synthesis.sampling.model_dump()}
    identity = base.identity
    rows = {task.entry.name: negative_rows(config, task) for task in tasks}
    files = {
        name: config.run_dir / "negatives" / f"{name}-{digest(own, settings, config.source.decides(), identity)}.json"
        for name, own in rows.items()
    }
    kept = {name: read_object(path).get("texts") for name, path in files.items()}
    missing = [name for name, texts in kept.items() if texts is None]
    if missing:
        with Hosts(config.resources, config.run_dir, config.synthesis.batch_size) as hosts:
            generated = run_rows(
                "invent negatives",
                [row for name in missing for row in rows[name]],
                generate_block,
                base=config.source,
                hosts=hosts,
                place="negatives/invented",
                weights=identity,
                settings=settings,
                order=generation_order,
                faults=faults,
            )
        generated.sort(key=lambda row: row["sample_id"])
        for name in (one for one in missing if one not in faults):
            kept[name] = [row["text"] for row in generated if row["adapter"] == name and row["finished"]]
            write_json(files[name], {"texts": kept[name]})
    negatives: dict[str, list[str]] = {}
    for task in (one for one in tasks if one.entry.name not in faults):
        known = {normalise(row["input"]) for row in task.rows} | {""}
        negatives[task.entry.name] = []
        for text in kept[task.entry.name] or []:
            if (key := normalise(text)) not in known:
                known.add(key)
                negatives[task.entry.name].append(text)
    return negatives


def negative_rows(config: PrepareConfig, task: Task) -> list[Row]:
    """Rows of `generate_block`: as many as the discriminator is trained and measured on."""
    most = config.discriminator.max_samples // 2 * UNSEEN_SHARE // (UNSEEN_SHARE - 1)
    orderings = config.synthesis.num_orderings
    return [
        generation_row(task.entry.name, task.seeds, sample_id, config.seed, sample_id % orderings)
        for sample_id in range(min(len(task.rows), most))
    ]


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
