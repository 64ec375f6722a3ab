"""`translora prepare`: the owner's side, run once while the data is at hand (arXiv 2405.17258, section 3).

seeds -> negatives (invented by the source base) -> adapter where there is none, discriminator -> what it can tell
apart -> bundle. Where the data is gone: adapter and seeds -> bundle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from translora.bundle import Bundle, read_bundle, write_bundle
from translora.bundle.base import BaseInfo, info_of, pinned, refuse_encoder_decoder
from translora.bundle.manifest import SEEDS, DiscriminatorQuality
from translora.bundle.task import Task, check_owned, is_made, provenance, read_task
from translora.config import DiscriminatorConfig, PrepareConfig, TrainConfig
from translora.distill.job import TrainJob, make_job, refuse_failures
from translora.distill.launch import train_adapters
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.engine.protocol import warn_of_answers
from translora.engine.vllm_settings import check_engine
from translora.run.check import check_section, check_source
from translora.run.files import derive_seed, digest, sha256_path
from translora.run.rundir import open_run
from translora.run.tracker import Tracker
from translora.synthesis.discriminator import Inputs, Judge, discriminator_rows, measure
from translora.synthesis.hosts import Hosts
from translora.synthesis.negatives import invent_negatives, part_inputs

logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig, start_cluster: Callable[[], None] = lambda: None) -> list[Bundle]:
    """Make the bundles; those whose directory is already a sound bundle of the same data and settings are skipped.

    Args:
        start_cluster: called before the first training.

    Raises:
        ValueError: the config, the base or the data of a task cannot be used.
    """
    tasks = [read_task(config, entry) for entry in config.tasks]
    base = info_of(config.source)
    check_source(config.source, base)
    # An encoder reads the input as it is, by its owners' habit.
    wanted = "{input}" if base.is_encoder_decoder and config.prompt_template == "auto" else config.prompt_template
    template = prompt_format(load_tokenizer(config.source), wanted).template
    check_engine(config.source)
    for task in tasks:
        check_owned(task.entry.adapter, base)
    with (
        open_run(config.run_dir, config),
        Tracker(config.run_dir, config.tracking, config.model_dump(mode="json"), config.run_dir.name) as tracker,
    ):
        todo = [task for task in tasks if not is_made(config, task, base)]
        for task in todo:
            if not task.rows:
                make_bundle(config, task, base, template, None)
        if learnt := [task for task in todo if task.rows]:
            refuse_encoder_decoder(base, "train is for", "give no `data`, but `adapter` and `seeds`")
            check_section(config.train, base, "train")
            warn_of_answers(load_tokenizer(config.source), template)
            warn_of_shipped_rows(learnt)
            start_cluster()
            config = config.model_copy(update={"source": pinned(config.source, base)})
            # Of all tasks with data: a rerun finds the same batches again.
            negatives = invent_negatives(config, [task for task in tasks if task.rows], base)
            known, unseen = part_inputs(config, learnt, negatives)
            train(config, learnt, known, base, template, tracker)
            found = measure_discriminators(config, unseen, base, template)
            for task in learnt:
                make_bundle(config, task, base, template, found.get(task.entry.name))
    return [read_bundle(task.output) for task in tasks]


def warn_of_shipped_rows(tasks: list[Task]) -> None:
    """Tell the owner which rows of the data leave with the bundles."""
    for task in tasks:
        if task.entry.seeds is None:
            logger.warning(
                "%s: %s of the bundle will hold %d inputs of %s word for word, and they leave with it; "
                "set `seeds` to ship cleaned ones",
                task.entry.name,
                SEEDS,
                len(task.seeds),
                task.entry.data,
            )


def train_jobs(config: PrepareConfig, task: Task, known: Inputs, template: str) -> list[TrainJob]:
    """What is to be trained for one bundle: a discriminator, and the adapter where there is none.

    Raises:
        ValueError: there is no negative to train the discriminator on.
    """
    name = task.entry.name
    seed = derive_seed(config.seed, name, "discriminator")
    questions = discriminator_rows(known.real, known.invented, name, config.discriminator.max_samples, seed)
    if all(row["answer"] == "yes" for row in questions):
        raise ValueError(
            f"{name}: no negatives for its discriminator, which would accept every input: the base invented none, and "
            f"inputs of one word cannot be shuffled; give longer inputs in {task.entry.data}, or raise "
            "synthesis.sampling.temperature"
        )
    parts: list[tuple[str, list[dict[str, str]], TrainConfig | DiscriminatorConfig]] = []
    if task.entry.adapter is None:
        answers = [{"input": row["input"], "answer": row["target"].strip()} for row in task.rows]
        parts.append(("adapter", answers, config.train))
    parts.append(("discriminator", questions, config.discriminator))
    return [
        make_job(
            name,
            kind,
            rows,
            settings,
            output=config.run_dir / "adapters" / name / kind,
            work_dir=config.run_dir / "tasks" / f"{name}-{digest(rows)}" / kind,
            root_seed=config.seed,
            with_end=kind == "adapter",
            template=template,
            peft=config.train.peft if kind == "adapter" else None,
        )
        for kind, rows, settings in parts
    ]


def train(
    config: PrepareConfig,
    tasks: list[Task],
    known: dict[str, Inputs],
    base: BaseInfo,
    template: str,
    tracker: Tracker,
) -> None:
    """Train missing adapters and all discriminators on one worker group that holds the source base.

    Raises:
        ValueError: the data of a task cannot be trained on.
    """
    jobs = [job for task in tasks for job in train_jobs(config, task, known[task.entry.name], template)]

    def on_step(job_name: str, row: dict[str, float]) -> None:
        name, _, kind = job_name.rpartition("/")
        tracker.log({f"loss/{kind}": row["loss"]}, step=int(row["step"]), adapter=name)

    train_adapters(
        config.source, base.name, jobs, config.train, config.resources, config.run_dir, label="train", on_step=on_step
    )
    refuse_failures(jobs)


def measure_discriminators(
    config: PrepareConfig, unseen: dict[str, Inputs], base: BaseInfo, template: str
) -> dict[str, DiscriminatorQuality]:
    """Whether the discriminators tell inputs apart that they were not trained on, by task; says what was found."""
    judges = {
        name: Judge(config.run_dir / "adapters" / name / "discriminator", name, template, inputs)
        for name, inputs in unseen.items()
    }
    with Hosts(config.resources) as hosts:
        found = measure(
            judges,
            base=config.source,
            batch_size=config.synthesis.batch_size,
            hosts=hosts,
            run_dir=config.run_dir,
            digests={name: sha256_path(judge.directory) for name, judge in judges.items()} | {"base": base.identity},
        )
    for name, one in found.items():
        logger.info("%s: discriminator: %s", name, one)
        if not one.tells_apart:
            logger.warning(
                "%s: its discriminator was not shown to tell real inputs from invented ones, and a migration will "
                "screen without it; raise discriminator.epochs or learning_rate, or give more data",
                name,
            )
    return found


def make_bundle(
    config: PrepareConfig, task: Task, base: BaseInfo, template: str, found: DiscriminatorQuality | None
) -> None:
    """Write one bundle."""
    trained = config.run_dir / "adapters" / task.entry.name
    write_bundle(
        task.output,
        adapter_dir=task.entry.adapter or trained / "adapter",
        discriminator_dir=trained / "discriminator" if task.rows else None,
        seeds=task.seeds,
        task_name=task.entry.name,
        base=base,
        num_samples=task.num_samples,
        prompt_template=template,
        provenance={**provenance(config, task), "seed": config.seed},
        discriminator_quality=found,
    )
    logger.info("%s: bundle written to %s", task.entry.name, task.output)
