"""Where a gang's students are put on the base: the slots of the adapter bank."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from translora.config import LoraSettings
from translora.distill.data import Packed, Sample, pack
from translora.distill.hooks import StudentHooks, row_norms, student_hooks
from translora.engine.head import Head
from translora.lora.bank import AdapterBank, initial_weights
from translora.lora.banked import Factors
from translora.lora.peft_io import write_lora

if TYPE_CHECKING:
    from translora.distill.student import Student

Shard = tuple[int, Sequence[Sample], float]
"""Slot, samples of one pass, weight of an answer's token."""


class ResidentBase(Protocol):
    """What students are trained on: zero3.ShardedBase, or in tests a whole base."""

    bank: AdapterBank
    tokenizer: PreTrainedTokenizerBase
    identity: str
    place: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    attention: str
    """The model's attention over batches that are not packed."""

    def __call__(self, inputs: dict[str, object]) -> torch.Tensor:
        """Last hidden states [T, D] of a packed batch."""

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass."""

    def readable(self) -> contextlib.AbstractContextManager[None]:
        """A forward pass whose modules may read each other's weights."""

    def gathered_head(self) -> contextlib.AbstractContextManager[Head]:
        """The head with its whole weight, for as long as the context lasts."""


class Slots(Protocol):
    """What a gang needs of the places that its students train in."""

    dtype: torch.dtype
    """Of the weights that a pass computes with."""

    def new_weights(self, seed: int, lora: LoraSettings) -> dict[str, Factors]:
        """A new student's weights by name, float32; they depend on the seed and the student's settings alone."""

    def hooks(self, seed: int, lora: LoraSettings) -> StudentHooks:
        """What a new student has in its passes beside its weights."""

    def open(self, slot: int, student: Student) -> None:
        """Compute with a student's factors for as long as the slot is open, and add to its gradients."""

    def close(self, slot: int) -> None:
        """Free a slot."""

    def pack(self, shards: Sequence[Shard], top_k: int | None) -> Packed:
        """The batch of one pass; `top_k` as in translora.distill.data.pack."""

    def hidden(self, batch: Packed) -> torch.Tensor:
        """Last hidden states [T, D] of a batch, each student's samples through its own slot."""

    def write(self, directory: Path, weights: Mapping[str, Factors], base_model: str, lora: LoraSettings) -> None:
        """Write a student's weights as a PEFT directory."""


class LoraSlots:
    """Slots of the adapter bank: any number of LoRAs in one pass.

    Args:
        base: resident.
        num_slots: students at a time; the slot behind them is the ballast that keeps an idle rank in step.
        flat_sigma: whether any of them has noise on the base's weights.
    """

    def __init__(self, base: ResidentBase, num_slots: int, flat_sigma: float = 0) -> None:
        self.base, self.bank, self.dtype = base, base.bank, base.dtype
        zeros: Any = {"dtype": base.dtype, "device": base.place}
        ballast = {
            name: (torch.zeros(1, num_in, **zeros), torch.zeros(num_out, 1, **zeros))
            for name, (num_out, num_in) in self.bank.shapes.items()
        }
        self.bank.open_slot(num_slots, ballast, 1.0)
        self.norms = row_norms(self.bank) if flat_sigma else {}

    def new_weights(self, seed: int, lora: LoraSettings) -> dict[str, Factors]:
        """A [r, in] and B [out, r] by module."""
        return initial_weights(self.bank.shapes, lora.total_rank, seed)

    def hooks(self, seed: int, lora: LoraSettings) -> StudentHooks:
        """Weight noise and a sketch of the inputs, where the options ask for them."""
        return student_hooks(lora, self.bank.shapes, self.norms, seed, self.base.place)

    def open(self, slot: int, student: Student) -> None:
        """Put the factors into the bank."""
        scaling, hooks = student.config.lora.scaling, student.hooks.by_module
        self.bank.open_slot(slot, student.factors, scaling, student.gradients, hooks)

    def close(self, slot: int) -> None:
        """Take them out."""
        self.bank.close_slot(slot)

    def pack(self, shards: Sequence[Shard], top_k: int | None) -> Packed:
        """Without padding, adapter-major."""
        return pack(shards, self.base.place, top_k=top_k)

    def hidden(self, batch: Packed) -> torch.Tensor:
        """One pass over the packed batch."""
        self.bank.route_segments(batch.segments)
        return self.base(batch.inputs)

    def write(self, directory: Path, weights: Mapping[str, Factors], base_model: str, lora: LoraSettings) -> None:
        """As PEFT's LoRA."""
        rank = lora.total_rank
        alpha = lora.scaling * (rank**0.5 if lora.use_rslora else rank)
        write_lora(directory, weights, alpha=alpha, base_model=base_model, use_rslora=lora.use_rslora)
