"""The modules of a base model, of its config.json alone: what a LoRA may adapt, and the output head."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from translora.bundle.base import COPY_AGAIN, BaseInfo, refuse_config


def linear_modules(base: BaseInfo) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear modules that a LoRA may adapt, by name: all but the output head.

    Built once a process and base, without weights. Not under ZeRO-3, which would partition the empty model.

    Raises:
        InputError: transformers cannot build the model; names config.json and the remedy.
    """
    return dict(_linears_and_head(base.path, base.fingerprint, base.trust_remote_code)[0])


def output_head(base: BaseInfo) -> str | None:
    """Name of the linear module that gives the logits (`lm_head`), or None; as costly as `linear_modules`."""
    return _linears_and_head(base.path, base.fingerprint, base.trust_remote_code)[1]


@functools.lru_cache(maxsize=16)
def _linears_and_head(
    path: Path, fingerprint: str, trust_remote_code: bool
) -> tuple[dict[str, tuple[int, int]], str | None]:
    """(out, in) of every linear module but the output head, and that one's name where it is linear.

    A fault boundary: what a model class raises for an odd config is its own affair.
    """
    try:
        model = meta_model(path, trust_remote_code)
    except Exception as error:
        remedy = f"{COPY_AGAIN}, or use a base whose architecture this version of transformers has"
        fault = "transformers makes no causal language model of it"
        refuse_config(path, trust_remote_code, error, fault, remedy)
    head = model.get_output_embeddings()
    return adaptable(model), next((name for name, module in linears(model).items() if module is head), None)


def adaptable(model: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear modules that a LoRA may adapt, by name: all but the output head."""
    head = model.get_output_embeddings()
    own = {name: module for name, module in linears(model).items() if module is not head}
    return {name: (module.out_features, module.in_features) for name, module in own.items()}


def linears(model: Any) -> dict[str, Any]:
    """Every nn.Linear of a model, by name."""
    import torch

    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def meta_model(base: str | Path, trust_remote_code: bool, revision: str | None = None) -> Any:
    """The language model of a directory with a config.json, or of a hub id, on the meta device: no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, revision=revision)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)
