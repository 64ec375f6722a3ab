"""`translora migrate fleet.yaml`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from translora.config.base import BaseModelConfig, PromptTemplate, ResourceConfig
from translora.config.merge import MergeEntry
from translora.config.own import OwnSettings
from translora.config.synthesis import SynthesisConfig
from translora.config.train import DiscriminatorConfig, TrainConfig
from translora.config_file import ConfigFile, NumSamples, Seed, Strict
from translora.errors import InputError
from translora.lora.kinds import MAX_RANK


class AdapterEntry(OwnSettings):
    """One bundle, or a glob over bundles."""

    added: ClassVar[frozenset[str]] = frozenset({"min_agreement", "stop", "prompt_template"})

    bundle: str
    """Bundle directory or a glob pattern over bundle directories, or a URL of either (s3://bucket/bundles/*)."""


OPEN_GATE = {"min_agreement": 0.0, "min_gain": -1.0}
"""Of a gate that holds back nothing but what learnt from a teacher of one answer."""


class GateConfig(Strict):
    """The acceptance check on held-out synthetic prompts."""

    added: ClassVar[frozenset[str]] = frozenset({"max_p_value", "long_answers", "min_informedness"})

    holdout_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of additional synthetic samples kept out of training (on top of |D_syn|)."""
    min_holdout: int = Field(default=24, ge=1)
    """Fewest held-out samples, where so many are accepted that as many are left to train on."""
    long_answers: Literal["exact", "tokens"] = "exact"
    """What agreement is of a teacher whose answers are long texts, which seldom are the same to the letter: `tokens` is
    the share of its answers' tokens that the student finds likeliest, given those before them. Long: half of them have
    80 characters or more."""
    min_agreement: float = Field(default=0.6, ge=0, le=1)
    """Least share of held-out prompts on which the migrated student gives the teacher's answer. What it should be is
    hardly told between 0.3 and 0.7 (docs/gate.md)."""
    min_informedness: float = Field(default=0.3, ge=-1, le=1)
    """Where the teacher's answers are few: least informedness of the student's, 0 is one answer to everything and 1 the
    teacher's every time. Of prompts that nearly all have one answer a student agrees with most that has learnt little
    else (docs/gate.md). With `min_agreement` 0 it is not asked for."""
    min_gain: float = Field(default=0.0, ge=-1, le=1)
    """Least (student - bare target base) agreement."""
    max_p_value: float = Field(default=0.05, gt=0, le=1)
    """Greatest chance that the teacher's answers would suit the student as well if they were dealt out to other prompts
    (a permutation test): where the answers are few, be as likely to it, else agree as often with its own. By tokens,
    that it does no better than the bare target base, or than with other inputs. With `min_agreement` 0 it is not asked
    for."""
    retries: int = Field(default=1, ge=0, le=3)
    """Times that an adapter which did not pass is distilled again, from more samples, before it is given up.
    It is given up sooner where agreement is too low and the last samples brought no more of it."""
    retry_factor: float = Field(default=2.0, gt=1, le=4)
    """|D_syn| of a retry and its held-out samples, as a multiple of those of the attempt before; what was accepted then
    is kept."""

    def sizes(self, num_samples: int, attempt: int = 1) -> tuple[int, int]:
        """|D_syn| of an adapter's attempt, and its samples for the gate beyond it.

        Both grow: it may have failed because the held-out prompts were too few to tell agreement from chance.

        Args:
            num_samples: |D_syn| of the first attempt.
        """
        factor = self.retry_factor ** (attempt - 1)
        heldout = max(self.min_holdout, math.ceil(self.holdout_fraction * num_samples))
        return math.ceil(num_samples * factor), math.ceil(heldout * factor)


class TrackingConfig(Strict):
    """Where metrics go; metrics.jsonl is always written."""

    wandb_project: str | None = None
    """W&B project; no W&B when unset."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes the W&B run below the run directory and sends nothing."""


class FleetConfig(ConfigFile):
    """`translora migrate fleet.yaml`: one hop of many bundles."""

    command = "migrate"
    added: ClassVar[frozenset[str]] = frozenset({"prompt_template", "max_rank"})
    run_dir: Path
    """Run directory; a rerun on it continues where it stopped."""
    source: BaseModelConfig
    """The base that is retired."""
    target: BaseModelConfig
    """The base that replaces it."""
    adapters: list[AdapterEntry] = Field(min_length=1)
    """The bundles."""
    merges: list[MergeEntry] = []
    """Bundles that become one adapter, before or after the migration."""
    max_num_samples: NumSamples = 20_000
    """Largest |D| that is taken over from a bundle, whose owner chose it; above it an adapter needs a `num_samples`."""
    max_rank: int = Field(default=256, ge=1, le=MAX_RANK)
    """Largest rank of a source adapter: all that answer together have room for the largest among them."""
    prompt_template: PromptTemplate = "auto"
    """How the new adapters are prompted: `chat` (the target's chat template), a string that contains {input}, `source`
    (each as its source adapter), or `auto`: chat where the target has a chat template."""
    seed: Seed = 0
    """Root of every random number of the run."""
    synthesis: SynthesisConfig = SynthesisConfig()
    """Generate, screen, label."""
    distill: TrainConfig = TrainConfig()
    """Training of the students."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """Training of the discriminators for the next hop."""
    gate: GateConfig = GateConfig()
    """Acceptance of the migrated adapters."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics."""
    resources: ResourceConfig = ResourceConfig()
    """Actors."""

    @model_validator(mode="after")
    def _merges_what_it_trains(self) -> Self:
        if self.distill.peft is not None and any(merge.when == "after" for merge in self.merges):
            raise InputError("merges: LoRAs alone can be merged after a migration; leave distill.peft or the merge out")
        return self

    @property
    def generator(self) -> BaseModelConfig:
        """What invents the task inputs."""
        return self.synthesis.generator or self.target

    def gate_of(self, entry: AdapterEntry) -> GateConfig:
        """The gate of an adapter."""
        own = {} if entry.min_agreement is None else {"min_agreement": entry.min_agreement}
        return self.gate.model_copy(update=own)

    def template_of(self, entry: AdapterEntry, source: str) -> str:
        """How an adapter's student is prompted, as in translora.engine.prompts; `source` is its teacher's template."""
        own = self.prompt_template if entry.prompt_template is None else entry.prompt_template
        return source if own == "source" else own

    def stays_copy(self, entry: AdapterEntry) -> bool:
        """Whether an adapter's student is not trained, and stays the copy that its warm start made."""
        return self.training_of(entry).epochs == 0

    def training_of(self, entry: AdapterEntry) -> TrainConfig:
        """The training of an adapter's student."""
        own = {"epochs": entry.epochs, "learning_rate": entry.learning_rate}
        return self.distill.model_copy(update={name: value for name, value in own.items() if value is not None})
