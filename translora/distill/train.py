"""The training loop: adapters one after the other on one resident, ZeRO-3-partitioned base.

`train_worker` runs on every rank of the Ray Train worker group. The base is loaded once; for each
job the trainable slot of the bank and its AdamW state are set anew.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from translora.bundle.base import inspect_base
from translora.config import BaseModelConfig, TrainConfig
from translora.distill import zero3
from translora.distill.data import IGNORE, Sample, batch_indices, collate, encode_samples, micro_batches, num_steps
from translora.engine.loading import device, load_tokenizer
from translora.engine.prompts import prompt_format
from translora.lora.bank import AdapterBank, initial_weights
from translora.lora.peft_io import write_lora
from translora.run.files import digest, read_jsonl, replace_directory, sha256_file, write_json
from translora.run.log import quiet_worker
from translora.run.rundir import EXECUTION_ONLY

logger = logging.getLogger(__name__)
RECIPE = "recipe.txt"
"""In a job's output: the hash of what it was made from."""
FAILURE = "failure.json"
"""In a job's work_dir: why it was given up."""


@dataclass(frozen=True)
class TrainJob:
    """One adapter to train."""

    name: str
    data: str
    """JSONL with `input` and `answer`."""
    output: str
    """The PEFT directory to write; a job whose output exists is skipped."""
    work_dir: str
    """Checkpoints and train.jsonl (one line a step) of this job."""
    seed: int
    epochs: float
    learning_rate: float
    template: str = "auto"
    """Prompt template, see translora.engine.prompts."""
    with_end: bool = True
    """Train the end of the answer too; False for a discriminator, whose answer is one word."""

    def recipe(self, config: TrainConfig, fingerprint: str) -> str:
        """Hash of all that decides the result: data, seed, settings, base. A finished output bears it."""
        settings = config.model_dump(exclude=EXECUTION_ONLY)
        own = (self.seed, self.epochs, self.learning_rate, self.template, self.with_end)
        return digest(own, sha256_file(Path(self.data)), settings, fingerprint)

    def is_done(self, config: TrainConfig, fingerprint: str) -> bool:
        """Whether the output was made by exactly this job."""
        path = Path(self.output) / RECIPE
        return path.is_file() and path.read_text(encoding="utf-8") == self.recipe(config, fingerprint)

    def expected_steps(self, batch_size: int) -> int:
        """Optimizer steps if no sample is too long; for progress only."""
        num_samples = Path(self.data).read_bytes().count(b"\n")
        return num_steps(num_samples, self.epochs, batch_size)


def answer_loss(model: nn.Module, samples: list[Sample], pad_id: int, place: torch.device) -> torch.Tensor:
    """Summed cross-entropy of the answers' tokens; logits are computed at the answers' positions only."""
    inputs, labels_BL = collate(samples, pad_id)
    num_positions = labels_BL.shape[1]
    inputs = {key: value.to(place) for key, value in inputs.items()}
    # Position t predicts token t + 1: keep one position before the answer, drop the last.
    logits_BLV = model(**inputs, use_cache=False, logits_to_keep=num_positions + 1).logits[:, :-1].float()
    return F.cross_entropy(
        logits_BLV.flatten(0, 1), labels_BL.flatten().to(place), ignore_index=IGNORE, reduction="sum"
    )


def train_adapter(
    engine: Any,
    bank: AdapterBank,
    tokenizer: Any,
    job: TrainJob,
    config: TrainConfig,
    base_model: str,
    fingerprint: str,
) -> None:
    """Train one adapter and write it; every rank calls this. Resumes from the job's last checkpoint."""
    rank, world_size, place = dist.get_rank(), dist.get_world_size(), device()
    rows = read_jsonl(job.data, required=("input", "answer"))
    prompts = prompt_format(tokenizer, job.template)
    samples = encode_samples(rows, prompts, config.max_length, job.name, with_end=job.with_end)
    total_steps = num_steps(len(samples), job.epochs, config.batch_size)
    work_dir = Path(job.work_dir)
    shapes = {name: (module.base.out_features, module.base.in_features) for name, module in bank.modules.items()}

    recipe = job.recipe(config, fingerprint)
    state = zero3.read_checkpoint(work_dir, recipe)
    if state is None:
        state = zero3.fresh_state(initial_weights(shapes, config.lora.rank, job.seed))
    zero3.set_adapter(engine, bank, state)
    bank.route_rows([zero3.STUDENT], place)
    start = time.monotonic()
    for step in range(state.step, total_steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = job.learning_rate * (1 - step / total_steps)
        batch = [samples[index] for index in batch_indices(len(samples), config.batch_size, step, job.seed)]
        num_answer_tokens = sum(len(sample.answer_ids) for sample in batch)
        shards = micro_batches(batch, rank, world_size, config.micro_batch_size)
        loss_sum = torch.zeros((), device=place)
        for index, (shard, weight) in enumerate(shards):
            engine.set_gradient_accumulation_boundary(index == len(shards) - 1)
            loss = answer_loss(engine, shard, tokenizer.pad_token_id, place) * (weight / num_answer_tokens)
            # DeepSpeed averages gradients over the ranks; the batch's mean is a sum over them.
            engine.backward(loss * world_size)
            loss_sum += loss.detach()
        engine.step()
        dist.all_reduce(loss_sum)
        state.losses.append(float(loss_sum))
        if not torch.isfinite(loss_sum):
            raise FloatingPointError(f"{job.name}: loss is {float(loss_sum)} at step {step}; lower the learning rate")
        if rank == 0:
            _append(work_dir / "train.jsonl", step + 1, total_steps, state.losses[-1], time.monotonic() - start)
        if (step + 1) % config.checkpoint_every_steps == 0 and step + 1 < total_steps:
            zero3.write_checkpoint(work_dir, zero3.get_adapter(engine, bank, step + 1, state.losses), recipe)

    final = zero3.get_adapter(engine, bank, total_steps, state.losses)
    if not all(torch.isfinite(factor).all() for pair in final.weights.values() for factor in pair):
        raise FloatingPointError(f"{job.name}: weights are not finite after the last step; lower the learning rate")
    if rank == 0:
        with replace_directory(Path(job.output)) as directory:
            write_lora(directory, final.weights, alpha=config.lora.alpha, base_model=base_model)
            (directory / "losses.json").write_text(json.dumps(state.losses))
            (directory / RECIPE).write_text(recipe)
    dist.barrier()


def _append(path: Path, step: int, total_steps: int, loss: float, seconds: float) -> None:
    row = {"step": step, "num_steps": total_steps, "loss": loss, "seconds": round(seconds, 3)}
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")


def train_worker(spec: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker: load the base once, then train every job in turn."""
    quiet_worker()
    base = BaseModelConfig.model_validate(spec["base"])
    config = TrainConfig.model_validate(spec["train"])
    jobs = [TrainJob(**job) for job in spec["jobs"]]
    if spec["num_threads"]:
        torch.set_num_threads(spec["num_threads"])
    fingerprint = inspect_base(base.model).fingerprint
    tokenizer = load_tokenizer(base.model)
    engine, bank = zero3.load_engine(base, config)
    for job in jobs:
        if job.is_done(config, fingerprint):
            continue
        Path(job.work_dir).mkdir(parents=True, exist_ok=True)
        try:
            train_adapter(engine, bank, tokenizer, job, config, spec["base_name"], fingerprint)
        except (ValueError, FloatingPointError) as error:
            # A fault of this adapter's data, the same on every rank: its neighbours go on.
            if dist.get_rank() == 0:
                write_json(Path(job.work_dir) / FAILURE, {"reason": str(error)})
            dist.barrier()
