"""`translora prepare`: the owner's side, run once while the data is at hand (arXiv 2405.17258, section 3).

seeds -> negatives (invented by the source base) -> adapter where there is none, discriminator -> what it can tell
apart -> bundle. An adapter that is there is tried on some of its data. Where that is gone: adapter and seeds -> bundle.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from translora.actors.hosts import Hosts
from translora.bundle import Bundle, BundleError, read_bundle, write_bundle
from translora.bundle.base import BaseInfo, pinned, refuse_encoder_decoder
from translora.bundle.manifest import SEEDS, DiscriminatorQuality
from translora.bundle.task import Task, check_own_template, check_owned, is_made, provenance, read_task
from translora.config import PrepareConfig
from translora.distill.job import TrainJob, make_job
from translora.distill.launch import train_adapters
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.engine.protocol import warn_of_answers
from translora.engine.vllm_settings import check_engine
from translora.errors import InputError
from translora.gate.owned import try_adapters
from translora.run.check import check_lengths, check_section, check_seeds, check_source, context_of
from translora.run.commits import info_as_begun, note_commits
from translora.run.files import derive_seed, digest, sha256_path
from translora.run.rundir import open_run
from translora.run.tracker import Tracker
from translora.synthesis.discriminator import Inputs, Judge, discriminator_rows, measure
from translora.synthesis.negatives import invent_negatives, part_inputs

logger = logging.getLogger(__name__)


class TasksFailedError(InputError):
    """Tasks that could not be made; the bundles of the others are written."""

    def __init__(self, reasons: Mapping[str, str], bundles: Sequence[Bundle]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons, self.bundles = dict(reasons), list(bundles)


def prepare(config: PrepareConfig, start_cluster: Callable[[], None] = lambda: None) -> list[Bundle]:
    """Make the bundles; those whose directory is already a sound bundle of the same data and settings are skipped.

    Args:
        start_cluster: called before the first training.

    Raises:
        InputError: the config, the base or what tasks are made from cannot be used: names all of these. Nothing was
            trained.
        TasksFailedError: what was begun failed for some tasks.
    """
    asked = config.source
    base = info_as_begun(config.run_dir, asked)
    config = config.model_copy(update={"source": pinned(asked, base)})
    check_source(config.source, base)
    tasks = read_tasks(config, base)
    check_engine(config.source)
    faults: dict[str, str] = {}
    with (
        open_run(config.run_dir, config),
        Tracker(config.run_dir, config.tracking, config.model_dump(mode="json"), config.run_dir.name) as tracker,
    ):
        note_commits(config.run_dir, (asked, base))
        todo = []
        for task in tasks:
            try:
                if not is_made(config, task, base):
                    todo.append(task)
            except InputError as error:
                faults[task.entry.name] = str(error)
        make_bundles(config, [task for task in todo if not task.rows], base, {}, faults)
        if learnt := [task for task in todo if task.rows]:
            refuse_encoder_decoder(base, "train is for", "give no `data`, but `adapter` and `seeds`")
            check_section(config.train, base, "train")
            for template in sorted({task.template for task in learnt}):
                warn_of_answers(load_tokenizer(config.source), template)
            warn_of_shipped_rows(learnt)
            start_cluster()
            try_adapters(config, learnt, base)
            negatives = invent_negatives(config, learnt, base, faults)
            learnt = [task for task in learnt if task.entry.name not in faults]
            known, unseen = part_inputs(config, learnt, negatives)
            faults |= train(config, learnt, known, base, tracker)
            trained = [task for task in learnt if task.entry.name not in faults]
            found = measure_discriminators(config, trained, unseen, base)
            make_bundles(config, trained, base, found, faults)
    bundles = [read_bundle(task.output) for task in tasks if task.entry.name not in faults]
    if faults:
        raise TasksFailedError(faults, bundles)
    return bundles


def read_tasks(config: PrepareConfig, base: BaseInfo) -> list[Task]:
    """Read what every task is made from, and how its adapter is prompted.

    Raises:
        InputError: some of it cannot be used; names all of that.
    """
    tokenizer, tasks, faults = load_tokenizer(config.source), [], []
    for entry in config.tasks:
        wanted = config.template_of(entry)
        if base.is_encoder_decoder and wanted == "auto":
            wanted = "{input}"  # an encoder reads the input as it is, by its owners' habit
        try:
            prompts = prompt_format(tokenizer, wanted)
            check_owned(entry.adapter, base)
            check_own_template(entry, wanted, tokenizer)
            task = dataclasses.replace(read_task(config, entry), template=prompts.template)
            if task.rows and entry.adapter is None:
                check_lengths(task.rows, prompts, config.train.max_length, f"{entry.data}", "train.max_length")
            if task.rows:  # its negatives are invented from its seeds
                context = context_of(config.source, base)
                check_seeds(task.seeds, tokenizer, config.synthesis.sampling, context, f"{entry.name}: the base")
            tasks.append(task)
        except InputError as error:
            own = f"{entry.name}: " if entry.prompt_template is not None else ""
            faults.append(f"{own}{error}")
    if faults:
        raise InputError("; ".join(dict.fromkeys(faults)))
    return tasks


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


def train_jobs(config: PrepareConfig, task: Task, known: Inputs) -> list[TrainJob]:
    """What is to be trained for one bundle: a discriminator, and the adapter where there is none.

    Raises:
        InputError: there is no negative to train the discriminator on.
    """
    name = task.entry.name
    seed = derive_seed(config.seed, name, "discriminator")
    questions = discriminator_rows(known, name, config.discriminator.max_samples, seed)
    if all(row["answer"] == "yes" for row in questions):
        raise InputError(
            f"{name}: no negatives for its discriminator, which would accept every input: the base invented none, and "
            f"inputs of one word cannot be shuffled; give longer inputs in {task.entry.data}, or raise "
            "synthesis.sampling.temperature"
        )
    output, work = config.run_dir / "adapters" / name, config.run_dir / "tasks"
    common: dict[str, Any] = {"root_seed": config.seed, "template": task.template}
    jobs = []
    if task.entry.adapter is None:
        answers = [{"input": row["input"], "answer": row["target"].strip()} for row in task.rows]
        common |= {"output": output / "adapter", "work_dir": work / f"{name}-{digest(answers)}" / "adapter"}
        peft = config.train.peft
        jobs.append(make_job(name, "adapter", answers, config.train, with_end=True, peft=peft, **common))
    common |= {"output": output / "discriminator", "work_dir": work / f"{name}-{digest(questions)}" / "discriminator"}
    jobs.append(make_job(name, "discriminator", questions, config.discriminator, with_end=False, **common))
    return jobs


def train(
    config: PrepareConfig,
    tasks: list[Task],
    known: dict[str, Inputs],
    base: BaseInfo,
    tracker: Tracker,
) -> dict[str, str]:
    """Train missing adapters and all discriminators on one worker group that holds the source base.

    Returns:
        Why tasks cannot be trained, by name.
    """
    jobs: list[TrainJob] = []
    faults: dict[str, str] = {}
    for task in tasks:
        try:
            jobs += train_jobs(config, task, known[task.entry.name])
        except InputError as error:
            faults[task.entry.name] = str(error)

    def on_step(job: TrainJob, row: dict[str, float]) -> None:
        tracker.log({f"loss/{job.kind}": row["loss"]}, step=int(row["step"]), adapter=job.owner)

    train_adapters(
        config.source, base.name, jobs, config.train, config.resources, config.run_dir, label="train", on_step=on_step
    )
    return faults | {job.owner: reason for job in jobs if (reason := job.failure()) is not None}


def measure_discriminators(
    config: PrepareConfig, tasks: list[Task], unseen: dict[str, Inputs], base: BaseInfo
) -> dict[str, DiscriminatorQuality]:
    """Whether the discriminators tell inputs apart that they were not trained on, by task; says what was found."""
    judges = {
        name: Judge(config.run_dir / "adapters" / name / "discriminator", name, task.template, unseen[name])
        for task in tasks
        if (name := task.entry.name) in unseen
    }
    with Hosts(config.resources, config.run_dir, config.synthesis.batch_size) as hosts:
        found = measure(
            judges,
            base=config.source,
            hosts=hosts,
            weights={name: sha256_path(judge.directory) for name, judge in judges.items()} | {"base": base.identity},
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


def make_bundles(
    config: PrepareConfig,
    tasks: Sequence[Task],
    base: BaseInfo,
    found: Mapping[str, DiscriminatorQuality],
    faults: dict[str, str],
) -> None:
    """Write the tasks' bundles; `faults` gets the reasons, by name, of those that cannot be written."""
    for task in tasks:
        try:
            make_bundle(config, task, base, found.get(task.entry.name))
        except BundleError as error:
            faults[task.entry.name] = str(error)


def make_bundle(config: PrepareConfig, task: Task, base: BaseInfo, found: DiscriminatorQuality | None) -> None:
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
        prompt_template=task.template,
        provenance={**provenance(config, task), "seed": config.seed},
        discriminator_quality=found,
    )
    logger.info("%s: bundle written to %s", task.entry.name, task.output)
