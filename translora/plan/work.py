"""What a fleet will have to do, as counts of rows and tokens: from its bundles, or from numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from translora.bundle.manifest import MANIFEST, SEEDS, read_manifest
from translora.bundle.remote import is_remote
from translora.config import FleetConfig
from translora.distill.data import num_steps
from translora.distill.plan import JobSize
from translora.engine.memory import weights_bytes
from translora.run.files import read_jsonl
from translora.run.member import expand_entries, heldout_size

CHARACTERS_PER_TOKEN = 4
"""Of English text; the planner needs no tokenizer."""
QUESTION_TOKENS = 30
"""What the discriminator's question and a chat template put around an input."""
SEEDS_SHOWN = 5


@dataclass(frozen=True)
class AdapterWork:
    """One adapter."""

    num_samples: int
    """|D_syn|."""
    input_tokens: int
    """Of a task input."""
    answer_tokens: int
    num_seeds: int = SEEDS_SHOWN
    epochs: float | None = None
    """The adapter's own; the fleet's when unset."""
    adapter_bytes: int | None = None
    """Of the bundle's adapter on disk; taken to be as large as the new one where it is not known."""


@dataclass(frozen=True)
class Work:
    """A fleet."""

    adapters: Sequence[AdapterWork]
    acceptance: float
    """Share of the generated inputs that becomes samples."""
    origin: str
    """Where the numbers come from."""


def given_work(config: FleetConfig, num_adapters: int, num_samples: int, acceptance: float) -> Work:
    """So many adapters of one size; their inputs and answers are as long as the settings let them be."""
    synthesis = config.synthesis
    one = AdapterWork(num_samples, synthesis.sampling.max_new_tokens, synthesis.max_answer_tokens)
    return Work([one] * num_adapters, acceptance, "as given, inputs and answers as long as the settings allow")


def bundled_work(config: FleetConfig, acceptance: float) -> Work:
    """The fleet file's bundles, which must be at hand; only their manifests and seeds are read.

    Raises:
        ValueError: a bundle is elsewhere, or cannot be read.
    """
    entries = {} if any(is_remote(e.bundle) for e in config.adapters) else expand_entries(config.adapters)
    if not entries:
        raise ValueError("the fleet's bundles are not on this machine; give --adapters and --samples instead")
    found = []
    for entry in entries.values():
        path = Path(entry.bundle)
        if not (path / MANIFEST).is_file():
            raise ValueError(
                f"{path}: no bundle here to plan with; correct it, or give --adapters and --samples instead"
            )
        manifest, seeds = read_manifest(path / MANIFEST), read_jsonl(path / SEEDS, ("input",))
        characters = sum(len(row["input"]) for row in seeds) / max(1, len(seeds))
        input_tokens = max(1, math.ceil(characters / CHARACTERS_PER_TOKEN))
        samples = entry.num_samples or manifest.num_samples
        num_bytes = weights_bytes(str(path))
        found.append(
            AdapterWork(samples, input_tokens, config.synthesis.max_answer_tokens, len(seeds), entry.epochs, num_bytes)
        )
    return Work(found, acceptance, f"{len(found)} bundles, {CHARACTERS_PER_TOKEN} characters a token")


def training_sizes(config: FleetConfig, work: Work) -> list[JobSize]:
    """The two trainings of each adapter, as the run measures them."""
    sizes = []
    for one in work.adapters:
        train, judge = config.distill, config.discriminator
        tokens = min(train.max_length, one.input_tokens + QUESTION_TOKENS + one.answer_tokens)
        sizes.append(JobSize(num_steps(one.num_samples, one.epochs or train.epochs, train.batch_size), tokens, tokens))
        count = min(judge.max_samples, 2 * (one.num_samples + heldout_size(config.gate, one.num_samples)))
        tokens = min(train.max_length, one.input_tokens + 2 * QUESTION_TOKENS)
        sizes.append(JobSize(num_steps(count, judge.epochs, train.batch_size), tokens, tokens))
    return sizes
