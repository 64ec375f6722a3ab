"""Training rows of a discriminator: yes for task inputs, no for what only resembles them (arXiv 2405.17258)."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

from translora.synthesis.prompts import discriminator_question, normalise

logger = logging.getLogger(__name__)


def shuffled_words(text: str, rng: random.Random) -> str:
    """The text with its words in another order: a negative that needs no model."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def discriminator_rows(
    positives: Sequence[str], negatives: Sequence[str], task_name: str, max_samples: int, seed: int
) -> list[dict[str, str]]:
    """Rows of `input` (the question t(x)) and `answer` (yes or no), as many of either answer where that can be had.

    Where there are fewer negatives than positives, positives with shuffled words make up for them: the screen of
    a good generator refuses little, and a discriminator needs both answers. Inputs of one word cannot be shuffled:
    fewer negatives than half the positives are warned of.

    Args:
        positives: inputs of the task.
        negatives: generated inputs that are not of the task.
        task_name: the <NAME> of the question.
        max_samples: most rows, half of them positives.
        seed: decides choice and order.
    """
    rng = random.Random(seed)
    count = min(len(positives), max_samples // 2)
    yes = rng.sample(list(positives), count)
    no = rng.sample(list(negatives), min(len(negatives), count))
    present = {normalise(text) for text in positives}
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
