"""Training samples of one adapter: tokens, order and batches, all a function of the adapter's own seed.

Shapes: B samples, T tokens. Samples are padded on the left, so that every answer ends at T.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from translora.engine.prompts import PromptFormat

logger = logging.getLogger(__name__)
IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """One training sample: the loss is taken on `answer_ids` alone."""

    prompt_ids: list[int]
    answer_ids: list[int]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all `parts` and on nothing else."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def encode_samples(
    rows: Sequence[dict[str, str]], prompts: PromptFormat, max_length: int, name: str, *, with_end: bool = True
) -> list[Sample]:
    """Tokenise rows of `input` and `answer`; those longer than `max_length` are dropped with a warning.

    `with_end` puts the end of the answer behind it; a discriminator's loss is on yes or no alone.

    Raises:
        ValueError: no row is left.
    """
    samples = [
        Sample(prompts.encode_prompt(row["input"]), prompts.encode_answer(row["answer"], with_end=with_end))
        for row in rows
    ]
    kept = [sample for sample in samples if len(sample.prompt_ids) + len(sample.answer_ids) <= max_length]
    if len(kept) < len(samples):
        logger.warning(
            "%s: %d of %d samples exceed max_length %d", name, len(samples) - len(kept), len(samples), max_length
        )
    if not kept:
        raise ValueError(f"{name}: no training sample of at most {max_length} tokens; raise max_length")
    return kept


def num_steps(num_samples: int, epochs: float, batch_size: int) -> int:
    """Optimizer steps of a run; the last batch of an epoch may be smaller."""
    return max(1, math.ceil(epochs * math.ceil(num_samples / batch_size)))


def batch_indices(num_samples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Sample indices of one optimizer step: a new order each epoch, drawn from the adapter's seed."""
    steps_per_epoch = math.ceil(num_samples / batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    order = torch.randperm(num_samples, generator=generator).tolist()
    return order[position * batch_size : (position + 1) * batch_size]


def micro_batches(
    batch: Sequence[Sample], rank: int, world_size: int, micro_batch_size: int
) -> list[tuple[list[Sample], float]]:
    """This rank's share of a batch as (samples, weight); every rank gets the same number of micro-batches.

    A rank that runs short computes the batch's first sample with weight 0, so that collectives match.
    """
    longest_share = math.ceil(len(batch) / world_size)
    share = list(batch[rank::world_size])
    shards = []
    for start in range(0, longest_share, micro_batch_size):
        samples = share[start : start + micro_batch_size]
        shards.append((samples, 1.0) if samples else ([batch[0]], 0.0))
    return shards


def collate(samples: Sequence[Sample], pad_id: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs [B, T] padded on the left, and the labels [B, L] of the last L positions (L: longest answer)."""
    length = max(len(sample.prompt_ids) + len(sample.answer_ids) for sample in samples)
    longest_answer = max(len(sample.answer_ids) for sample in samples)
    input_ids, mask, labels = [], [], []
    for sample in samples:
        ids = sample.prompt_ids + sample.answer_ids
        padding = length - len(ids)
        input_ids.append([pad_id] * padding + ids)
        mask.append([0] * padding + [1] * len(ids))
        labels.append([IGNORE] * (longest_answer - len(sample.answer_ids)) + sample.answer_ids)
    mask_BT = torch.tensor(mask)
    inputs = {
        "input_ids": torch.tensor(input_ids),
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(-1) - 1).clamp(min=0),
    }
    return inputs, torch.tensor(labels)
