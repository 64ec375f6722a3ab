"""Data of a merge: rows of a file, their tokens, and padded batches.

Shapes: B rows of T tokens, filled up on the right.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from translora.distill.data import Sample
from translora.engine.prompts import PromptFormat
from translora.errors import InputError
from translora.run.files import check_row, derive_seed, read_jsonl, sha256_file

logger = logging.getLogger(__name__)
ANSWERS = ("answer", "target")
"""Fields that may hold a row's answer; a row without one is an unlabelled input."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with an `input`: JSONL, or a run's synthetic.parquet, whose refused samples are left out.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    if path.suffix != ".parquet":
        return read_jsonl(path, required=("input",))
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a run's adapters/NAME/synthetic.parquet") from error
    rows = [row for row in found if row.get("split") != "refused"]
    if not rows:
        raise InputError(f"{path}: no accepted samples; give the synthetic set of an adapter that was migrated")
    return [check_row(row, ("input",), f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def answer_of(row: Mapping[str, Any], where: str) -> str:
    """A row's answer as text; empty where it has none.

    Raises:
        InputError: it is no text and no number; names the place.
    """
    found = next((row[field] for field in ANSWERS if row.get(field) is not None), "")
    if found != found:
        raise InputError(f"{where}: its answer is not a number; give text, or leave the row out")
    if not isinstance(found, str | int | float) or isinstance(found, bool):
        raise InputError(f"{where}: its answer is {type(found).__name__}; give text, as the model has to write it")
    return str(found).strip()


def read_samples(path: Path, prompts: PromptFormat, max_length: int, max_samples: int, seed: int) -> list[Sample]:
    """Tokens of a file's rows, those longer than `max_length` dropped with a warning.

    Of more than `max_samples` as many are drawn, by the file's contents and the seed alone.

    Raises:
        InputError: names the file; no row is left.
    """
    samples = []
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        answer = answer_of(row, f"{path}, row {number}")
        pair = prompts.encode_pair(row["input"], answer) if answer else (prompts.encode_prompt(row["input"]), [])
        if sum(map(len, pair)) <= max_length:
            samples.append(Sample(*pair))
    if len(samples) < len(rows):
        dropped = len(rows) - len(samples)
        logger.warning("%s: %d of %d rows exceed max_length %d", path, dropped, len(rows), max_length)
    if len(samples) > max_samples:
        logger.info("%s: %d of %d rows are taken (max_samples)", path, max_samples, len(samples))
        rng = random.Random(derive_seed(seed, "merge", sha256_file(path)))
        samples = [samples[index] for index in sorted(rng.sample(range(len(samples)), max_samples))]
    if not samples:
        raise InputError(f"{path}: no row of at most {max_length} tokens; raise max_length")
    return samples


def pad_batch(samples: Sequence[Sample], pad_token_id: int, *, with_labels: bool = False) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, T], and labels [B, T] that are -100 outside the answers."""
    rows = [sample.prompt_ids + sample.answer_ids for sample in samples]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    if with_labels:
        labels = [[-100] * len(sample.prompt_ids) + sample.answer_ids for sample in samples]
        batch["labels"] = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    return batch


def batches(samples: Sequence[Sample], batch_size: int, pad_token_id: int) -> list[dict[str, torch.Tensor]]:
    """All samples in batches, rows of similar length together."""
    ordered = sorted(samples, key=lambda sample: (len(sample.prompt_ids) + len(sample.answer_ids), sample.prompt_ids))
    return [
        pad_batch(ordered[start : start + batch_size], pad_token_id) for start in range(0, len(ordered), batch_size)
    ]
