"""What a computation would hold in memory: it is run on fake tensors, which have shapes and no data.

It is the code of the run that is run, so nothing has to be known of layers, heads or experts, and a base of any size
takes about a second: a few of its layers are enough, since the rest is like them.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from translora.engine.loading import plain_class
from translora.errors import InputError

FLASH_SHAPED = "translora_scoreless"
FEW_LAYERS = (2, 4)
"""Depths that stand for a whole base: its first layers may be of one kind, and every second of another."""
ALIKE = (1, 2)
"""Those where all layers are alike."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations made and somebody still holds: storages, so that a view costs nothing.

    Args:
        before: not to be counted, whatever views are made of these.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def begin_peak(self) -> None:
        """Forget the greatest sum so far."""
        self.peak = self.live

    def _gone(self, num_bytes: int) -> None:
        self.live -= num_bytes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


def num_layers(config: PreTrainedConfig) -> int:
    """Layers of a decoder."""
    return int(config.get_text_config().num_hidden_layers)


def attention_shape(text: Any) -> tuple[int, int, int]:
    """Heads, groups of them that share keys and values, and the size of a head, from a decoder's config."""
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    return heads, groups, getattr(text, "head_dim", None) or text.hidden_size // heads


def inner_size(text: Any) -> int:
    """Width of the MLP, from a decoder's config."""
    return int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)


def with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The config of the same base with its first layers only."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    for name, value in _by_layer(config).items():
        setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return shallow


def _by_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The settings of a decoder that have a value for each layer: layer_types and the like."""
    settings = vars(config.get_text_config())
    return {name: own for name, own in settings.items() if isinstance(own, list) and len(own) == num_layers(config)}


def depths_to_run(config: PreTrainedConfig) -> tuple[int, int]:
    """Two depths whose difference is what a layer adds: ALIKE or FEW_LAYERS.

    Raises:
        InputError: see `fake_base`.
    """
    if any(value != own[0] for own in _by_layer(config).values() for value in own):
        return FEW_LAYERS
    with fake_base(with_layers(config, FEW_LAYERS[1]), torch.float32, FLASH_SHAPED) as model:
        forms = [[(name, value.shape) for name, value in layer.named_parameters()] for layer in decoder_layers(model)]
    return ALIKE if all(form == forms[0] for form in forms) else FEW_LAYERS


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The layers of a model: the longest list in it."""
    return max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)


@contextlib.contextmanager
def fake_base(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> Iterator[PreTrainedModel]:
    """A base of fake tensors on the CPU, in eval mode; what is computed inside the context is fake too.

    Raises:
        InputError: it is no plain decoder, see `plain_class`.
    """
    kind = plain_class(config)
    if kind is None:
        raise InputError(f"{config.model_type}: not a decoder that transformers builds from one config")
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        try:
            model: PreTrainedModel = kind(config)
        finally:
            torch.set_default_dtype(before)
        yield model.eval()


class _FlashShaped(torch.autograd.Function):
    """flash-attention's shapes: it keeps its inputs, its output and one float32 a head and token, and no scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def flash_shaped(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
) -> tuple[torch.Tensor, None]:
    """For fake tensors: query [1, H, T, D], key and value [1, G, T, D]; returns [1, T, H, D] with nothing in it."""
    return _FlashShaped.apply(*(x.transpose(1, 2) for x in (query, key, value))), None


AttentionInterface.register(FLASH_SHAPED, flash_shaped)
