"""Adapters that the bank does not have (DoRA, prompt tuning, IA3, ...): PEFT itself puts them on a base, one at a time.

A method is named by PEFT's own settings: `peft_type` and what its config class takes. Methods that put tokens or keys
and values before the input are virtual tokens here, all others are layers in the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import set_peft_model_state_dict
from transformers import DynamicCache, PreTrainedModel

from translora.bundle.adapter import CONFIG, WEIGHTS, is_in_bank, read_adapter_config
from translora.bundle.base import BaseInfo
from translora.bundle.modules import meta_model, output_head
from translora.errors import InputError
from translora.lora.method_settings import OF_THE_PLACE, SIZES_OF_THE_BASE, check_settings
from translora.lora.peft_io import LoraWeights, read_lora, read_tensors
from translora.run.redact import first_line


def method_config(directory: str | Path) -> PeftConfig:
    """PEFT's config of an adapter on disk, for inference.

    A fault boundary, as `expected_shapes`: what PEFT raises for an odd config is its own affair.

    Raises:
        InputError: it cannot be read, or not be used here; names the file and the remedy.
    """
    path, settings = Path(directory) / CONFIG, read_adapter_config(Path(directory))
    kind = check_settings(settings, path)
    known = inspect.signature(PEFT_TYPE_TO_CONFIG_MAPPING[kind].__init__).parameters
    kept = {name: value for name, value in settings.items() if name in known and name not in OF_THE_PLACE}
    # Where the training began; the weights are read.
    kept |= {"prompt_tuning_init": "RANDOM"} if "prompt_tuning_init" in kept else {}
    kept |= {"init_lora_weights": True} if "init_lora_weights" in kept else {}
    # PEFT takes them from the base, whatever the file says.
    kept |= {name: None for name in SIZES_OF_THE_BASE if name in kept}
    try:
        return get_peft_config({**kept, "peft_type": kind, "inference_mode": True})
    except Exception as error:
        raise InputError(
            f"{path}: PEFT refuses it ({first_line(error)}); save the adapter with PEFT's save_pretrained"
        ) from error


Method = tuple[PeftConfig, dict[str, torch.Tensor]]
"""An adapter in memory: its config, and the tensors on the CPU by the names in its file."""


def read_method(directory: str | Path) -> Method:
    """Read an adapter.

    Raises:
        InputError: one of them cannot be read, or not be used here; names the file and the remedy.
    """
    return method_config(directory), read_tensors(Path(directory) / WEIGHTS)


def read_adapter(directory: str | Path) -> LoraWeights | Method:
    """Read an adapter for the bank, or one that PEFT puts on the base.

    Raises:
        InputError: as read_lora and read_method.
    """
    return read_lora(directory) if is_in_bank(Path(directory)) else read_method(directory)


def put_on(model: PreTrainedModel, config: PeftConfig, *, empty: bool = False) -> PeftModel:
    """Put a new adapter on a model, which is changed in place; `take_off` undoes it.

    Args:
        empty: do not make its first weights, which others will replace.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on names that were left out on purpose
        return get_peft_model(model, config, low_cpu_mem_usage=empty and not config.is_prompt_learning)


def take_off(peft_model: PeftModel) -> None:
    """Give the model its own modules back."""
    if not peft_model.active_peft_config.is_prompt_learning:
        peft_model.unload()


@dataclasses.dataclass(frozen=True)
class VirtualTokens:
    """What an adapter puts before every input."""

    peft_model: PeftModel

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.peft_model.active_peft_config.num_virtual_tokens)

    def cache(self) -> DynamicCache:
        """Their keys and values, one row; a new cache at every call."""
        prompt = self.peft_model.get_prompt(1)
        if isinstance(prompt, DynamicCache):
            return prompt
        base = self.peft_model.get_base_model()
        cache = DynamicCache(config=base.config)
        embedded = prompt.to(dtype=base.dtype, device=base.device)
        base.base_model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
        return cache


@contextlib.contextmanager
def applied(model: PreTrainedModel, method: Method) -> Iterator[VirtualTokens | None]:
    """Have an adapter on a model for as long as the context lasts; gives its virtual tokens, if it has any."""
    config, tensors = method
    peft_model = put_on(model, config, empty=True)
    try:
        tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        set_peft_model_state_dict(peft_model, tensors, low_cpu_mem_usage=not config.is_prompt_learning)
        peft_model.eval()
        with torch.no_grad():
            yield VirtualTokens(peft_model) if config.is_prompt_learning else None
    finally:
        take_off(peft_model)


def saved_tensors(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names that PEFT saves them by."""
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return found


def expected_shapes(base: BaseInfo, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that an adapter of this method has on a base; nothing is allocated.

    Raises:
        InputError: the method cannot be put on the base, or would adapt its output head.
    """
    model = meta_model(base.path, base.trust_remote_code)
    if config.is_prompt_learning:
        config = dataclasses.replace(config, inference_mode=True)
    try:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(put_on(model, config)).items()}
    except Exception as error:
        raise InputError(f"PEFT cannot put it on {base.name!r} ({first_line(error)})") from error
    head = output_head(base)
    if head is not None and any(f".{head}." in name for name in shapes):
        raise InputError(f"it adapts {head}, the output head of {base.name!r}, which is not supported; leave it out")
    return shapes
