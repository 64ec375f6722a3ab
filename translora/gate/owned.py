"""Whether an owner's adapter knows the task as a bundle will prompt it: its answers to some rows of its own data."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from translora.actors.calls import Row
from translora.actors.hosts import Hosts
from translora.bundle import BaseInfo
from translora.bundle.task import Task
from translora.config import PrepareConfig
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.gate.questions import LONG, answer_rows, run_answers
from translora.gate.verdict import share_equal
from translora.run.files import derive_seed, sha256_path

logger = logging.getLogger(__name__)
NUM_ROWS = 20
"""Of each task's data; the adapter may have been trained on them: this is no measurement of what it has learnt."""


def try_adapters(config: PrepareConfig, tasks: Sequence[Task], base: BaseInfo) -> None:
    """Let adapters that were given together with data answer some of it, beside the bare base, and say how they did.

    One that does no better than the base was most likely trained with another prompt template. Nothing later could tell
    that: a migration is judged by what the adapter answers.
    """
    tasks = [task for task in tasks if task.entry.adapter is not None and task.rows]
    tokenizer = load_tokenizer(config.source)
    rows: list[Row] = []
    targets: dict[str, list[str]] = {}
    for task in tasks:
        name, prompts = task.entry.name, prompt_format(tokenizer, task.template)
        shuffled = random.Random(derive_seed(config.seed, name, "try")).sample(task.rows, len(task.rows))
        short = (row for row in shuffled if len(prompts.encode_prompt(row["input"])) < config.train.max_length)
        chosen = list(itertools.islice(short, NUM_ROWS))
        if not chosen:
            continue
        targets[name] = [row["target"].strip() for row in chosen]
        samples = list(zip([row["input"] for row in chosen], targets[name], strict=True))
        for arm, slot in (("adapter", f"adapter/{name}"), ("base", None)):
            rows += answer_rows(name, arm, samples, slot, task.template, with_likelihood=True)
    tasks = [task for task in tasks if task.entry.name in targets]
    if not tasks:
        return
    adapters = {f"adapter/{task.entry.name}": str(task.entry.adapter) for task in tasks}
    faults: dict[str, str] = {}
    with Hosts(config.resources, config.run_dir, config.synthesis.batch_size) as hosts:
        answers, logliks = run_answers(
            "try the adapters",
            rows,
            base=config.source,
            max_answer_tokens=config.synthesis.max_answer_tokens,
            adapters=adapters,
            hosts=hosts,
            weights={slot: sha256_path(Path(path)) for slot, path in adapters.items()} | {"base": base.identity},
            faults=faults,
        )
    for task in tasks:
        if (name := task.entry.name) in faults:
            logger.warning("%s: its adapter could not be tried (%s)", name, faults[name])
            continue
        own, bare = (share_equal(answers[name, arm], targets[name]) for arm in ("adapter", "base"))
        logger.info(
            "%s: of %d rows of its data its adapter answers %.0f %% as they are, the bare base %.0f %%",
            name,
            len(targets[name]),
            100 * own,
            100 * bare,
        )
        is_long = median(map(len, targets[name])) >= LONG
        if logliks[name, "adapter"] <= logliks[name, "base"] if is_long else own <= min(bare, 0.95):
            logger.warning(
                "%s: its adapter does no better on its own data than the bare base; was it trained with another "
                "prompt_template than %r%s?",
                name,
                task.template,
                "" if any(answers[name, "adapter"]) else ", or never to end an answer (a migration then needs `stop`)",
            )
