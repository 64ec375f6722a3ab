"""Rounds of generate, screen and label."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from translora.config.base import BaseModelConfig
from translora.config_file import Strict

Screen = Literal["auto", "discriminator", "realness", "confidence", "excess", "none"]


class SamplingConfig(Strict):
    """How the generator samples task inputs."""

    temperature: float = Field(default=0.9, ge=0.01, le=100)
    """Softmax temperature."""
    top_k: int = Field(default=50, ge=1)
    """Candidates kept at each step (a full sort of a 262k vocabulary costs more than the forward pass)."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Longest task input, in tokens of the generator."""


class SynthesisConfig(Strict):
    """Rounds of generate, screen and label."""

    generator: BaseModelConfig | None = None
    """Model that invents task inputs; the target base when unset (as in the paper)."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of task inputs."""
    batch_size: int = Field(default=24, ge=1)
    """Rows in one forward pass; rows of different adapters share it."""
    max_answer_tokens: int = Field(default=64, ge=1)
    """Longest answer of the teacher, in tokens of the source base; longer answers are dropped. Students have room
    for as much text."""
    screen: Screen = "auto"
    """Which inputs are kept: those that the owner's `discriminator` takes for real (the paper), those that it finds
    likest to real ones (`realness`), those whose answer the adapter is surest of (`confidence`) or makes most likelier
    than its base does (`excess`), for bundles without a discriminator, or all (`none`); `auto` is realness where the
    bundle has a discriminator that tells real inputs from invented ones, and confidence elsewhere."""
    surplus: float = Field(default=1.5, ge=1)
    """Realness, confidence and excess: collect this many times what is needed (|D_syn| and the samples that are held
    out for the gate) or more, and keep of each answer those with the greatest score. What a round brings beyond it is
    chosen from, too."""
    seed_similarity: float = Field(default=0.9, gt=0, le=1)
    """An input as similar as this to a seed (edit similarity, 1 is equal) is dropped: it would leak the seed. So is one
    that holds a seed of five words or more. Where all inputs of a task have one form it takes more than that form."""
    duplicate_similarity: float = Field(default=0.97, gt=0, le=1)
    """An input as similar as this to an earlier one, with the same numbers in it, is dropped; 1 drops equal ones."""
    num_orderings: int = Field(default=5, ge=1)
    """Orders of the seeds in an adapter's few-shot prompts; rows of the same order share the prompt's computing."""
    oversample: float = Field(default=1.15, ge=1)
    """A round generates (missing / expected acceptance) times this."""
    max_rounds: int = Field(default=6, ge=1)
    """Rounds before an adapter that is still short gives up."""
    max_generated_factor: float = Field(default=10.0, ge=1)
    """Budget: generated inputs per adapter, as a multiple of what is needed: |D_syn| and the held-out samples."""
    min_accepted_fraction: float = Field(default=0.5, gt=0, le=1)
    """When the budget is spent: go on with fewer samples down to this fraction of those needed, else quarantine."""
