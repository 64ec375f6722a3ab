"""`translora prepare`: the owner's side, run once while the data is at hand (arXiv 2405.17258, section 3).

seeds -> negatives (invented by the source base) -> adapter where there is none, discriminator -> bundle.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translora.bundle import Bundle, BundleError, inspect_base, read_bundle, write_bundle
from translora.bundle.adapter import check_adapter, check_recorded_base
from translora.bundle.base import BaseInfo
from translora.config import PrepareConfig, PrepareEntry
from translora.distill.job import FAILURE, TrainJob
from translora.distill.launch import train_adapters
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.run.files import derive_seed, digest, read_jsonl, sha256_file, sha256_path, write_jsonl
from translora.run.progress import Progress
from translora.run.rundir import open_run
from translora.run.tracker import Tracker
from translora.synthesis.actors import Row, cut_blocks, run_blocks
from translora.synthesis.discriminator import discriminator_rows
from translora.synthesis.prompts import generation_order, generation_row, normalise
from translora.synthesis.stages import generate_block

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One bundle to make."""

    entry: PrepareEntry
    rows: list[dict[str, Any]]
    seeds: list[str]
    output: Path


def prepare(config: PrepareConfig) -> list[Bundle]:
    """Make the bundles; those whose directory is already a bundle made from the same data are skipped.

    Raises:
        ValueError: the config, the base or the data of a task cannot be used.
    """
    base = inspect_base(config.source.model)
    template = prompt_format(load_tokenizer(config.source.model), config.prompt_template).template
    tasks = [read_task(config, entry) for entry in config.tasks]
    for task in tasks:
        if task.entry.adapter is not None:
            check_recorded_base(Path(task.entry.adapter), base.name, "give an adapter of this base")
            check_adapter(Path(task.entry.adapter), base)
    with (
        open_run(config.run_dir, config),
        Tracker(config.run_dir, config.tracking, config.model_dump(mode="json"), config.run_dir.name) as tracker,
    ):
        todo = [task for task in tasks if not is_made(task, base)]
        if todo:
            negatives = invent_negatives(config, tasks, base)  # all tasks: a rerun finds the same batches again
            train(config, todo, negatives, base, template, tracker)
            for task in todo:
                make_bundle(config, task, base, template)
    return [read_bundle(task.output) for task in tasks]


def read_task(config: PrepareConfig, entry: PrepareEntry) -> Task:
    """Read a task's data and choose its seeds."""
    rows = read_jsonl(entry.data, required=("input", "target"))
    if entry.seeds is not None:
        seeds = [row["input"] for row in read_jsonl(entry.seeds, required=("input",))]
    else:
        seeds = choose_seeds(rows, config.num_seeds, derive_seed(config.seed, entry.name, "seeds"))
        if len(seeds) < config.num_seeds:
            raise ValueError(f"{entry.data}: {len(seeds)} different inputs, but num_seeds is {config.num_seeds}")
    return Task(entry, rows, seeds, config.output_dir / entry.name)


def choose_seeds(rows: list[dict[str, Any]], num_seeds: int, seed: int) -> list[str]:
    """Different inputs drawn at random, one from each target in turn, the frequent targets first.

    An answer class without a seed would be missing from the synthetic set.
    """
    distinct = sorted({normalise(row["input"]): row for row in rows}.values(), key=lambda row: row["input"])
    random.Random(seed).shuffle(distinct)
    by_target: dict[str, list[str]] = {}
    for row in distinct:
        by_target.setdefault(normalise(row["target"]), []).append(row["input"])
    classes = sorted(by_target.values(), key=len, reverse=True)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*classes))
    return [text for text in turns if text is not None][:num_seeds]


def is_made(task: Task, base: BaseInfo) -> bool:
    """Whether the task's bundle exists, of this base and this data."""
    try:
        manifest = read_bundle(task.output).manifest
    except BundleError:
        return False
    return manifest.base_fingerprint == base.fingerprint and all(
        manifest.provenance.get(key) == value for key, value in provenance(task).items()
    )


def provenance(task: Task) -> dict[str, str]:
    """Hashes of what a bundle is made from."""
    entry = task.entry
    made_from = {"data_sha256": sha256_file(Path(entry.data))}
    if entry.adapter is not None:
        made_from["adapter_sha256"] = sha256_path(Path(entry.adapter))
    if entry.seeds is not None:
        made_from["seeds_sha256"] = sha256_file(Path(entry.seeds))
    return made_from


def invent_negatives(config: PrepareConfig, tasks: list[Task], base: BaseInfo) -> dict[str, list[str]]:
    """Inputs invented by the source base from the seeds: the discriminator's negatives."""
    rows: list[Row] = []
    for task in tasks:
        count = min(len(task.rows), config.discriminator.max_samples // 2)
        for sample_id in range(count):
            orderings = config.synthesis.num_orderings
            rows.append(generation_row(task.entry.name, task.seeds, sample_id, config.seed, orderings))
    blocks = cut_blocks(rows, config.synthesis.batch_size, generation_order)
    settings = {"sampling": config.synthesis.sampling.model_dump()}
    key = digest(blocks, settings, config.source.model_dump(), base.fingerprint)
    with Progress("invent negatives", len(rows)) as progress:
        generated = run_blocks(
            blocks,
            generate_block,
            base=config.source,
            adapters={},
            settings=settings,
            resources=config.resources,
            directory=config.run_dir / "negatives" / key,
            on_block=progress.fraction,
        )
    real = {task.entry.name: {normalise(row["input"]) for row in task.rows} for task in tasks}
    negatives: dict[str, list[str]] = {task.entry.name: [] for task in tasks}
    for row in sorted(generated, key=lambda row: (row["adapter"], row["sample_id"])):
        key = normalise(row["text"])
        if row["finished"] and key and key not in real[row["adapter"]]:
            real[row["adapter"]].add(key)
            negatives[row["adapter"]].append(row["text"])
    return negatives


def train(
    config: PrepareConfig,
    tasks: list[Task],
    negatives: dict[str, list[str]],
    base: BaseInfo,
    template: str,
    tracker: Tracker,
) -> None:
    """Train missing adapters and all discriminators on one worker group that holds the source base.

    Raises:
        ValueError: the data of a task cannot be trained on.
    """
    jobs = []
    for task in tasks:
        name = task.entry.name
        seed = derive_seed(config.seed, name, "discriminator")
        inputs = [row["input"] for row in task.rows]
        questions = discriminator_rows(inputs, negatives[name], name, config.discriminator.max_samples, seed)
        parts = [("discriminator", questions, config.discriminator.epochs, config.discriminator.learning_rate)]
        if task.entry.adapter is None:
            answers = [{"input": row["input"], "answer": row["target"].strip()} for row in task.rows]
            parts.insert(0, ("adapter", answers, config.train.epochs, config.train.learning_rate))
        for kind, rows, epochs, learning_rate in parts:
            work_dir = config.run_dir / "tasks" / f"{name}-{digest(rows)}" / kind
            write_jsonl(work_dir / "data.jsonl", rows)
            (work_dir / FAILURE).unlink(missing_ok=True)
            jobs.append(
                TrainJob(
                    name=f"{name}/{kind}",
                    data=str(work_dir / "data.jsonl"),
                    output=str(config.run_dir / "adapters" / name / kind),
                    work_dir=str(work_dir),
                    seed=derive_seed(config.seed, name, kind),
                    epochs=epochs,
                    learning_rate=learning_rate,
                    template=template,
                    with_end=kind == "adapter",
                )
            )
    total_steps = sum(job.expected_steps(config.train.batch_size) for job in jobs)
    steps: dict[str, int] = {}

    def on_step(job_name: str, row: dict[str, float]) -> None:
        name, _, kind = job_name.rpartition("/")
        steps[job_name] = int(row["step"])
        progress.update(sum(steps.values()), f"{job_name} loss {row['loss']:.3f}")
        tracker.log({f"loss/{kind}": row["loss"]}, step=int(row["step"]), adapter=name)

    with Progress("train", total_steps) as progress:
        train_adapters(config.source, base.name, jobs, config.train, config.resources, config.run_dir, on_step)
    for job in jobs:
        failure = Path(job.work_dir) / FAILURE
        if failure.is_file():
            raise ValueError(json.loads(failure.read_text(encoding="utf-8"))["reason"])


def make_bundle(config: PrepareConfig, task: Task, base: BaseInfo, template: str) -> None:
    """Write one bundle."""
    trained = config.run_dir / "adapters" / task.entry.name
    write_bundle(
        task.output,
        adapter_dir=task.entry.adapter or trained / "adapter",
        discriminator_dir=trained / "discriminator",
        seeds=task.seeds,
        task_name=task.entry.name,
        base=base,
        num_samples=len(task.rows),
        prompt_template=template,
        provenance={**provenance(task), "seed": config.seed},
    )
    logger.info("%s: bundle written to %s", task.entry.name, task.output)
