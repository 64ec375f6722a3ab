"""A process that keeps bases resident from one call to the next: the actor behind `translora.actors.hosts`."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch

from translora.actors.calls import FAULT, SLOT_KEYS, Computed, Row
from translora.bundle.base import info_of
from translora.config import BaseModelConfig
from translora.engine.encoder_decoder import EncoderDecoderEngine
from translora.engine.loading import device, hide_gpus, num_gpus, resolve_dtype
from translora.engine.memory import (
    BANK_SHARE,
    VLLM_SHARE,
    bank_numbers_of,
    is_out_of_memory,
    release_memory,
)
from translora.engine.protocol import Engine, EngineDied, RowTooLong
from translora.engine.transformers import TransformersEngine
from translora.engine.vllm import VllmEngine
from translora.run.redact import first_line
from translora.run.watchdog import Watchdog

logger = logging.getLogger(__name__)
CLOSE_SECONDS = 30.0
BlockFunction = Callable[[Engine, list[Row], dict[str, Any]], list[Row]]
"""Turns one block of rows into as many rows, on a resident engine, with plain settings."""


class EngineHost:
    """Holds engines, as many as fit; a round's second base does not push out the first unless it must.

    Args:
        num_threads: torch's CPU threads of a host without a GPU; None for a host with one.
        num_hosts: hosts that share this machine's memory.
        limit_seconds: a block that takes longer, loading included, ends the process.
    """

    def __init__(self, num_threads: int | None, num_hosts: int, limit_seconds: float | None = None) -> None:
        if num_threads is not None:
            hide_gpus()
        self.watchdog = Watchdog(limit_seconds)
        self.damaged: dict[str, str] = {}
        self.num_threads, self.num_hosts = num_threads, num_hosts
        self.engines: dict[str, Engine] = {}

    def ready(self) -> None:
        """Return as soon as the process stands."""

    def run(
        self,
        base: dict[str, Any],
        adapters: Mapping[str, str],
        function: bytes,
        rows: list[Row],
        settings: dict[str, Any],
    ) -> Computed:
        """Compute one block on a base with these adapters in its bank; loads what is not there yet.

        Rows that cannot be computed for want of memory, or because their adapter is damaged, come back with a fault.

        Args:
            function: a BlockFunction, pickled.
        """
        self.watchdog.alive()
        try:
            start, config = time.monotonic(), BaseModelConfig.model_validate(base)
            engine = self._engine(config)
            damaged = self._use_adapters(engine, self._needed(config, adapters, rows))
            engine.load()
            loaded = time.monotonic()
            computed = compute_rows(engine, pickle.loads(function), rows, settings, damaged)
            seconds = {"model": round(time.monotonic() - loaded, 4), "load": round(loaded - start, 4)}
            return computed, seconds
        except EngineDied:
            logger.exception("this actor ends, and begins again")
            self.close()
            os._exit(1)
        finally:
            self.watchdog.stop()

    def close(self) -> None:
        """Give up the engines, with the processes that they have."""
        self.watchdog.alive()
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()
        for child in (children := psutil.Process().children(recursive=True)):  # one may hang, and hold a GPU's memory
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=CLOSE_SECONDS)
        self.watchdog.stop()

    def _needed(self, base: BaseModelConfig, adapters: Mapping[str, str], rows: Sequence[Row]) -> Mapping[str, str]:
        """All adapters, or where a bank of all is too much for this machine those that the rows name."""
        numbers = bank_numbers_of(tuple(adapters.values()))
        if numbers * resolve_dtype(base.dtype).itemsize <= BANK_SHARE * self._all_bytes():
            return adapters
        named = {row.get(key) for row in rows for key in SLOT_KEYS}
        return {slot: path for slot, path in adapters.items() if slot in named}

    def _all_bytes(self) -> int:
        """Of this host's machine, whatever is in use: what is decided by it must not change from run to run."""
        if device().type == "cuda":
            return sum(int(torch.cuda.mem_get_info(index)[1]) for index in range(num_gpus()))
        return int(psutil.virtual_memory().total) // self.num_hosts

    def _use_adapters(self, engine: Engine, adapters: Mapping[str, str]) -> dict[str, str]:
        """Have the adapters in the bank, but for those that cannot be read: slot -> reason."""
        usable = {slot: path for slot, path in adapters.items() if path not in self.damaged}
        try:
            engine.use_adapters(usable)
        except (ValueError, OSError):
            for path in usable.values():
                try:
                    engine.check_adapter(path)
                except (ValueError, OSError) as error:
                    self.damaged[path] = f"cannot be used, though it was verified: {error}"
            engine.use_adapters({slot: path for slot, path in usable.items() if path not in self.damaged})
        return {slot: self.damaged[path] for slot, path in adapters.items() if path in self.damaged}

    def _engine(self, base: BaseModelConfig) -> Engine:
        key = json.dumps(base.model_dump(), sort_keys=True)
        if key not in self.engines:
            if self.engines and self._bytes(base) > self._free_bytes():
                for engine in self.engines.values():
                    engine.close()
                self.engines.clear()
                release_memory()
            if base.vllm is not None:
                self.engines[key] = VllmEngine(base, self.num_threads)
            elif info_of(base).is_encoder_decoder:
                self.engines[key] = EncoderDecoderEngine(base, {}, self.num_threads)
            else:
                self.engines[key] = TransformersEngine(base, {}, self.num_threads)
        return self.engines[key]

    def _bytes(self, base: BaseModelConfig) -> float:
        """What a base and its batches may take: vLLM its share of the GPUs, transformers twice the weights."""
        if base.vllm is not None and device().type == "cuda":
            return float(base.vllm.get("gpu_memory_utilization", VLLM_SHARE)) * self._all_bytes()
        return 2 * base_bytes(base)

    def _free_bytes(self) -> int:
        """Memory for another base and its batches, with what an allocator holds of earlier ones given back."""
        release_memory()
        if device().type == "cuda":
            return sum(int(torch.cuda.mem_get_info(index)[0]) for index in range(num_gpus()))
        return int(psutil.virtual_memory().available) // self.num_hosts


def compute_rows(
    engine: Engine,
    function: BlockFunction,
    rows: list[Row],
    settings: dict[str, Any],
    damaged: Mapping[str, str],
) -> list[Row]:
    """The rows computed, in halves where the whole is too much for the memory; a row of a damaged slot has its fault.

    Args:
        damaged: reason by slot.
    """
    faults = [next((damaged[row[key]] for key in SLOT_KEYS if row.get(key) in damaged), None) for row in rows]
    whole = [row for row, fault in zip(rows, faults, strict=True) if fault is None]
    computed = iter(_in_halves(engine, function, whole, settings) if whole else [])
    return [next(computed) if fault is None else {**row, FAULT: fault} for row, fault in zip(rows, faults, strict=True)]


def _in_halves(engine: Engine, function: BlockFunction, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    try:
        return function(engine, rows, settings)
    except EngineDied:
        raise
    except Exception as error:
        if not isinstance(error, RowTooLong) and not is_out_of_memory(error):
            raise
        alone = "" if isinstance(error, RowTooLong) else "out of memory with one row in the batch: "
        reason = first_line(error, 300)
    release_memory()
    if len(rows) == 1:
        return [{**rows[0], FAULT: alone + reason}]
    logger.warning("a batch of %d rows (%s): trying its halves", len(rows), reason)
    middle = len(rows) // 2
    return [row for part in (rows[:middle], rows[middle:]) for row in _in_halves(engine, function, part, settings)]


def base_bytes(base: BaseModelConfig) -> int:
    """Bytes of a base's weights as it is loaded, from the headers of its files."""
    num_weights = sum(math.prod(shape) for shape in info_of(base).shapes.values())
    return num_weights * resolve_dtype(base.dtype).itemsize
