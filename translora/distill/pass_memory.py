"""The memory of one training pass, from the pass itself, run on fake tensors (translora.engine.fake)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from translora.config import TrainConfig
from translora.distill.data import Sample, pack
from translora.distill.frozen import keep_no_inputs, recompute
from translora.distill.hooks import student_hooks
from translora.engine.attention import PACKED
from translora.engine.fake import ALIKE, FLASH_SHAPED, LiveBytes, depths_to_run, fake_base, num_layers, with_layers
from translora.engine.head import Head, cross_entropy
from translora.lora.bank import AdapterBank, new_bank

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PassSize:
    """What is in a pass."""

    num_students: int
    num_samples: int
    """Of one student."""
    num_tokens: int
    """Of a sample."""
    num_answer: int
    """Those of them that the loss is taken on."""
    flash: bool = False
    """flash-attention computes, which keeps keys and values of the groups as they are."""


@dataclass(frozen=True)
class PassBytes:
    """Bytes of a pass, beside the base's weights and what the students own."""

    activations: int
    """What the forward pass leaves for the backward pass."""
    loss: int
    """The most that the loss has beside them: a chunk of the logits and its gradient."""
    backward: int
    """The most that the backward pass has beside what is left of them: gradients of one layer."""

    @property
    def peak(self) -> int:
        """The most at a time."""
        return self.activations + max(self.loss, self.backward)


def loss_bytes(config: PreTrainedConfig, dtype: torch.dtype, num_positions: int) -> int:
    """The most that the loss of so many positions takes."""
    with fake_base(with_layers(config, 1), dtype, PACKED) as model:
        head = Head.of(model)
        hidden_LD = torch.zeros(num_positions, head.weight.shape[1], dtype=dtype, requires_grad=True)
        labels_L, weights_L = torch.zeros(num_positions, dtype=torch.long), torch.ones(num_positions)
        with LiveBytes([hidden_LD, labels_L, weights_L, *head.parameters]) as memory:
            cross_entropy(hidden_LD, head, labels_L, weights_L)
        return memory.peak


def pass_bytes(
    config: PreTrainedConfig, dtype: torch.dtype, train: TrainConfig, size: PassSize, *, forward_only: bool = False
) -> PassBytes:
    """The bytes of one pass; a deep base is run with a few of its layers, and the others are like the last of these.

    Where all layers are alike, only the activations depend on how many there are.
    """
    whole, (few, more) = num_layers(config), depths_to_run(config)
    if whole <= more:
        return _run_pass(config, dtype, train, size, forward_only)
    alike = (few, more) == ALIKE
    shallow = _run_pass(with_layers(config, few), dtype, train, size, forward_only or alike)
    deeper = _run_pass(with_layers(config, more), dtype, train, size, forward_only)
    if alike:
        shallow = dataclasses.replace(deeper, activations=shallow.activations)

    def at_depth(first: int, second: int) -> int:
        return second + (second - first) * (whole - more) // (more - few)

    return PassBytes(
        at_depth(shallow.activations, deeper.activations),
        at_depth(shallow.loss, deeper.loss),
        at_depth(shallow.backward, deeper.backward),
    )


def _run_pass(
    config: PreTrainedConfig, dtype: torch.dtype, train: TrainConfig, size: PassSize, forward_only: bool = False
) -> PassBytes:
    """One pass as translora.distill.train.run_pass has it, on fake tensors."""
    prompt, answer = [0] * (size.num_tokens + 1 - size.num_answer), [0] * size.num_answer  # the last is not computed
    samples = [Sample(prompt, answer)] * size.num_samples
    with fake_base(config, dtype, FLASH_SHAPED if size.flash else PACKED) as model, frozen_linears():
        bank = new_bank(model, train.lora.target_modules)
        if train.gradient_checkpointing:
            recompute(model)
        own = open_zero_students(bank, train, size.num_students, dtype)
        batch = pack([(slot, samples, 1.0) for slot in range(size.num_students)], CPU)
        bank.route_segments(batch.segments)
        head, inputs = Head.of(model), batch.inputs
        with LiveBytes([*model.parameters(), *model.buffers(), *own]) as memory:
            hidden_1TD = model.base_model(**inputs, use_cache=False).last_hidden_state
            activations = memory.live
            if forward_only:
                return PassBytes(activations, loss=0, backward=0)
            memory.begin_peak()
            losses_L = cross_entropy(hidden_1TD[0][batch.positions_L], head, batch.labels_L, batch.weights_L)
            loss = memory.peak - activations
            memory.begin_peak()
            losses_L.sum().backward()
            return PassBytes(activations, loss, memory.peak - activations)


def open_zero_students(bank: AdapterBank, train: TrainConfig, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Fill slots 0..count of a bank with students of zeros; returns their factors and gradients."""
    rank, own = train.lora.total_rank, list[torch.Tensor]()
    for slot in range(count):
        factors = {
            name: (torch.zeros(rank, num_in, dtype=dtype), torch.zeros(num_out, rank, dtype=dtype))
            for name, (num_out, num_in) in bank.shapes.items()
        }
        gradients = {
            name: (torch.zeros_like(A, dtype=torch.float32), torch.zeros_like(B, dtype=torch.float32))
            for name, (A, B) in factors.items()
        }
        norms = {name: torch.zeros(num_out) for name, (num_out, _) in bank.shapes.items()}
        hooks = student_hooks(train.lora, bank.shapes, norms, slot, CPU)
        bank.open_slot(slot, factors, train.lora.scaling, gradients, hooks.by_module)
        own += hooks.tensors()
        own += [factor for pair in (*factors.values(), *gradients.values()) for factor in pair]
    return own


@contextlib.contextmanager
def frozen_linears() -> Iterator[None]:
    """Have nn.Linear compute as under ZeRO-3."""
    before = keep_no_inputs()
    try:
        yield
    finally:
        torch.nn.functional.linear = before
