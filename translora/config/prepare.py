"""`translora prepare prepare.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from translora.config.base import BaseModelConfig, PromptTemplate, ResourceConfig
from translora.config.fleet import TrackingConfig
from translora.config.synthesis import SynthesisConfig
from translora.config.train import DiscriminatorConfig, TrainConfig
from translora.config_file import NAME_PATTERN, ConfigFile, NumSamples, Seed, Strict
from translora.errors import InputError

NUM_SAMPLES = 250
"""|D| of a task whose data is gone: that of a task of BIG-Bench-Hard."""


class PrepareEntry(Strict):
    """One bundle to make, from task data or, where the data is gone, from `adapter` and `seeds`."""

    added: ClassVar[frozenset[str]] = frozenset({"prompt_template"})

    name: str = Field(pattern=NAME_PATTERN)
    """Task name: the <NAME> of the discriminator's question, and the bundle's directory."""
    data: str | None = None
    """JSONL with `input` and `target`; without it the bundle gets no discriminator, and nothing is trained."""
    adapter: str | None = None
    """Existing PEFT adapter of the source base; trained from `data` when unset."""
    seeds: str | None = None
    """JSONL with five (cleaned) `input` lines to ship as seeds; chosen from `data` when unset."""
    num_samples: NumSamples | None = None
    """|D|, how many samples a migration synthesises; unset, the rows of `data`, or 250 (a task of BIG-Bench-Hard)."""

    prompt_template: PromptTemplate | None = None
    """This adapter's own prompt_template."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data is None and None in (self.adapter, self.seeds):
            raise InputError("give `data`; or, where the data is gone, `adapter` and `seeds`")
        return self


class PrepareConfig(ConfigFile):
    """`translora prepare prepare.yaml`: the owner's side, run once while the data is at hand."""

    command = "prepare"
    output_dir: Path
    """Bundles are written to output_dir/name."""
    run_dir: Path
    """Working directory; a rerun on it continues where it stopped."""
    source: BaseModelConfig
    """The base of the adapters."""
    tasks: list[PrepareEntry] = Field(min_length=1)
    """The bundles to make."""
    prompt_template: PromptTemplate = "auto"
    """`chat` (the tokenizer's template), a string that contains {input}, or `auto`: chat where there is a template."""
    num_seeds: int = Field(default=5, ge=2, le=50)
    """Seed examples per bundle."""
    seed: Seed = 0
    """Root of every random number of the run."""
    train: TrainConfig = TrainConfig()
    """Training of missing adapters."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """Training of the discriminators."""
    synthesis: SynthesisConfig = SynthesisConfig()
    """Generation of the discriminator's negatives."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics."""
    resources: ResourceConfig = ResourceConfig()
    """Actors."""

    def template_of(self, entry: PrepareEntry) -> str:
        """How an adapter is prompted."""
        return entry.prompt_template or self.prompt_template

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_same_names([task.name for task in self.tasks])
        self.train = for_real_data(self.train)
        run_dir = self.run_dir.resolve()
        for task in self.tasks:
            output = (self.output_dir / task.name).resolve()
            own = [run_dir / name for name in ("adapters", "tasks", "gangs", "negatives")]
            if run_dir.is_relative_to(output) or any(output.is_relative_to(one) for one in own):
                raise InputError(
                    f"run_dir: {self.run_dir} and the bundle {output} lie in one another; change output_dir"
                )
        return self


def for_real_data(train: TrainConfig) -> TrainConfig:
    """How adapters are trained on real data, which has no teacher and no source adapter.

    Raises:
        InputError: the loss is one of a teacher, or tokens are chosen by a source adapter, or begun is with one.
    """
    if train.loss == "kl":
        raise InputError("train.loss: kl wants a teacher, and training on real data has none; use sft")
    if train.token_share < 1:
        raise InputError("train.token_share: is by the source adapter, and training on real data has none; set it to 1")
    if train.warm_start:
        raise InputError("train.warm_start: training on real data has no source adapter to begin with; set it to false")
    return train.model_copy(update={"loss": "sft"})


def refuse_same_names(names: Sequence[str]) -> None:
    """Each task has a directory of its own name.

    Raises:
        InputError: a name appears twice.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"task names appear twice: {', '.join(twice)}; give each task its own `name`")
