"""How much memory a training pass takes: from the pass itself, run on fake tensors (translora.engine.fake).

The run chooses the size of its gangs by it, and `translora plan` says by it what fits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from translora.config import LoraSettings, TrainConfig
from translora.distill.data import Sample, pack
from translora.distill.hooks import sketch_bytes, student_hooks
from translora.distill.linear import keep_no_inputs
from translora.distill.plan import GangBytes
from translora.engine.attention import PACKED
from translora.engine.fake import (
    ALIKE,
    FLASH_SHAPED,
    LiveBytes,
    attention_shape,
    decoder_layers,
    depths_to_run,
    fake_base,
    inner_size,
    num_layers,
    with_layers,
)
from translora.engine.head import CHUNK_ELEMENTS, Head, cross_entropy, positions_at_once
from translora.lora.bank import AdapterBank, new_bank
from translora.run.redact import first_line

logger = logging.getLogger(__name__)
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


@dataclass(frozen=True)
class BaseWeights:
    """Counts of a base's weights."""

    total: int
    head: int
    """Of the output head, which may be those of the embedding."""
    largest_layer: int


def weights_of(model: PreTrainedModel) -> BaseWeights:
    """The counts of a model, whole, fake or partitioned."""

    def count(parameters: Iterable[Any]) -> int:
        return sum(getattr(parameter, "ds_numel", None) or parameter.numel() for parameter in parameters)

    return BaseWeights(
        total=count(model.parameters()),
        head=count(Head.of(model).parameters),
        largest_layer=max(count(layer.parameters()) for layer in decoder_layers(model)),
    )


def gathered_weights(weights: BaseWeights, ds_config: Mapping[str, Any]) -> int:
    """Weights of the base that are whole on a worker at the fullest: layers, the next ones, the head for the loss."""
    zero = ds_config["zero_optimization"]
    ahead = int(zero.get("stage3_prefetch_bucket_size", 50_000_000))
    most = int(zero.get("stage3_max_live_parameters", 1_000_000_000))
    return min(weights.total, max(weights.largest_layer, most) + ahead) + weights.head


def lora_weights(shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """Weights of one adapter on modules of these (out, in)."""
    return sum(rank * (num_out + num_in) for num_out, num_in in shapes.values())


def student_bytes(shapes: dict[str, tuple[int, int]], lora: LoraSettings, dtype: torch.dtype) -> int:
    """Bytes that one student owns: weights, gradient and two moments in float32, and the copy that passes use.

    With `init: eva` also the sketches of its first step, two numbers a weight where updates are scaled, and LoRA-Pro's
    moments are of the modules' whole matrices.

    Args:
        shapes: (out, in) of the adapted modules.
    """
    copy = 0 if dtype == torch.float32 else dtype.itemsize
    sketches = sum(sketch_bytes(num_in, lora.total_rank) for _, num_in in shapes.values()) if lora.init == "eva" else 0
    scales = 8 if lora.scales_updates else 0
    weights = lora_weights(shapes, lora.total_rank)
    moments = sum(map(math.prod, shapes.values())) if lora.gradient == "lora-pro" else weights
    return (8 + copy + scales) * weights + 8 * moments + sketches


def gang_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    train: TrainConfig,
    shapes: dict[str, tuple[int, int]],
    num_samples: int,
    num_tokens: int,
    num_answer: int | None = None,
    *,
    flash: bool = False,
) -> GangBytes:
    """The bytes of a gang and its pass, from passes of one and of two students.

    Args:
        config: of the base.
        dtype: of the base and of the passes.
        shapes: (out, in) of the adapted modules.
        num_samples, num_tokens, flash: see PassSize.
        num_answer: as there; all when unset.
    """
    num_answer = num_tokens if num_answer is None else num_answer
    one, two = (
        pass_bytes(config, dtype, train, PassSize(count, num_samples, num_tokens, num_answer, flash))
        for count in (1, 2)
    )
    own = student_bytes(shapes, train.lora, dtype)

    def line(first: int, second: int) -> tuple[int, int]:
        return max(0, 2 * first - second), second - first + own

    chunk, positions = positions_at_once(config.get_text_config().vocab_size), num_samples * num_answer
    full, twice = (loss_bytes(config, dtype, count) for count in (chunk, 2 * chunk))
    beyond = math.ceil((twice - full) * positions / chunk)
    return GangBytes(
        backward=line(one.activations + one.backward, two.activations + two.backward),
        loss=(
            line(one.activations + one.loss, two.activations + two.loss),
            (full, two.activations - one.activations + own + beyond),
        ),
        activations=one.activations,
    )


def known_gang_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    train: TrainConfig,
    shapes: dict[str, tuple[int, int]],
    num_samples: int,
    num_tokens: int,
    *,
    flash: bool,
) -> GangBytes:
    """`gang_bytes`, or the estimate.

    A fault boundary: not every model can be run on fake tensors, and a guess must not end a training or a plan.
    """
    try:
        return gang_bytes(config, dtype, train, shapes, num_samples, num_tokens, flash=flash)
    except Exception as error:
        logger.info("%s: the memory of a pass is estimated (%s)", config.model_type, first_line(error))
        return estimated_gang_bytes(config.get_text_config(), dtype, train, shapes, num_samples * num_tokens)


def known_activations(config: PreTrainedConfig, dtype: torch.dtype, train: TrainConfig, size: PassSize) -> int:
    """`known_gang_bytes(...).activations` alone, for which nothing after the forward pass is run."""
    try:  # as there
        return pass_bytes(config, dtype, train, size, forward_only=True).activations
    except Exception as error:
        logger.info("%s: the activations of a pass are estimated (%s)", config.model_type, first_line(error))
        return estimated_activations(config.get_text_config(), dtype, train, size.num_samples * size.num_tokens)


def loss_bytes(config: PreTrainedConfig, dtype: torch.dtype, num_positions: int) -> int:
    """The most that the loss of so many positions takes."""
    with fake_base(with_layers(config, 1), dtype, PACKED) as model:
        head = Head.of(model)
        hidden_LD = torch.zeros(num_positions, head.weight.shape[1], dtype=dtype, requires_grad=True)
        labels_L, weights_L = torch.zeros(num_positions, dtype=torch.long), torch.ones(num_positions)
        with LiveBytes([hidden_LD, labels_L, weights_L, *head.parameters]) as memory:
            cross_entropy(hidden_LD, head, labels_L, weights_L)
        return memory.peak


def estimated_activations(text: Any, dtype: torch.dtype, train: TrainConfig, num_tokens: int) -> int:
    """Activations from the shape of a decoder, for a base that cannot be run on fake tensors.

    A layer keeps about eight hidden states (residuals, norms, attention's in- and output), queries, keys and values,
    and four intermediate states of the MLP; with recomputation one hidden state, and one layer's all at a time.

    Args:
        text: config of the decoder.
        num_tokens: of one student in a pass.
    """
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads, groups, head_dim = attention_shape(text)
    layer = 8 * hidden + 2 * (heads + groups) * head_dim + 4 * inner_size(text)
    kept = layers * hidden + layer if train.gradient_checkpointing else layers * layer
    return num_tokens * kept * dtype.itemsize


def estimated_gang_bytes(
    text: Any, dtype: torch.dtype, train: TrainConfig, shapes: dict[str, tuple[int, int]], num_tokens: int
) -> GangBytes:
    """The bytes of a gang from `estimated_activations`."""
    activations = estimated_activations(text, dtype, train, num_tokens)
    own = student_bytes(shapes, train.lora, dtype)
    return GangBytes(backward=(3 * 4 * CHUNK_ELEMENTS, own + activations), activations=activations)


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


def recompute(model: PreTrainedModel) -> None:
    """Have a frozen base compute its activations again in the backward pass, without dropout.

    transformers recomputes in training mode only, in which it would switch on dropout in some bases. A student's result
    must not depend on the random numbers that its neighbours draw.
    """
    # Before transformers 5.23 it has its old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
