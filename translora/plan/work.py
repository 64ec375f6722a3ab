"""What a fleet will have to do, as counts of rows and tokens: from its bundles, or from numbers."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from translora.bundle import Bundle, BundleError, read_bundle
from translora.bundle.adapter import highest_rank
from translora.bundle.remote import is_remote
from translora.config import FleetConfig
from translora.config.merge import merged_rank
from translora.distill.data import num_steps
from translora.distill.plan import JobSize
from translora.engine.memory import Sizes, adapter_sizes, union
from translora.engine.vllm_settings import check_plain, check_rank
from translora.errors import InputError
from translora.plan.hardware import ACCEPTANCE, ACCEPTANCE_REFUSING
from translora.run.entries import expand_entries
from translora.run.state import LEAVING_DISCRIMINATOR, RANKING, ScreenName
from translora.synthesis.pool import PRIOR_ACCEPTED, PRIOR_GENERATED, choose_screen

logger = logging.getLogger(__name__)
CHARACTERS_PER_TOKEN = 4
"""Of English text; the planner needs no tokenizer."""
QUESTION_TOKENS = 30
"""What the discriminator's question and a chat template put around an input."""
SEEDS_SHOWN = 5
SCORING_PASSES = {"realness": 1, "confidence": 1, "excess": 2}
"""Over prompt and answer, of the screens that score all inputs; realness is of the prompt alone, and takes less."""


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
    sizes: Sizes | None = None
    """Of the source adapter; taken to be as large as the new one where it is not known."""
    judge_sizes: Sizes | None = None
    """Of its discriminator, in the same way."""
    screen: ScreenName = "realness"

    def num_needed(self, config: FleetConfig) -> int:
        """Samples: |D_syn| and the gate's held-out prompts."""
        return self.num_samples + config.gate.sizes(self.num_samples)[1]

    def num_wanted(self, config: FleetConfig) -> float:
        """Samples to collect, for a screen to choose from."""
        return (config.synthesis.surplus if self.screen in RANKING else 1.0) * self.num_needed(config)


@dataclass(frozen=True)
class Work:
    """A fleet."""

    adapters: Sequence[AdapterWork]
    acceptance: float | None
    """Share of the generated inputs that is neither dropped nor refused; None is the usual one of each screen."""
    origin: str
    """Where the numbers come from."""

    def accepted(self, one: AdapterWork) -> float:
        """Of an adapter's generated inputs."""
        usual = ACCEPTANCE_REFUSING if one.screen == "discriminator" else ACCEPTANCE
        return usual if self.acceptance is None else self.acceptance

    def num_generated(self, one: AdapterWork, config: FleetConfig) -> float:
        """Inputs that are invented for an adapter: what its first round asks for, or more where that does not do.

        Up to its budget, which ends it with fewer samples.
        """
        synthesis, wanted = config.synthesis, one.num_wanted(config)
        first = wanted * synthesis.oversample * PRIOR_GENERATED / PRIOR_ACCEPTED
        return min(max(first, wanted / self.accepted(one)), synthesis.max_generated_factor * one.num_needed(config))

    @property
    def mean_acceptance(self) -> float:
        """Over the adapters."""
        return fmean(map(self.accepted, self.adapters))


def given_work(config: FleetConfig, num_adapters: int, num_samples: int, acceptance: float | None) -> Work:
    """So many adapters of one size; their inputs and answers are as long as the settings let them be."""
    synthesis = config.synthesis
    screen: ScreenName = "realness" if synthesis.screen == "auto" else synthesis.screen
    one = AdapterWork(num_samples, synthesis.sampling.max_new_tokens, synthesis.max_answer_tokens, screen=screen)
    lengths = f"screened by {screen}, inputs and answers as long as the settings allow"
    return Work([one] * num_adapters, acceptance, f"as given, {lengths}")


def bundled_work(config: FleetConfig, acceptance: float | None) -> Work:
    """The fleet file's bundles, which must be at hand; of their weights only the headers are read.

    Raises:
        InputError: a bundle is elsewhere, or cannot be read.
    """
    if any(is_remote(entry.bundle) for entry in config.adapters):
        raise InputError("the fleet's bundles are not on this machine; give --adapters and --samples instead")
    entries, faults = expand_entries(config.adapters)
    found = []
    for name, entry in entries.items():
        try:
            if name in faults:
                raise BundleError(faults[name])
            bundle = read_bundle(Path(entry.bundle))
            sizes = sizes_of(config, bundle)
            screen = choose_screen(config.synthesis, bundle, entry.screen)
        except InputError as error:
            logger.warning("left out of the plan: %s", error)
            continue
        work = AdapterWork(
            entry.num_samples or bundle.manifest.num_samples,
            input_tokens=mean_tokens(bundle.seeds),
            answer_tokens=config.synthesis.max_answer_tokens,
            num_seeds=len(bundle.seeds),
            epochs=entry.epochs,
            sizes=sizes,
            screen=screen,
        )
        if bundle.discriminator_dir is not None:
            work = dataclasses.replace(work, judge_sizes=adapter_sizes(str(bundle.discriminator_dir)))
        found.append(work)
    found += merged_work(config)
    if not found:
        raise InputError(
            "none of the fleet's bundles can be read; correct them, or give --adapters and --samples instead"
        )
    return Work(found, acceptance, f"{len(found)} bundles, {CHARACTERS_PER_TOKEN} characters a token")


def merged_work(config: FleetConfig) -> list[AdapterWork]:
    """Adapters that are merged before they migrate, like any other then: with the seeds, ranks and |D| of all parts."""
    found = []
    for merge in (merge for merge in config.merges if merge.when == "before"):
        try:
            parts = [read_bundle(Path(path)) for path in merge.adapters]
            every = [sizes_of(config, part) for part in parts]
        except InputError as error:
            logger.warning("left out of the plan: the merge %s: %s", merge.name, error)
            continue
        sizes = {}
        for module, (_, width) in union(every).items():
            rank = merged_rank(merge.method, [one[module][0] for one in every if module in one], len(parts))
            sizes[module] = (min(rank, merge.rank or rank), width)
        screen = merge.screen or config.synthesis.screen
        seeds = [seed for part in parts for seed in part.seeds]
        found.append(
            AdapterWork(
                merge.num_samples or sum(part.manifest.num_samples for part in parts),
                input_tokens=mean_tokens(seeds),
                answer_tokens=config.synthesis.max_answer_tokens,
                num_seeds=len(seeds),
                epochs=merge.epochs,
                sizes=sizes,
                screen="confidence" if screen == "auto" else screen,
            )
        )
    return found


def sizes_of(config: FleetConfig, bundle: Bundle) -> Sizes:
    """Of a bundle's adapter.

    Raises:
        InputError: the source's engine does not take it: a run would quarantine it.
    """
    check_plain(bundle.path, config.source)
    check_rank(highest_rank(bundle.path), config.source, str(bundle.path))
    return adapter_sizes(str(bundle.path))


def mean_tokens(texts: Sequence[str]) -> int:
    """Of a text, at about so many characters each."""
    characters = sum(map(len, texts)) / max(1, len(texts))
    return max(1, math.ceil(characters / CHARACTERS_PER_TOKEN))


def training_sizes(config: FleetConfig, work: Work) -> list[JobSize]:
    """The trainings of each adapter, as the run measures them."""
    sizes = []
    for one in work.adapters:
        train, judge = config.distill, config.discriminator
        tokens = min(train.max_length, one.input_tokens + QUESTION_TOKENS + one.answer_tokens)
        sizes.append(JobSize(num_steps(one.num_samples, one.epochs or train.epochs, train.batch_size), tokens, tokens))
        if one.screen not in LEAVING_DISCRIMINATOR:
            continue
        count = min(judge.max_samples, 2 * one.num_needed(config))
        tokens = min(train.max_length, one.input_tokens + 2 * QUESTION_TOKENS)
        sizes.append(JobSize(num_steps(count, judge.epochs, train.batch_size), tokens, tokens))
    return sizes
