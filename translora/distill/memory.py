"""How much memory a training pass takes: from the pass itself, run on fake tensors (translora.engine.fake).

The run chooses the size of its gangs by it, and `translora plan` says by it what fits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from translora.config import LoraSettings, TrainConfig
from translora.distill.ds_config import is_resident
from translora.distill.hooks import sketch_bytes
from translora.distill.pass_memory import PassSize, loss_bytes, pass_bytes
from translora.distill.plan import GangBytes
from translora.engine.fake import attention_shape, decoder_layers, inner_size
from translora.engine.head import CHUNK_ELEMENTS, Head, positions_at_once
from translora.run.redact import first_line

logger = logging.getLogger(__name__)


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
    if is_resident(ds_config, weights.total):
        return weights.total
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
    weights, moments = lora_weights(shapes, lora.total_rank), num_moments(shapes, lora)
    sketches = sum(sketch_bytes(num_in, lora.total_rank) for _, num_in in shapes.values()) if lora.init == "eva" else 0
    scales = 8 if lora.scales_updates else 0
    return (8 + copy + scales) * weights + 8 * moments + sketches


def checkpoint_bytes(shapes: dict[str, tuple[int, int]], lora: LoraSettings) -> int:
    """Bytes of a student in a checkpoint: its weights and both moments, in float32."""
    return 4 * lora_weights(shapes, lora.total_rank) + 8 * num_moments(shapes, lora)


def num_moments(shapes: dict[str, tuple[int, int]], lora: LoraSettings) -> int:
    """Numbers in each of a student's moments; LoRA-Pro's are of the modules' whole matrices."""
    whole = sum(map(math.prod, shapes.values()))
    return whole if lora.gradient == "lora-pro" else lora_weights(shapes, lora.total_rank)


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
