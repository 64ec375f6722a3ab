"""The shape of a base from its config.json alone: no weights, no tokenizer."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from translora.bundle.base import refuse_quantised
from translora.bundle.hub import name_of_path
from translora.bundle.modules import adaptable, meta_model
from translora.config import BaseModelConfig, FleetConfig
from translora.distill.memory import BaseWeights, weights_of
from translora.engine.fake import attention_shape, num_layers
from translora.engine.loading import plain_class
from translora.errors import InputError
from translora.lora.targets import resolve_targets
from translora.run.redact import first_line


@dataclass(frozen=True, eq=False)
class Shape:
    """What the planner knows of a base."""

    name: str
    config: PreTrainedConfig
    """Of its decoder, where it has parts beside it."""
    dtype: torch.dtype
    """Of its weights in the run."""
    weights: BaseWeights
    num_active: int
    """Weights that a token meets: fewer in a mixture of experts."""
    linears: dict[str, tuple[int, int]]
    """(out, in) of every linear module but the head, by name."""

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return self.weights.total * self.dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token, in all layers; what sliding windows save is not counted."""
        text = self.config.get_text_config()
        if self.is_latent:
            return num_layers(self.config) * (text.kv_lora_rank + text.qk_rope_head_dim) * self.dtype.itemsize
        _, groups, head_dim = attention_shape(text)
        return 2 * num_layers(self.config) * groups * head_dim * self.dtype.itemsize

    @property
    def is_latent(self) -> bool:
        """Whether a token's keys and values are kept as what they are made from (DeepSeek, arXiv 2405.04434)."""
        return bool(getattr(self.config.get_text_config(), "kv_lora_rank", None))

    def adapted(self, target_modules: Sequence[str] | str) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear modules that the targets name.

        Raises:
            InputError: a name is none of this base's.
        """
        names = resolve_targets(self.linears, target_modules, self.name, "distill.lora.target_modules")
        return {name: self.linears[name] for name in names}


@dataclass(frozen=True)
class Shapes:
    """The bases of a fleet."""

    source: Shape
    target: Shape
    generator: Shape
    trained: Shape
    """The target in the dtype of the distillation."""


def read_shapes(config: FleetConfig) -> Shapes:
    """Read each base once, for GPUs that multiply bfloat16.

    Raises:
        InputError: see `read_shape`.
    """
    source, target = (read_shape(base, torch.bfloat16) for base in (config.source, config.target))
    generator = target if config.generator == config.target else read_shape(config.generator, torch.bfloat16)
    dtype = torch.bfloat16 if config.distill.dtype == "auto" else getattr(torch, config.distill.dtype)
    return Shapes(source, target, generator, dataclasses.replace(target, dtype=dtype))


def read_shape(base: BaseModelConfig, dtype: torch.dtype) -> Shape:
    """Read a base's config and build it without weights.

    Args:
        base: a directory that need hold nothing but config.json, or a hub id.
        dtype: of its weights in the run, where the config leaves it to the device.

    Raises:
        InputError: there is no such config, or transformers makes no causal language model of it.
    """
    path = os.path.expanduser(base.model)
    if os.path.isdir(path) and not (Path(path) / "config.json").is_file():
        raise InputError(f"{path}: has no config.json; give a model directory, or a hub id")
    try:
        model = meta_model(Path(path) if os.path.isdir(path) else base.model, base.trust_remote_code, base.revision)
    except Exception as error:  # a fault boundary: hub clients and model classes raise what they like
        raise InputError(
            f"{base.model}: no base can be planned with ({first_line(error)}); give a directory with config.json of an "
            "architecture that this version of transformers has, or a hub id that this machine can reach"
        ) from error
    config, text = model.config, model.config.get_text_config()
    refuse_quantised(config.to_dict(), base.model, "plan with the base as it was before")
    if config.is_encoder_decoder:
        raise InputError(f"{base.model}: has an encoder; plans are made for decoder-only bases alone")
    if getattr(text, "num_attention_heads", None) is None:
        raise InputError(
            f"{base.model}: no attention heads in its config.json; a run refuses such a base, take another"
        )
    counts = weights_of(model)
    weights = {name: parameter.numel() for name, parameter in model.named_parameters()}
    num_experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    used = getattr(text, "num_experts_per_tok", None) or num_experts
    experts = sum(count for name, count in weights.items() if ".experts." in name) if num_experts > 1 else 0
    return Shape(
        name=name_of_path(path),
        config=config if plain_class(config) else text,
        dtype=dtype if base.dtype == "auto" else getattr(torch, base.dtype),
        weights=counts,
        num_active=counts.total - experts + math.ceil(experts * used / num_experts),
        linears=adaptable(model),
    )
