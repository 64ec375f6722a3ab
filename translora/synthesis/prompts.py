"""The generator's few-shot prompt and the discriminator's question (arXiv 2405.17258)."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from translora.run.files import derive_seed

LINE_END = r"(?<=\S)[^\S\n]*\n"
"""End of the first line that is not blank: a completion may begin with white space."""
DISCRIMINATOR_QUESTION = "{input}\n Is the above question from {name} dataset?"


def generation_prompt(seeds: Sequence[str], ordering: int, seed: int) -> str:
    """`Here are 10 examples:`, or more, with the seed inputs, and the next number left open.

    What is invented resembles the last example most: the seeds take turns there, the others' order is drawn from
    `seed`.
    """
    last = ordering % len(seeds)
    others = [text for index, text in enumerate(seeds) if index != last]
    random.Random(seed).shuffle(others)
    lines = [f"{number}. {text}" for number, text in enumerate([*others, seeds[last]], 1)]
    return f"Here are {max(10, len(seeds) + 1)} examples:\n" + "\n".join(lines) + f"\n{len(seeds) + 1}."


def generation_row(name: str, seeds: Sequence[str], sample_id: int, root_seed: int, ordering: int) -> dict[str, Any]:
    """One request to the generator; it depends on the adapter's name and samples, on no neighbour.

    The seeds come in one of a few orders, so that rows of the same order share the computing of their prompt.
    """
    return {
        "adapter": name,
        "sample_id": sample_id,
        "prompt": generation_prompt(seeds, ordering, derive_seed(root_seed, name, "ordering", ordering)),
        "stop": generation_stop(seeds),
        "seed": derive_seed(root_seed, name, sample_id),
    }


def generation_order(row: dict[str, Any]) -> tuple[int, str]:
    """Key that brings requests of similar length together, and those with the same prompt next to each other."""
    return len(row["prompt"]), row["prompt"]


def generation_stop(seeds: Sequence[str]) -> str:
    """Where a generated input ends: at the next number, or at the line's end where every seed is one line."""
    if all("\n" not in seed.strip() for seed in seeds):
        return LINE_END
    return rf"\n\s*{len(seeds) + 2}\."


def answer_stop(text: str | None) -> str | None:
    """A regular expression for where answers end that end at a text, and none that is before their first word."""
    return None if text is None else rf"(?<=\S)\s*{re.escape(text)}"


def discriminator_question(text: str, task_name: str) -> str:
    """The template t(x)."""
    return DISCRIMINATOR_QUESTION.replace("{name}", task_name).replace("{input}", text)


def normalise(text: str) -> str:
    """Without case, runs of white space and Unicode's ways to write a letter: what differs in these is a duplicate."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().casefold()
