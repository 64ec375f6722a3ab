"""A discriminator (arXiv 2405.17258): its training rows, and whether it tells inputs apart that it has not seen."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from translora.actors.calls import Row
from translora.actors.hosts import Hosts
from translora.actors.rows import run_rows
from translora.bundle.manifest import DiscriminatorQuality
from translora.config import BaseModelConfig
from translora.synthesis.prompts import discriminator_question, normalise
from translora.synthesis.screens import judge_block

logger = logging.getLogger(__name__)
UNSEEN_SHARE = 5
"""One input in so many is kept out of the training, to measure the discriminator on."""
FEWEST_UNSEEN, MOST_UNSEEN = 8, 100


@dataclass(frozen=True)
class Inputs:
    """What a discriminator is to tell apart."""

    real: Sequence[str]
    invented: Sequence[str]


@dataclass(frozen=True)
class Judge:
    """A trained discriminator, and inputs that it has not seen."""

    directory: Path
    task_name: str
    template: str
    unseen: Inputs


def hold_out(inputs: Inputs, seed: int) -> tuple[Inputs, Inputs | None]:
    """Inputs to train on, and a fifth of either kind to measure on; None, and all to train on, where they are few."""
    parts = [_hold_out(texts, seed) for texts in (inputs.real, inputs.invented)]
    if min(len(unseen) for _, unseen in parts) < FEWEST_UNSEEN:
        return inputs, None
    (real, unseen_real), (invented, unseen_invented) = parts
    return Inputs(real, invented), Inputs(unseen_real, unseen_invented)


def _hold_out(texts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    keys = [normalise(text) for text in texts]
    distinct = dict(zip(keys, texts, strict=True))
    chosen = random.Random(seed).sample(sorted(distinct), min(MOST_UNSEEN, len(distinct) // UNSEEN_SHARE))
    unseen = set(chosen)
    known = [text for key, text in zip(keys, texts, strict=True) if key not in unseen]
    return known, [distinct[key] for key in chosen]


def shuffled_words(text: str, rng: random.Random) -> str:
    """The text with its words in another order: a negative that needs no model."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def discriminator_rows(inputs: Inputs, task_name: str, max_samples: int, seed: int) -> list[dict[str, str]]:
    """Rows of `input` (the question t(x)) and `answer` (yes or no), as many of either answer where that can be had.

    Where there are fewer invented inputs than real ones, real ones with shuffled words make up for them: the screen of
    a good generator refuses little, and a discriminator needs both answers. Inputs of one word cannot be shuffled:
    fewer negatives than half the real ones are warned of.

    Args:
        inputs: of the task, and such as are not.
        task_name: the <NAME> of the question.
        max_samples: most rows, half of them of real inputs.
        seed: decides choice and order.
    """
    rng = random.Random(seed)
    count = min(len(inputs.real), max_samples // 2)
    yes = rng.sample(list(inputs.real), count)
    no = rng.sample(list(inputs.invented), min(len(inputs.invented), count))
    present = {normalise(text) for text in inputs.real}
    for text in yes[: count - len(no)]:
        shuffled = shuffled_words(text, rng)
        if normalise(shuffled) not in present:
            no.append(shuffled)
    if 2 * len(no) < len(yes):
        effect = "accepts every input" if not no else "accepts nearly every input"
        logger.warning(
            "%s: %d inputs, but only %d negatives for its discriminator, which then %s; longer inputs or a higher "
            "synthesis.sampling.temperature give more",
            task_name,
            len(yes),
            len(no),
            effect,
        )
    rows = [(text, "yes") for text in yes] + [(text, "no") for text in no]
    rng.shuffle(rows)
    return [{"input": discriminator_question(text, task_name), "answer": answer} for text, answer in rows]


def measure(
    judges: Mapping[str, Judge],
    *,
    base: BaseModelConfig,
    hosts: Hosts,
    weights: Mapping[str, str],
) -> dict[str, DiscriminatorQuality]:
    """Let discriminators score inputs that they have not seen, all of them in mixed batches.

    Args:
        judges: by adapter.
        base: the one that they are adapters of.
        weights: content hashes of the discriminators and of the base: scores of the same weights alone are used again.

    Returns:
        What was found, by adapter; one whose rows cannot be computed is missing.
    """
    rows: list[Row] = [
        {
            "adapter": name,
            "real": is_real,
            "input": text,
            "discriminator": f"discriminator/{name}",
            "task_name": judge.task_name,
            "template": judge.template,
        }
        for name, judge in judges.items()
        for is_real, texts in ((True, judge.unseen.real), (False, judge.unseen.invented))
        for text in texts
    ]
    if not rows:
        return {}
    faults: dict[str, str] = {}
    scored = run_rows(
        "measure discriminators",
        rows,
        judge_block,
        base=base,
        hosts=hosts,
        place="judged/scores",
        weights=dict(weights),
        adapters={f"discriminator/{name}": str(judge.directory) for name, judge in judges.items()},
        faults=faults,
    )
    for name, reason in sorted(faults.items()):
        logger.warning("%s: its discriminator could not be measured (%s)", name, reason)
    scores: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in judges}
    for row in scored:
        scores[row["adapter"]][row["real"]].append(row["score"])
    return {name: quality(own[True], own[False]) for name, own in scores.items() if name not in faults}


def quality(real: Sequence[float], invented: Sequence[float]) -> DiscriminatorQuality:
    """The area under the ROC curve and the shares that are accepted, of scores (log-odds)."""
    real_R, invented_I = np.asarray(real, dtype=float), np.asarray(invented, dtype=float)
    above = (real_R[:, None] > invented_I).mean() + (real_R[:, None] == invented_I).mean() / 2
    return DiscriminatorQuality(
        num_real=len(real),
        num_invented=len(invented),
        auc=round(float(above), 4),
        accepts_real=round(float((real_R > 0).mean()), 4),
        accepts_invented=round(float((invented_I > 0).mean()), 4),
    )
