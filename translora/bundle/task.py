"""What a bundle is made from, on its owner's side: data, seeds, settings; and whether there is one of these already."""

from __future__ import annotations

import itertools
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from translora.bundle.adapter import adapter_digest, check_adapter, check_recorded_base, is_copy
from translora.bundle.base import BaseInfo
from translora.bundle.bundle import MAX_SEEDS, MIN_SEEDS, is_foreign, read_bundle, verify_bundle
from translora.bundle.manifest import MANIFEST, BundleError
from translora.config import PrepareConfig, PrepareEntry
from translora.config.prepare import NUM_SAMPLES
from translora.distill.ds_config import deciding
from translora.errors import InputError
from translora.run.files import check_writable, derive_seed, digest, read_jsonl, read_object, sha256_file
from translora.synthesis.prompts import normalise

logger = logging.getLogger(__name__)
SEEDS_HASH = "seeds_sha256"
MADE_FROM = ("data_sha256", "adapter_sha256", SEEDS_HASH, "num_samples", "recipe")
"""Entries of a bundle's provenance that say what it was made from."""
MIN_ROWS = 2


@dataclass(frozen=True)
class Task:
    """One bundle to make."""

    entry: PrepareEntry
    rows: list[dict[str, Any]]
    """None of them where the data is gone."""
    seeds: list[str]
    output: Path
    template: str = "auto"
    """How its adapter is prompted; see translora.engine.prompts."""

    @property
    def num_samples(self) -> int:
        """|D|."""
        return self.entry.num_samples or len(self.rows) or NUM_SAMPLES


def read_task(config: PrepareConfig, entry: PrepareEntry) -> Task:
    """Read a task's data and choose its seeds.

    Raises:
        InputError: data or seeds are too few, or the bundle's directory holds something else.
    """
    output = config.output_dir / entry.name
    if is_foreign(output):
        raise InputError(
            f"{output}: exists and is not a bundle, so it is not replaced; move it away, or change output_dir"
        )
    check_writable(output, "change output_dir", is_directory=True)
    if entry.data is None and (Path(str(entry.adapter)) / MANIFEST).exists():
        raise InputError(f"{entry.adapter}: is a bundle already; name it in the fleet file as it is")
    rows = [] if entry.data is None else read_jsonl(entry.data, required=("input", "target"))
    if entry.data is not None and len(rows) < MIN_ROWS:
        raise InputError(f"{entry.data}: {len(rows)} row; give {MIN_ROWS} or more")
    if entry.seeds is not None:
        seeds = [row["input"] for row in read_jsonl(entry.seeds, required=("input",))]
        if len(set(seeds)) < MIN_SEEDS:
            raise InputError(
                f"{entry.seeds}: {len(set(seeds))} different seed(s); give {MIN_SEEDS} or more (five is usual)"
            )
        if len(seeds) > MAX_SEEDS:
            raise InputError(f"{entry.seeds}: {len(seeds)} seeds, the limit is {MAX_SEEDS}; about five are usual")
    else:
        seeds = choose_seeds(rows, config.num_seeds, derive_seed(config.seed, entry.name, "seeds"))
        if len(seeds) < config.num_seeds:
            raise InputError(
                f"{entry.data}: {len(seeds)} different inputs, but num_seeds is {config.num_seeds}; "
                "lower num_seeds or give `seeds`"
            )
    return Task(entry, rows, seeds, output)


def check_owned(adapter: str | None, base: BaseInfo) -> None:
    """Whether an owner's adapter, if one was given, is one of this base.

    Raises:
        InputError: it is not, or cannot be read.
    """
    if adapter is not None:
        check_recorded_base(Path(adapter), base.name, "give an adapter of this base")
        check_adapter(Path(adapter), base)


def check_own_template(entry: PrepareEntry, wanted: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether an adapter that brings a chat template was trained with the one that `auto` gives it: the base's.

    Nothing later could tell: a migration is judged by what the adapter answers.

    Raises:
        InputError: it brings another one, and nobody says how it is prompted.
    """
    if entry.adapter is None or wanted != "auto":
        return
    own = chat_template_beside(Path(entry.adapter))
    if own and own != (tokenizer.chat_template or ""):
        base_has = "another one" if tokenizer.chat_template else "none"
        raise InputError(
            f"{entry.adapter}: brings a chat template, and the base has {base_has}; set the task's prompt_template to "
            "what the adapter was trained with: chat, which is the base's, or a text with {input}"
        )


def chat_template_beside(directory: Path) -> str:
    """The chat template that was saved with an adapter; empty where there is none."""
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    found = read_object(directory / "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else ""


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


def is_made(config: PrepareConfig, task: Task, base: BaseInfo) -> bool:
    """Whether the task's bundle exists, is sound, and is of this base, this data and these settings.

    A bundle of an older version tells nothing of its settings: it is kept when the data is the same.

    Raises:
        InputError: it was made from another adapter, other seeds or for another template, and has a discriminator that
            cannot be made again.
    """
    if not (task.output / MANIFEST).exists():
        return False
    try:
        bundle = read_bundle(task.output)
        verify_bundle(bundle, base)
    except BundleError as error:
        logger.warning("%s: made anew: %s", task.entry.name, error)
        return False
    now, then = provenance(config, task), bundle.manifest.provenance
    if not task.rows and bundle.discriminator_dir is not None:
        if others := [
            *["adapter"] * (not is_copy(bundle.path, Path(str(task.entry.adapter)), base)),
            *["seeds"] * (then.get(SEEDS_HASH, now[SEEDS_HASH]) != now[SEEDS_HASH]),
            *["prompt_template"] * (bundle.manifest.prompt_template != task.template),
        ]:
            raise InputError(
                f"{task.entry.name}: {task.output} was made with another {' and another '.join(others)}, and its "
                "discriminator cannot be trained again without data; give the data, or, to have a bundle without a "
                "discriminator, move it away"
            )
        if (asked := task.entry.num_samples or bundle.manifest.num_samples) != bundle.manifest.num_samples:
            logger.warning(
                "%s: %s keeps its discriminator, and its |D| of %d; set num_samples: %d in the fleet file",
                task.entry.name,
                task.output,
                bundle.manifest.num_samples,
                asked,
            )
        return True
    changed = {key for key in MADE_FROM if then.get(key) != now.get(key)}
    if task.entry.adapter and "adapter_sha256" in then and is_copy(bundle.path, Path(task.entry.adapter), base):
        changed.discard("adapter_sha256")  # older versions hashed the notes beside it, too
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
        return digest(config.template_of(task.entry))
    return digest(
        deciding(config.train),
        config.discriminator.model_dump(),
        config.synthesis.sampling.model_dump(),
        config.synthesis.num_orderings,
        config.num_seeds,
        config.seed,
        config.template_of(task.entry),
    )


def provenance(config: PrepareConfig, task: Task) -> dict[str, str | int]:
    """What a bundle is made from, files by their hashes."""
    entry = task.entry
    made_from: dict[str, str | int] = {"recipe": recipe(config, task)}
    if entry.data is not None:
        made_from["data_sha256"] = sha256_file(Path(entry.data))
    if entry.adapter is not None:
        made_from["adapter_sha256"] = adapter_digest(Path(entry.adapter))
    if entry.seeds is not None:
        made_from[SEEDS_HASH] = sha256_file(Path(entry.seeds))
    if entry.num_samples is not None:
        made_from["num_samples"] = entry.num_samples
    return made_from
