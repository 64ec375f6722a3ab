"""A process that keeps bases resident from one call to the next: the actor behind `translora.synthesis.actors`."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch

from translora.bundle.base import inspect_base
from translora.config import BaseModelConfig
from translora.engine.loading import device, hide_gpus, resolve_dtype
from translora.engine.transformers import TransformersEngine

logger = logging.getLogger(__name__)
Row = dict[str, Any]
BlockFunction = Callable[[TransformersEngine, list[Row], dict[str, Any]], list[Row]]
"""Turns one block of rows into as many rows, on a resident engine, with plain settings."""


class EngineHost:
    """Holds engines, as many as fit; a round's second base does not push out the first unless it must.

    Args:
        num_threads: torch's CPU threads of a host without a GPU; None for a host with one.
        num_hosts: hosts that share this machine's memory.
    """

    def __init__(self, num_threads: int | None, num_hosts: int) -> None:
        if num_threads is not None:
            hide_gpus()
        self.num_threads, self.num_hosts = num_threads, num_hosts
        self.engines: dict[str, TransformersEngine] = {}

    def ready(self) -> None:
        """Return as soon as the process stands."""

    def run(
        self,
        base: dict[str, Any],
        adapters: Mapping[str, str],
        function: BlockFunction,
        rows: list[Row],
        settings: dict[str, Any],
    ) -> list[Row]:
        """Compute one block on a base with these adapters in its bank; loads what is not there yet."""
        engine = self._engine(BaseModelConfig.model_validate(base))
        engine.use_adapters(adapters)
        return function(engine, rows, settings)

    def _engine(self, base: BaseModelConfig) -> TransformersEngine:
        key = json.dumps(base.model_dump(), sort_keys=True)
        if key not in self.engines:
            if self.engines and base_bytes(base) > 0.5 * self._free_bytes():
                self.engines.clear()
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            self.engines[key] = TransformersEngine(base, {}, self.num_threads)
        return self.engines[key]

    def _free_bytes(self) -> int:
        """Memory for another base and its batches."""
        if device().type == "cuda":
            return int(torch.cuda.mem_get_info()[0])
        return int(psutil.virtual_memory().available) // self.num_hosts


def base_bytes(base: BaseModelConfig) -> int:
    """Bytes of a base's weights as it is loaded, from the headers of its files."""
    num_weights = sum(math.prod(shape) for shape in inspect_base(base.model).shapes.values())
    return num_weights * resolve_dtype(base.dtype).itemsize
