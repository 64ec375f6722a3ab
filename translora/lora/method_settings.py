"""The settings of PEFT's methods, as users and adapters have them: what is refused, and what is never followed."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PromptTuningInit, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedTokenizerBase

from translora.errors import InputError
from translora.lora.kinds import MAX_RANK, VIRTUAL_TOKENS, check_kind
from translora.lora.peft_io import (
    MAX_PATTERNS,
    check_init,
    check_names,
    check_numbers,
    check_pattern,
    refuse_options,
)

logger = logging.getLogger(__name__)
MAX_SIZE = 1 << 16
"""Of a number in a config, which may become a tensor's size."""
SIZES_OF_THE_BASE = ("token_dim", "num_layers", "num_attention_heads")
LIMITS = {"num_virtual_tokens": 4096, "r": MAX_RANK, "rank_pattern": MAX_RANK}
PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
"""Settings that are regular expressions where they are strings."""
OF_THE_PLACE = (
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "megatron_core",
    "runtime_config",
)
"""Settings that name something outside the adapter; they are never followed."""


def parse_method(settings: Mapping[str, Any], where: str, base_path: Path | str = "") -> PeftConfig:
    """PEFT's config for settings that a user wrote.

    Args:
        settings: `peft_type`, and what the method's config class of PEFT takes.
        where: what they are called in an error.
        base_path: directory of the base, whose tokenizer reads the text that prompt tuning begins with.

    Raises:
        InputError: no such method or setting, or one that cannot be used here; names it and the remedy.
    """
    kind = check_kind(settings.get("peft_type"), f"{where}.")
    known = inspect.signature(PEFT_TYPE_TO_CONFIG_MAPPING[kind].__init__).parameters
    if strange := sorted(settings.keys() - known.keys()):
        raise InputError(f"{where}.{strange[0]}: PEFT's {kind} has no such setting; see its config in PEFT's reference")
    if outside := sorted(settings.keys() & {*OF_THE_PLACE, *SIZES_OF_THE_BASE, "inference_mode"}):
        raise InputError(f"{where}.{outside[0]}: is set by translora; leave it out")
    for name, value in settings.items():
        if name.endswith("dropout") and value:
            raise InputError(f"{where}.{name}: {value}; students are trained without dropout, leave it out")
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(f"{where}.task_type: {settings['task_type']!r}; what is trained writes answers, leave it out")
    if kind == "LORA":
        lora = f"{where.rpartition('.')[0]}.lora"
        check_init(settings.get("init_lora_weights"), where, f"leave it out, or use {lora} with init: eva")
        check_numbers({"r": 8, "lora_alpha": 8, **settings}, where, "correct it")
        if str(settings.get("init_lora_weights")).lower() == "eva":
            raise InputError(f"{where}.init_lora_weights: PEFT needs the data for eva; use {lora}.init: eva instead")
    check_settings({**settings, "peft_type": kind}, where)
    if (init := settings.get("prompt_tuning_init")) is not None:
        settings = {**settings, "prompt_tuning_init": str(init).upper()}  # PEFT takes others for RANDOM, unsaid
        if settings["prompt_tuning_init"] not in (choices := [one.value for one in PromptTuningInit]):
            raise InputError(f"{where}.prompt_tuning_init: {init!r}; expected {', '.join(choices)}")
    if not isinstance(text := settings.get("prompt_tuning_init_text"), str | None):
        raise InputError(f"{where}.prompt_tuning_init_text: {text!r} is no text; put it in quotation marks")
    if settings.get("prompt_tuning_init_text") and settings.get("prompt_tuning_init") != "TEXT":
        raise InputError(f"{where}.prompt_tuning_init_text: is read for prompt_tuning_init: TEXT alone; set that too")
    own = {"tokenizer_name_or_path": str(base_path)} if "tokenizer_name_or_path" in known else {}
    try:
        return get_peft_config({**settings, **own, "peft_type": kind, "task_type": "CAUSAL_LM"})
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: PEFT refuses it ({error})") from error


def check_text(config: PeftConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Warn where the virtual tokens have no room for the text that they begin with.

    Raises:
        InputError: the text has no token.
    """
    text, count = getattr(config, "prompt_tuning_init_text", None), getattr(config, "num_virtual_tokens", None)
    if text is None or not count:
        return
    if (length := len(tokenizer(text)["input_ids"])) == 0:
        raise InputError(f"{where}.prompt_tuning_init_text: {text!r} has no token; give a text, or leave it out")
    if length > count:
        logger.warning("%s: prompt_tuning_init_text has %d tokens, its first %d are taken", where, length, count)


def check_settings(settings: Mapping[str, Any], where: str | Path) -> str:
    """Refuse what changes the base's own weights, runs or fetches something, or takes time or memory without bound.

    Returns:
        The method's `peft_type`.

    Raises:
        InputError: names the setting and the remedy.
    """
    kind = check_kind(settings.get("peft_type"), f"{where}: ")
    refuse_options(settings, where, through_peft=True)
    if kind == "LORA":
        check_init(settings.get("init_lora_weights"), where)
    count = settings.get("num_virtual_tokens")
    if kind in VIRTUAL_TOKENS and (not isinstance(count, int) or count < 1):
        raise InputError(f"{where}: num_virtual_tokens is {count!r}, expected a positive number")
    if settings.get("num_transformer_submodules") not in (None, 1):
        raise InputError(
            f"{where}: num_transformer_submodules is for the virtual tokens of encoder-decoders, which are not "
            "supported; leave it out, or take an adapter that changes layers"
        )
    num_patterns = 0
    for name, value in settings.items():
        if name in OF_THE_PLACE:
            continue
        if isinstance(value, dict) and not name.endswith("_pattern") and value:
            # Some name files that PEFT unpickles, or modules that it imports (megatron_core).
            raise InputError(f"{where}: {name} is set, which is not supported; train the adapter without it")
        if isinstance(value, list | dict):
            check_names(value, f"{where}: {name}")
        limit = LIMITS.get(name, MAX_SIZE)
        numbers = value.values() if isinstance(value, dict) else [value]
        is_size = not name.endswith(("seed", "key"))
        if is_size and any(isinstance(number, (int, float)) and not number <= limit for number in numbers):
            raise InputError(f"{where}: {name} is {value}, the limit is {limit}; use a smaller one")
        num_patterns += sum(check_pattern(str(pattern), name, where) for pattern in patterns_of(name, value))
    if num_patterns > MAX_PATTERNS:
        raise InputError(f"{where}: {num_patterns} patterns, the limit is {MAX_PATTERNS}; use plain module names")
    return kind


def patterns_of(name: str, value: Any) -> list[str]:
    """What PEFT takes for regular expressions in a setting."""
    found = []
    if isinstance(value, dict) or (name == "layers_pattern" and isinstance(value, list)):
        found = list(value)
    elif name in PATTERNS and isinstance(value, str):
        found = [value]
    return found
