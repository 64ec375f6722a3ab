"""What is to be trained: one adapter's data, seed and length, and where its files go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from translora.bundle.adapter import CONFIG, WEIGHTS
from translora.config import DiscriminatorConfig, TrainConfig
from translora.distill.data import Sample, encode_samples, num_steps
from translora.distill.ds_config import deciding
from translora.engine.prompts import prompt_format
from translora.errors import InputError
from translora.run.files import derive_seed, digest, read_jsonl, sha256_file, write_jsonl

RECIPE = "recipe.txt"
"""In a job's output: the hash of what it was made from."""
FAILURE = "failure.json"
"""In a job's work_dir: why it was given up."""
OF_TEACHERS = ("kl_top_k", "token_share")
"""Settings of a training that say what a teacher is imitated in."""


@dataclass(frozen=True)
class TrainJob:
    """One adapter to train."""

    name: str
    data: str
    """JSONL with `input` and `answer`."""
    output: str
    """The PEFT directory to write; a job whose output was made by the same recipe is skipped."""
    work_dir: str
    """train.jsonl (one line a step) and failure.json of this job."""
    seed: int
    epochs: float
    learning_rate: float
    template: str = "auto"
    """Prompt template, see translora.engine.prompts."""
    with_end: bool = True
    """Train the end of the answer too; False for a discriminator, whose answer is one word."""
    peft: dict[str, Any] | None = None
    """Settings of a method that the adapter bank does not have; None is a LoRA."""
    start: str | None = None
    """A LoRA's PEFT directory, whose weights the student begins with."""

    @property
    def owner(self) -> str:
        """The adapter, or the task, that it is a training of."""
        return self.name.rpartition("/")[0]

    @property
    def kind(self) -> str:
        """Which of its owner's trainings it is."""
        return self.name.rpartition("/")[2]

    def settings(self, config: TrainConfig) -> TrainConfig:
        """How this job is trained: a student as the config says, a discriminator by LoRAs of its shape alone.

        Soft labels are `sft` with several answers a sample, which lie in the job's data and so are of its recipe.
        """
        own: dict[str, Any] = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        own["loss"] = "kl" if config.loss == "kl" and self.with_end else "sft"
        if not self.with_end:
            config, own["lora"] = config.at_defaults(OF_TEACHERS), config.lora.plain()
        return config.model_copy(update=own)

    def recipe(self, config: TrainConfig, identity: str) -> str:
        """Hash of all that decides the result: data, seed, settings, base. A finished output bears it.

        Data that cannot be read makes a recipe that no output bears; `samples` says what is wrong with it.
        """
        settings = deciding(self.settings(config))
        for of_others in ("warm_start", "lora" if self.peft else "peft"):
            settings.pop(of_others, None)
        own = (self.seed, self.epochs, self.learning_rate, self.template, self.with_end, self.peft)
        begun = [Path(self.start) / name for name in (CONFIG, WEIGHTS)] if self.start is not None else []
        try:
            data, *start = map(sha256_file, (Path(self.data), *begun))
        except OSError:
            data, start = f"unreadable {self.name}", []
        return digest((*own, *start), data, settings, identity)

    def is_made(self, recipe: str) -> bool:
        """Whether the output was made by this recipe."""
        path = Path(self.output) / RECIPE
        return path.is_file() and path.read_text(encoding="utf-8") == recipe

    def is_done(self, config: TrainConfig, identity: str) -> bool:
        """Whether the output was made by exactly this job."""
        return self.is_made(self.recipe(config, identity))

    def samples(self, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> list[Sample]:
        """The job's data as tokens.

        Raises:
            InputError: the data cannot be read, or no row of it is short enough.
        """
        rows = read_jsonl(self.data, required=("input", "answer"))
        prompts = prompt_format(tokenizer, self.template)
        return encode_samples(
            rows, prompts, config.max_length, self.name, with_end=self.with_end, token_share=config.token_share
        )

    def failure(self) -> str | None:
        """Why it was given up, if it was."""
        path = Path(self.work_dir) / FAILURE
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"]) if path.is_file() else None

    def expected_steps(self, batch_size: int) -> int:
        """Optimizer steps if no sample is too long; for progress only."""
        num_samples = Path(self.data).read_bytes().count(b"\n")
        return num_steps(num_samples, self.epochs, batch_size)


def make_job(
    owner: str,
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    settings: TrainConfig | DiscriminatorConfig,
    *,
    output: Path,
    work_dir: Path,
    root_seed: int,
    with_end: bool,
    template: str = "auto",
    peft: dict[str, Any] | None = None,
    start: Path | None = None,
) -> TrainJob:
    """Write a job's data and describe the job; a failure of an earlier start is forgotten.

    Args:
        owner: name of the adapter or task, and `kind` of this training of it; both decide the seed.
        rows: `input` and `answer`, and `teacher` for a student that needs one.
        settings: epochs and learning rate; of 0 epochs there is one step that changes nothing.
    """
    data = work_dir / "data.jsonl"
    write_jsonl(data, rows)
    (work_dir / FAILURE).unlink(missing_ok=True)
    return TrainJob(
        name=f"{owner}/{kind}",
        data=str(data),
        output=str(output),
        work_dir=str(work_dir),
        seed=derive_seed(root_seed, owner, kind),
        epochs=settings.epochs,
        learning_rate=settings.learning_rate if settings.epochs else 0.0,
        template=template,
        with_end=with_end,
        peft=peft,
        start=None if start is None else str(start),
    )


def refuse_failures(jobs: Sequence[TrainJob]) -> None:
    """End where one training that was given up spoils the whole.

    Raises:
        InputError: why the first of these jobs was given up.
    """
    for job in jobs:
        if (reason := job.failure()) is not None:
            raise InputError(reason)
