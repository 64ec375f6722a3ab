"""`translora prepare`: the owner's side, run once while the data is at hand (arXiv 2405.17258, section 3).

seeds -> negatives (invented by the source base) -> adapter where there is none, discriminator -> what it can tell
apart -> bundle. Where the data is gone: adapter and seeds -> bundle.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translora.bundle import Bundle, BundleError, read_bundle, verify_bundle, write_bundle
from translora.bundle.adapter import check_adapter, check_recorded_base
from translora.bundle.base import BaseInfo, info_of, pinned, refuse_encoder_decoder
from translora.bundle.bundle import MIN_SEEDS, is_foreign
from translora.bundle.manifest import MANIFEST, SEEDS, DiscriminatorQuality
from translora.config import DiscriminatorConfig, PrepareConfig, PrepareEntry, TrainConfig
from translora.distill.job import TrainJob, make_job, refuse_failures
from translora.distill.launch import train_adapters
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.engine.protocol import check_answers
from translora.engine.vllm_settings import check_engine
from translora.run.files import derive_seed, digest, read_jsonl, sha256_file, sha256_path
from translora.run.rundir import EXECUTION_ONLY, open_run
from translora.run.tracker import Tracker
from translora.run.verify import check_section, check_source
from translora.synthesis.actors import Hosts, run_rows
from translora.synthesis.calls import Row
from translora.synthesis.discriminator import UNSEEN_SHARE, Inputs, Judge, discriminator_rows, hold_out, measure
from translora.synthesis.prompts import generation_order, generation_row, normalise
from translora.synthesis.stages import generate_block

logger = logging.getLogger(__name__)
MADE_FROM = ("data_sha256", "adapter_sha256", "seeds_sha256", "num_samples", "recipe")
"""Entries of a bundle's provenance that say what it was made from."""
MIN_ROWS = 2
NUM_SAMPLES = 250
"""|D| where there is no data."""


@dataclass(frozen=True)
class Task:
    """One bundle to make."""

    entry: PrepareEntry
    rows: list[dict[str, Any]]
    """None of them where the data is gone."""
    seeds: list[str]
    output: Path

    @property
    def num_samples(self) -> int:
        """|D|."""
        return self.entry.num_samples or len(self.rows) or NUM_SAMPLES


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
        if task.entry.adapter is not None:
            check_recorded_base(Path(task.entry.adapter), base.name, "give an adapter of this base")
            check_adapter(Path(task.entry.adapter), base)
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
            check_answers(config.source)
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


def read_task(config: PrepareConfig, entry: PrepareEntry) -> Task:
    """Read a task's data and choose its seeds.

    Raises:
        ValueError: data or seeds are too few, or the bundle's directory holds something else.
    """
    output = config.output_dir / entry.name
    if is_foreign(output):
        raise ValueError(
            f"{output}: exists and is not a bundle, so it is not replaced; move it away, or change output_dir"
        )
    if entry.data is None and (Path(str(entry.adapter)) / MANIFEST).exists():
        raise ValueError(f"{entry.adapter}: is a bundle already; name it in the fleet file as it is")
    rows = [] if entry.data is None else read_jsonl(entry.data, required=("input", "target"))
    if entry.data is not None and len(rows) < MIN_ROWS:
        raise ValueError(f"{entry.data}: {len(rows)} row; give {MIN_ROWS} or more")
    if entry.seeds is not None:
        seeds = [row["input"] for row in read_jsonl(entry.seeds, required=("input",))]
        if len(set(seeds)) < MIN_SEEDS:
            raise ValueError(
                f"{entry.seeds}: {len(set(seeds))} different seed(s); give {MIN_SEEDS} or more (five is usual)"
            )
    else:
        seeds = choose_seeds(rows, config.num_seeds, derive_seed(config.seed, entry.name, "seeds"))
        if len(seeds) < config.num_seeds:
            raise ValueError(
                f"{entry.data}: {len(seeds)} different inputs, but num_seeds is {config.num_seeds}; "
                "lower num_seeds or give `seeds`"
            )
    return Task(entry, rows, seeds, output)


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


def is_made(config: PrepareConfig, task: Task, base: BaseInfo) -> bool:
    """Whether the task's bundle exists, is sound, and is of this base, this data and these settings.

    A bundle of an older version tells nothing of its settings: it is kept when the data is the same.
    """
    if not (task.output / MANIFEST).exists():
        return False
    try:
        bundle = read_bundle(task.output)
        verify_bundle(bundle, base)
    except BundleError as error:
        logger.warning("%s: made anew: %s", task.entry.name, error)
        return False
    if not task.rows and bundle.discriminator_dir is not None:
        logger.warning(
            "%s: %s has a discriminator, which cannot be trained again without data: kept; to have a bundle without "
            "one, move it away",
            task.entry.name,
            task.output,
        )
        return True
    now, then = provenance(config, task), bundle.manifest.provenance
    changed = {key for key in MADE_FROM if then.get(key) != now.get(key)}
    if "recipe" not in then:
        changed.discard("recipe")
        if not changed:
            logger.info("%s: %s does not tell its settings: kept", task.entry.name, task.output)
    if changed:
        what = "settings" if changed <= {"recipe", "num_samples"} else "data"
        logger.warning("%s: %s was made with other %s: made anew", task.entry.name, task.output, what)
    return not changed


def recipe(config: PrepareConfig, task: Task) -> str:
    """Hash of the settings that decide what a bundle is, given its base and its data; the same on every machine."""
    if not task.rows:
        return digest(config.prompt_template)
    ds_config = Path(config.train.ds_config).name
    return digest(
        config.train.model_dump(exclude=EXECUTION_ONLY) | {"ds_config": ds_config},
        config.discriminator.model_dump(),
        config.synthesis.sampling.model_dump(),
        config.synthesis.num_orderings,
        config.num_seeds,
        config.seed,
        config.prompt_template,
    )


def provenance(config: PrepareConfig, task: Task) -> dict[str, str | int]:
    """What a bundle is made from, files by their hashes."""
    entry = task.entry
    made_from: dict[str, str | int] = {"recipe": recipe(config, task)}
    if entry.data is not None:
        made_from["data_sha256"] = sha256_file(Path(entry.data))
    if entry.adapter is not None:
        made_from["adapter_sha256"] = sha256_path(Path(entry.adapter))
    if entry.seeds is not None:
        made_from["seeds_sha256"] = sha256_file(Path(entry.seeds))
    if entry.num_samples is not None:
        made_from["num_samples"] = entry.num_samples
    return made_from


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
