"""Typed configuration of `translora evaluate`, and the prepare and fleet configs that it makes of itself.

Importing this module loads neither torch nor ray.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError, model_validator

from translora.config import (
    OPEN_GATE,
    AdapterEntry,
    BaseModelConfig,
    DiscriminatorConfig,
    FleetConfig,
    GateConfig,
    PrepareConfig,
    PrepareEntry,
    ResourceConfig,
    SynthesisConfig,
    TrainConfig,
    for_real_data,
    refuse_same_names,
)
from translora.config.base import PromptTemplate
from translora.config_file import NAME_PATTERN, ConfigFile, NumSamples, Seed, Strict, faults_text
from translora.errors import InputError

SOURCE_BASE, SOURCE_ADAPTER, TARGET_BASE, REAL = "source_base", "source_adapter", "target_base", "real"
REFERENCE_ARMS = (SOURCE_BASE, SOURCE_ADAPTER, TARGET_BASE, REAL)
"""What the migrations are compared with; `real` is trained as `train` says, on the target base and the real data."""
OVERRIDDEN = ("synthesis", "distill", "gate", "num_samples")
"""What an arm may override."""
_UNUSED_DISCRIMINATOR = {"epochs": 1, "max_samples": 4}


class EvaluateTask(Strict):
    """One task with real data."""

    added: ClassVar[frozenset[str]] = frozenset({"prompt_template", "stop"})

    name: str = Field(pattern=NAME_PATTERN)
    """Task name: the <NAME> of the discriminator's question, and the bundle's directory."""
    data: str | None = None
    """JSONL with `input` and `target`, or a JSON file of BIG-Bench-Hard."""
    lm_eval: str | None = None
    """In the place of data: a task of lm-evaluation-harness by name. Rows to train on are of its training split, rows
    to test on of its test split, or of validation where it has none; the harness scores the answers."""
    include_path: str | None = None
    """Folder with task files (YAML) of the harness, among which lm_eval may be."""
    metric: str | None = None
    """Of lm_eval's task; its first one that is a mean over the documents when unset."""
    filter: str | None = None
    """Of lm_eval's task: which of its readings of an answer is scored; its first one when unset."""
    adapter: str | None = None
    """Existing PEFT adapter of the source base, in the place of one that is trained here, in all seeds: the test rows
    must be none that it has seen."""
    prompt_template: PromptTemplate | None = None
    """How the source adapter is prompted, as in a prepare file: what `adapter` was trained with."""
    stop: str | None = Field(default=None, min_length=1)
    """Text at which the answers of `adapter` end, if it never learnt to end them."""
    num_train: int = Field(default=100, ge=5)
    """Rows that source adapter, discriminator and the target's adapter are trained on; another draw per seed."""
    num_test: int = Field(default=100, ge=2)
    """Rows, none of them a training row, that every arm answers."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.data is None) == (self.lm_eval is None):
            raise InputError(f"task {self.name}: give either data or lm_eval")
        if self.lm_eval is None:
            if self.include_path is not None:
                raise InputError(f"task {self.name}: include_path holds task files of lm_eval, which is not set")
            if self.metric is not None or self.filter is not None:
                raise InputError(f"task {self.name}: metric and filter are of lm_eval's task, which is not set")
        if self.adapter is None and self.stop is not None:
            raise InputError(
                f"task {self.name}: stop is for an adapter that is given; one trained here ends its answers"
            )
        return self


class EvaluateConfig(ConfigFile):
    """`translora evaluate evaluate.yaml`: what a migration keeps, measured on tasks whose real data is at hand."""

    command = "evaluate"
    run_dir: Path
    """Run directory; a rerun on it continues where it stopped."""
    output: Path
    """The Markdown file to write; .json and .svg (the calibration) of the same name are written beside it."""
    source: BaseModelConfig
    """The base that is retired."""
    target: BaseModelConfig
    """The base that replaces it."""
    tasks: list[EvaluateTask] = Field(min_length=1)
    """The tasks; each becomes one adapter per seed and arm."""
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)
    """One whole repetition each: split of the data, seed examples, source adapter, migrations."""
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    """Migrations of the same bundles by name; values override `num_samples` and sections of the fleet file: synthesis,
    distill, gate. A rerun computes those alone that were added or changed."""
    num_samples: NumSamples = 100
    """|D_syn| of every adapter, where an arm has no other."""
    train: TrainConfig = TrainConfig()
    """Training of the source adapters, and of the real-data adapters on the target base."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """Training of the source adapters' discriminators."""
    synthesis: SynthesisConfig = SynthesisConfig()
    """Generate, screen, label; also batch size and longest answer of the measurement."""
    distill: TrainConfig = TrainConfig()
    """Training of the students."""
    gate: GateConfig = GateConfig()
    """The verdicts that are compared with real accuracy; nothing is withheld from the measurement."""
    resources: ResourceConfig = ResourceConfig()
    """Actors."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.train = for_real_data(self.train)
        refuse_same_names([task.name for task in self.tasks])
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: {self.seeds} names one twice; a repetition counts once")
        if self.output.suffix != ".md":
            raise InputError(f"output: {self.output.name} does not end in .md; name the Markdown file to write")
        written = {path.resolve() for path in self.outputs}
        if any(path.is_relative_to(self.run_dir.resolve()) for path in written):
            raise InputError(f"output: {self.output} lies in run_dir, whose files it could replace; name another place")
        for task in self.tasks:
            if task.data is not None and Path(task.data).resolve() in written:
                raise InputError(f"output: {self.output.name} would replace {task.data}; give another name")
        for arm in self.arms:
            if not re.fullmatch(NAME_PATTERN, arm) or arm in REFERENCE_ARMS:
                raise InputError(
                    f"arms.{arm}: not a name for an arm; use letters, digits, '.', '_' and '-', "
                    f"and none of {', '.join(REFERENCE_ARMS)}"
                )
            self.fleet(self.seeds[0], arm)
        return self

    @property
    def outputs(self) -> list[Path]:
        """The page, its figures and its plot."""
        return [self.output.with_suffix(suffix) for suffix in (".md", ".json", ".svg")]

    def seed_dir(self, seed: int) -> Path:
        """Where one repetition lies."""
        return self.run_dir / f"seed-{seed}"

    def arm_dir(self, seed: int, arm: str) -> Path:
        """The run directory of one migration."""
        return self.seed_dir(seed) / "arms" / arm

    def bundle_dir(self, seed: int, task: str) -> Path:
        """The source adapter of a task as a bundle."""
        return self.seed_dir(seed) / "bundles" / task

    def train_file(self, seed: int, task: str) -> Path:
        """The training rows of a task in one repetition."""
        return self.seed_dir(seed) / "data" / f"{task}.train.jsonl"

    def prepare(self, seed: int) -> PrepareConfig:
        """The owner's side of one repetition."""
        return PrepareConfig(
            output_dir=self.seed_dir(seed) / "bundles",
            run_dir=self.seed_dir(seed) / "prepare",
            source=self.source,
            tasks=[
                PrepareEntry(
                    name=task.name,
                    data=str(self.train_file(seed, task.name)),
                    adapter=task.adapter,
                    prompt_template=task.prompt_template,
                )
                for task in self.tasks
            ],
            seed=seed,
            train=self.train,
            discriminator=self.discriminator,
            synthesis=self.synthesis,
            resources=self.resources,
        )

    def fleet(self, seed: int, arm: str) -> FleetConfig:
        """The migration of one arm, with its own gate thresholds.

        The next hop's discriminators are not measured: their training is cut to one step.

        Raises:
            InputError: the arm overrides what it may not, or with what is no value of a setting.
        """
        overrides = self.arms[arm]
        for section in overrides:
            if section not in OVERRIDDEN:
                raise InputError(f"arms.{arm}.{section}: an arm overrides settings of {', '.join(OVERRIDDEN)} alone")
        whole = {
            "run_dir": self.arm_dir(seed, arm),
            "source": self.source.model_dump(),
            "target": self.target.model_dump(),
            "seed": seed,
            "discriminator": _UNUSED_DISCRIMINATOR,
            "resources": self.resources.model_dump(),
        }
        own = merge(self.model_dump(include=set(OVERRIDDEN)), overrides)
        num_samples = own.pop("num_samples")
        try:
            entries = [
                AdapterEntry.model_validate(
                    {"bundle": str(self.bundle_dir(seed, task.name)), "num_samples": num_samples, "stop": task.stop}
                )
                for task in self.tasks
            ]
            return FleetConfig.model_validate(whole | own | {"adapters": entries})
        except ValidationError as error:
            raise InputError(faults_text(FleetConfig, error, f"arms.{arm}.")) from error


def without_gate(fleet: FleetConfig) -> FleetConfig:
    """The same migration with thresholds that hold nothing back and no second attempts, so that all is measured."""
    gate = fleet.gate.model_copy(update={**OPEN_GATE, "retries": 0})
    return fleet.model_copy(update={"gate": gate})


def merge(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Settings with the overrides put in, section by section.

    Lists and values are replaced whole, and so is `peft`: settings of one method are none of another.
    """
    merged = dict(settings)
    for key, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "peft"
        merged[key] = merge(merged[key], value) if nested else value
    return merged
