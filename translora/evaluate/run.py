"""`translora evaluate`: the retention of the method on real task data, its arms side by side, top to bottom.

For each seed: bundles on the source base -> adapters of the target base from the real data -> one migration per arm ->
every test item answered by every arm. Each stage leaves files that a rerun verifies and skips.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from translora.bundle import BaseInfo
from translora.bundle.base import pinned
from translora.bundle.hub import name_of_path
from translora.bundle.task import check_own_template, check_owned
from translora.config import ResourceConfig, TrainConfig
from translora.config_file import DType
from translora.distill.job import make_job, refuse_failures
from translora.distill.launch import train_adapters
from translora.engine.loading import load_tokenizer, resolve_dtype
from translora.engine.prompts import prompt_format
from translora.errors import InputError
from translora.evaluate.answers import Repetition, answer, migrations, task_items, write_items
from translora.evaluate.config import REAL, EvaluateConfig, without_gate
from translora.evaluate.data import Split, load_task, split
from translora.evaluate.results import BaseSize, Results, Setup, summarise
from translora.evaluate.statistics import NUM_REPLICATES
from translora.fleet import migrate
from translora.prepare import prepare
from translora.run.check import check_inputs, check_lengths, check_section, check_training, context_of
from translora.run.commits import info_as_begun, note_commits
from translora.run.files import check_writable, digest, sha256_path, write_bytes, write_jsonl
from translora.run.rundir import EXECUTION_ONLY, open_run, refuse_other_settings, versions
from translora.run.state import STUDENT, AdapterState

logger = logging.getLogger(__name__)
ITEMS = "items.parquet"
"""In a repetition's directory: every arm's answer to every test item."""


def evaluate(config: EvaluateConfig, start_cluster: Callable[[], None] = lambda: None) -> Results:
    """Measure; returns what is to be written. A rerun continues where a killed one stopped.

    Args:
        config: the evaluate file.
        start_cluster: called when everything has been checked: starts Ray.

    Raises:
        InputError: the config, a base or the data of a task cannot be used.
    """
    data = [load_task(task) for task in config.tasks]
    splits = {seed: {one.entry.name: split(one, seed) for one in data} for seed in config.seeds}
    asked = config.source, config.target
    source, target = (info_as_begun(config.run_dir, base) for base in asked)
    pins = {"source": pinned(config.source, source), "target": pinned(config.target, target)}
    config = config.model_copy(update=pins)
    if source.fingerprint == target.fingerprint:
        raise InputError(f"source and target are the same base ({source.path}); set `target` to another base")
    for base in (source, target):
        check_section(config.train, base, "train")
    if config.target.vllm is not None and config.train.peft is not None:
        raise InputError("target.vllm: vLLM computes LoRAs alone; leave it out, or train.peft")
    tokenizers = {"source": load_tokenizer(config.source), "target": load_tokenizer(config.target)}
    prepared = config.prepare(config.seeds[0])
    for entry in prepared.tasks:
        check_owned(entry.adapter, source)
        check_own_template(entry, prepared.template_of(entry), tokenizers["source"])
    fleets = {arm: config.fleet(config.seeds[0], arm) for arm in config.arms}
    for fleet in fleets.values():
        check_training(fleet, source, target)
    templates = {entry.name: prepared.template_of(entry) for entry in prepared.tasks}
    for role, base, settings in (("source", source, config.source), ("target", target, config.target)):
        context = context_of(settings, base)
        own = templates if role == "source" else dict.fromkeys(templates, "auto")
        formats = {}
        for name, template in own.items():
            try:
                formats[name] = prompt_format(tokenizers[role], template)
            except InputError as error:
                raise InputError(f"tasks.{name}: {error}") from error
        for name, part in ((name, part) for own in splits.values() for name, part in own.items()):
            inputs = (row["input"] for row in part.test)
            check_inputs(inputs, formats[name], config.synthesis.max_answer_tokens, context, f"tasks.{name}")
            check_lengths(part.train, formats[name], config.train.max_length, f"tasks.{name}", "train.max_length")
            if role == "target":
                for arm, fleet in fleets.items():
                    longest, where = fleet.distill.max_length, f"tasks.{name}, arms.{arm}"
                    check_lengths(part.train, formats[name], longest, where, "distill.max_length")
    for seed in config.seeds:
        refuse_other_settings((prepared := config.prepare(seed)).run_dir, prepared)
    for path in config.outputs:
        check_writable(path, "change `output`")
    with open_run(config.run_dir, config):
        note_commits(config.run_dir, (asked[0], source), (asked[1], target))
        start_cluster()
        repetitions = [repeat(config, seed, splits[seed], source, target) for seed in config.seeds]
    setup = Setup(
        source=base_size(source, config.source.dtype, config.resources),
        target=base_size(target, config.target.dtype, config.resources),
        seeds=config.seeds,
        num_samples=config.num_samples,
        arms=without_places(config.arms),
        train=settings_of(config.train),
        distill=settings_of(config.distill),
        gate=dict(config.gate),  # whole, also what is at its default: the page judges by it
        synthesis=without_places(config.synthesis.model_dump()),
        discriminator=config.discriminator.model_dump(include={"epochs", "learning_rate", "max_samples"}),
        data={one.entry.name: one.digest for one in data},
        adapters={task.name: sha256_path(Path(task.adapter)) for task in config.tasks if task.adapter is not None},
        num_replicates=NUM_REPLICATES,
        versions=versions(),
    )
    items = [task_items(config, task.name, repetitions) for task in config.tasks]
    return summarise(setup, items, [one for repetition in repetitions for one in migrations(config, repetition)])


def settings_of(train: TrainConfig) -> dict[str, Any]:
    """What decides the result of a training."""
    return train.model_dump(exclude=EXECUTION_ONLY)


def repeat(
    config: EvaluateConfig, seed: int, splits: Mapping[str, Split], source: BaseInfo, target: BaseInfo
) -> Repetition:
    """One repetition: everything that depends on the seed."""
    for name, part in splits.items():
        write_jsonl(config.train_file(seed, name), part.train)
    logger.info("seed %d: bundles on %s", seed, source.name)
    bundles = prepare(config.prepare(seed))
    logger.info("seed %d: adapters of %s from the real data", seed, target.name)
    adapters = {f"{REAL}/{task}": path for task, path in train_real(config, seed, splits, target).items()}
    states: dict[str, list[AdapterState]] = {}
    for arm in config.arms:
        logger.info("seed %d: migration, arm %s", seed, arm)
        fleet, earlier = without_gate(config.fleet(seed, arm)), [config.arm_dir(seed, other) for other in states]
        states[arm] = migrate(fleet, functools.partial(share_blocks, earlier, fleet.run_dir))
        # The students themselves: a teacher of one answer passes no gate, and is measured all the same.
        moved = [state.name for state in states[arm] if state.gate is not None]
        adapters |= {f"{arm}/{name}": fleet.run_dir / "adapters" / name / STUDENT for name in moved}
    measured = {one.manifest.task_name: one.manifest.discriminator_quality for one in bundles}
    auc = {task: found.auc for task, found in measured.items() if found is not None}
    repetition = Repetition(seed, splits, states, *answer(config, seed, splits, adapters, source, target), auc)
    write_items(config.seed_dir(seed) / ITEMS, repetition)
    return repetition


def train_real(config: EvaluateConfig, seed: int, splits: Mapping[str, Split], target: BaseInfo) -> dict[str, Path]:
    """Train an adapter on the target base with each task's real data, as the source adapter was; directories by task.

    Raises:
        InputError: the data of a task cannot be trained on.
    """
    directory = config.seed_dir(seed) / REAL
    outputs = {name: directory / "adapters" / name for name in splits}
    jobs = []
    for name, part in splits.items():
        rows = [{"input": row["input"], "answer": row["target"].strip()} for row in part.train]
        work_dir = directory / "tasks" / f"{name}-{digest(rows)}"
        jobs.append(
            make_job(
                name,
                REAL,
                rows,
                config.train,
                output=outputs[name],
                work_dir=work_dir,
                root_seed=seed,
                with_end=True,
                peft=config.train.peft,
            )
        )
    train_adapters(
        config.target, target.name, jobs, config.train, config.resources, directory, label="train on real data"
    )
    refuse_failures(jobs)
    return outputs


def share_blocks(earlier: Sequence[Path], run_dir: Path) -> None:
    """Give a migration what earlier arms computed: what was made from the same has the same directory, whoever made it.

    So arms that differ in the training alone are trained on the same samples, which are paid for once.
    """
    places = [other / place for other in earlier for place in ("rounds", "gate")]
    for block in (path for place in places for path in sorted(place.glob("*-*/*.parquet"))):
        own = run_dir / block.parent.parent.name / block.parent.name / block.name
        if own.exists():
            continue
        own.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(block, own)
        except OSError:  # a file system without hard links
            write_bytes(own, block.read_bytes())


def without_places(value: Any) -> Any:
    """Settings with the last component of each absolute path: the results say nothing of this machine."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    return name_of_path(value) if isinstance(value, str) and os.path.isabs(value) else value


def base_size(base: BaseInfo, dtype: DType, resources: ResourceConfig) -> BaseSize:
    """What the results say of a base; its number of parameters is as the files hold them (tied weights once).

    The dtype is what actors resolve it to that have GPUs or none, wherever this driver runs.
    """
    num_parameters = sum(map(math.prod, base.shapes.values()))
    weights = str(resolve_dtype(dtype, on_gpu=resources.gpus_per_actor > 0)).removeprefix("torch.")
    return BaseSize(name=base.name, num_parameters=num_parameters, identity=base.identity, dtype=weights)
