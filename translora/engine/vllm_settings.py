"""vLLM's engine arguments: what a base's `vllm` may hold, and what is chosen where it says nothing.

Importing this module does not load vLLM.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from translora.bundle.adapter import is_in_bank
from translora.bundle.base import info_of, refuse_quantised
from translora.config import BaseModelConfig
from translora.engine.loading import num_gpus, resolve_dtype
from translora.errors import InputError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM has for `max_lora_rank`."""
MAX_LORAS, MAX_CPU_LORAS = 16, 128
"""Adapters that share a pass, and that are kept in the machine's memory, unless `vllm` says otherwise."""
OWN = ("model", "tokenizer", "trust_remote_code", "dtype", "enable_lora", "max_lora_rank", "lora_target_modules")
"""Engine arguments that are set here."""


def check_plain(adapter: Path, base: BaseModelConfig) -> None:
    """Whether the source base's engine computes adapters of this kind.

    Raises:
        InputError: it does not.
    """
    if base.vllm is not None and not is_in_bank(adapter):
        raise InputError(f"{adapter}: is no plain LoRA, and vLLM computes no others; leave source.vllm out")


def check_rank(rank: int, base: BaseModelConfig, where: str) -> None:
    """Whether a base's engine takes LoRAs of this rank.

    Raises:
        InputError: it is vLLM, which does not.
    """
    if base.vllm is not None and rank > RANKS[-1]:
        raise InputError(f"{where}: rank {rank}, the limit of vLLM is {RANKS[-1]}; leave `vllm` of {base.model} out")


def check_engine(base: BaseModelConfig) -> None:
    """Whether a base can be computed with: this Python has vLLM, and vLLM the engine arguments, where it asks for it.

    Raises:
        InputError: it has not, or the base is one for vLLM alone.
    """
    if base.vllm is None:
        info = info_of(base)
        refuse_quantised(info.config, base.model, "give the base as it was before, or have vLLM compute with it (vllm)")
        return
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            f"{base.model}: asks for vllm, which is not installed; pip install '.[vllm]' in translora's checkout, or "
            "leave `vllm` out"
        )
    from vllm.engine.arg_utils import EngineArgs

    if taken := sorted(base.vllm.keys() & set(OWN)):
        raise InputError(f"{base.model}: vllm.{taken[0]}: is set by translora; leave it out")
    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in base.vllm.keys() - set(known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see vLLM's engine arguments"
        raise InputError(f"{base.model}: vllm.{name}: vLLM has no such engine argument; {hint}")


def engine_arguments(base: BaseModelConfig, max_rank: int, modules: Collection[str]) -> dict[str, Any]:
    """vLLM's EngineArgs for a base; what the user sets in `vllm` comes before what is chosen here.

    The modules are named so that the head is none of them: vLLM (0.32) looks up an adapter for each place of a head
    that it adapts, and has none for the places of a prompt, whose probabilities then are wrong or cannot be computed.
    """
    dtype = resolve_dtype(base.dtype)
    arguments: dict[str, Any] = {
        "model": str(info_of(base).path),
        "trust_remote_code": base.trust_remote_code,
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel_size": max(1, num_gpus() // (base.vllm or {}).get("pipeline_parallel_size", 1)),
        "distributed_executor_backend": "mp",  # the GPUs' memory is free again when the workers have ended
        "max_logprobs": 1024,
        "disable_log_stats": True,
    }
    if max_rank:
        if dtype == torch.float32 and num_gpus():
            raise InputError(f"{base.model}: vLLM has no LoRAs in float32 on a GPU; set dtype to bfloat16")
        arguments |= {"enable_lora": True, "max_lora_rank": max_rank, "lora_target_modules": sorted(modules)}
        arguments |= {"max_loras": MAX_LORAS, "max_cpu_loras": MAX_CPU_LORAS}
    arguments |= base.vllm or {}
    if dtype != torch.float32:  # see TransformersEngine.log_odds
        arguments["hf_overrides"] = {"head_dtype": "float32", **arguments.get("hf_overrides", {})}
    if "max_loras" in arguments:
        arguments["max_cpu_loras"] = max(arguments["max_loras"], arguments.get("max_cpu_loras", 0))
    return arguments
