"""A whole base in one process, for the parts of the gang that have nothing to do with partitioning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from translora.bundle import inspect_base
from translora.config import BaseModelConfig
from translora.engine.attention import PACKED
from translora.engine.head import Head
from translora.engine.loading import load_model, load_tokenizer
from translora.lora.bank import new_bank


class WholeBase:
    """What the gang needs of a base (translora.distill.slots.ResidentBase), without DeepSpeed."""

    def __init__(self, path: Path, dtype: torch.dtype, target_modules: Sequence[str] | str) -> None:
        self.dtype = dtype
        self.place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(BaseModelConfig(model=str(path)), dtype, self.place)
        self.attention = self.model.config._attn_implementation
        self.model.set_attn_implementation(PACKED)
        self.bank = new_bank(self.model, target_modules)
        self.head, self.tokenizer = Head.of(self.model), load_tokenizer(BaseModelConfig(model=str(path)))
        self.identity = inspect_base(str(path)).identity

    def __call__(self, inputs: dict[str, object]) -> torch.Tensor:
        """Last hidden states [T, D]."""
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state[0]

    def backward(self, loss: torch.Tensor) -> None:
        """Plain backward."""
        loss.backward()

    def readable(self) -> contextlib.AbstractContextManager[None]:
        """All weights are here."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def gathered_head(self) -> Iterator[Head]:
        """The head, which is whole already."""
        yield self.head
