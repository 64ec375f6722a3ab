"""Loading of bases and tokenizers: device, dtype and attention are decided here and nowhere else."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from translora.bundle.base import (
    UnusableBaseError,
    info_of,
    refuse_code,
    refuse_config,
    refuse_encoder_decoder,
    refuse_quantised,
)
from translora.bundle.hub import locate
from translora.config import BaseModelConfig
from translora.config_file import Attention, DType
from translora.errors import InputError
from translora.run.redact import first_line

logger = logging.getLogger(__name__)
FIXED_DATE = "26 Jul 2024"
TOKENIZER_CONFIG = "tokenizer_config.json"
_PROBE = "Hello, world 1 \u2603\n"


def device() -> torch.device:
    """The CUDA device of this process, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def num_gpus() -> int:
    """GPUs of this process; 0 on the CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def hide_gpus() -> None:
    """Keep this process on the CPU, before it first asks for a device: Ray leaves GPUs visible to all."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def gains_by_bfloat16(on_gpu: bool | None = None) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than those of float32: this process's own, if none is named.

    A CPU does with AMX, one of AMD's with AVX512-BF16. On Intel's without AMX that has half of float32's throughput:
    one core of a Xeon gave 84 GFLOP/s by oneDNN's kernel for it, 161 in float32 (768 x 640 by 640 x 2048, torch 2.13).
    """
    if on_gpu and not torch.cuda.is_available():
        return True  # GPUs of other machines, as far as can be told from here
    if torch.cuda.is_available() if on_gpu is None else on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    by_vectors = capabilities.get("avx512_bf16") and "Intel" not in str(capabilities.get("cpu_name"))
    return bool(capabilities.get("amx_bf16") or by_vectors)


def resolve_dtype(dtype: DType, on_gpu: bool | None = None) -> torch.dtype:
    """The torch dtype of a setting; `auto` is bfloat16 where the device gains by it, this process's own if unset."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return torch.bfloat16 if gains_by_bfloat16(on_gpu) else torch.float32


def attention_of(settings: BaseModelConfig, dtype: torch.dtype) -> str:
    """The attention implementation of a base.

    Raises:
        InputError: transformers does not know the base, or SDPA is asked for where it would leave out the scores' cap.
    """
    base = info_of(settings)
    try:
        config = AutoConfig.from_pretrained(base.path, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # a fault boundary: what a config class raises is its own affair
        remedy = "use a base whose architecture this version of transformers has, or upgrade transformers"
        refuse_config(base.path, settings.trust_remote_code, error, "transformers cannot read it", remedy)
    kind = plain_class(config) or MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), None)
    capped = caps_attention(base.config)
    if settings.attn_implementation == "sdpa" and capped:
        raise InputError(f"{base.path}: caps its attention scores, which SDPA cannot; set attn_implementation to auto")
    return resolve_attention(settings.attn_implementation, dtype, kind, capped=capped)


def resolve_attention(
    attention: Attention, dtype: torch.dtype, kind: type[PreTrainedModel] | None = None, *, capped: bool = False
) -> str:
    """flash-attention where package, device, dtype and model allow it; elsewhere SDPA, or eager.

    Args:
        kind: the model's class, where transformers has one for it; all others are taken to have everything.
        capped: whether its scores are, which SDPA cannot.
    """
    if attention != "auto":
        return attention
    if dtype != torch.float32 and (flash := next((one for one in flash_attentions() if has(kind, one)), None)):
        return flash
    return "eager" if capped or not getattr(kind, "_supports_sdpa", True) else "sdpa"


def check_attention(settings: BaseModelConfig, dtype: torch.dtype) -> None:
    """Whether this device has the flash-attention that is asked for by name.

    Raises:
        UnusableBaseError: it has not, or not in this dtype.
    """
    asked, here = settings.attn_implementation, flash_attentions()
    if not asked.startswith("flash"):
        return
    if asked not in here:
        raise UnusableBaseError(
            f"{settings.model}: attn_implementation: {asked} is not installed, or not made for this device, which has "
            f"{', '.join(here) or 'none'}; install it, or set attn_implementation to auto"
        )
    if dtype == torch.float32:
        raise UnusableBaseError(f"{settings.model}: {asked} has no float32; set dtype to bfloat16, or leave it to auto")


def has(kind: type[PreTrainedModel] | None, flash: str) -> bool:
    """Whether a model has a flash-attention, by transformers' own account of it."""
    named = getattr(kind, "_compatible_flash_implementations", None)
    return flash in named if named is not None else bool(getattr(kind, "_supports_flash_attn", True))


def flash_attentions() -> list[str]:
    """The flash-attentions that are installed and run on this device, the one that was made for it first.

    Asked of transformers: FlashAttention 2 and 4 are packages of other names with a module of the same name.
    """
    if not torch.cuda.is_available():
        return []
    generation = torch.cuda.get_device_capability()[0]
    return [
        f"flash_attention_{version}"
        for version, generations, is_there in (
            (3, (9,), is_flash_attn_3_available),
            (4, (9, 10), is_flash_attn_4_available),
            (2, (8, 9, 10, 12), is_flash_attn_2_available),
        )
        if generation in generations and is_there()
    ]


def caps_attention(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that attention scores are capped (Gemma 2)."""
    return bool({**config, **(config.get("text_config") or {})}.get("attn_logit_softcapping"))


def load_tokenizer(base: BaseModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, padding on the left, with a padding token; its chat template, if any, renders.

    A fault boundary: the tokenizers library raises bare Exceptions that name no file. transformers runs chat templates
    in Jinja's sandbox.

    Raises:
        InputError: the base is not there, or its tokenizer files are incomplete or damaged; names the directory.
    """
    _, path, _ = locate(base.model, base.trust_remote_code, base.revision)
    return _tokenizer(path, base.trust_remote_code)


@functools.cache
def _tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    # Once in a process: a tokenizer of 262k tokens takes four seconds.
    remedy = "save the tokenizer again with save_pretrained, or download the base again"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer(_PROBE)  # a class that does not fit the vocabulary only fails when it meets an unknown character
        if tokenizer.chat_template:
            message = [{"role": "user", "content": _PROBE}]
            tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        if not trust_remote_code and (path / TOKENIZER_CONFIG).exists():
            refuse_code(path / TOKENIZER_CONFIG, error)
        reason = first_line(error)
        raise InputError(f"{path}: its tokenizer cannot be loaded ({reason}); {remedy}") from error
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = without_clock(tokenizer.chat_template)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has neither a padding nor an end-of-text token; {remedy}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def without_clock(template: str) -> str:
    """A chat template that writes the same date every day, where it asks the clock (Llama 3.1, SmolLM3).

    Else a run over midnight, or one that goes on the next morning, would train, answer and judge with other prompts.
    It is the date that Llama's own template falls back on.
    """
    if "strftime_now" not in template:
        return template
    return f"{{%- macro strftime_now(format) %}}{FIXED_DATE}{{%- endmacro %}}{template}"


def plain_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of a decoder that transformers builds from this config alone, to be called with it.

    None for code of the base's own, and for models with a part beside the decoder: under ZeRO-3 they build that part
    through from_config, which partitions it on its own.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.get_text_config() is not config:
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found if isinstance(found, type) else None


def give_head_plain_strides(model: PreTrainedModel) -> None:
    """A hook on the head that copies its input.

    The last positions of a batch are a strided view, for which torch's matmul (2.13, CPU) copies the head's weight once
    for each row: with a vocabulary of 262k that was 80 % of a generation's time, and 8 GB. Not `contiguous()`: it
    leaves a batch of one row as it is, whose stride of the first dimension is the same.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(
            lambda _, args: (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        )


def load_model(
    config: BaseModelConfig,
    dtype: torch.dtype,
    place: torch.device | None,
    *,
    spread: bool = False,
    encoder_decoder: bool = False,
) -> PreTrainedModel:
    """The frozen base in eval mode.

    Args:
        config: which base.
        dtype: dtype of the weights.
        place: device to move it to; None leaves it where transformers put it (ZeRO-3 partitions it while loading).
        spread: put its layers on all GPUs of this process, which compute one after the other, for a base that one GPU
            cannot hold. Accelerate moves what goes from one to the next.
        encoder_decoder: the base is one; the caller has to know, for it is asked in another way.

    Raises:
        InputError: the attention that is asked for would not be the base's, its weights are quantised, or it is an
            encoder-decoder unasked.
    """
    base = info_of(config)
    refuse_quantised(base.config, config.model)
    if not encoder_decoder:
        refuse_encoder_decoder(base, "this wants")
    check_attention(config, dtype)
    attention = attention_of(config, dtype)
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "use_safetensors": True}
    if spread:
        kwargs["device_map"] = "balanced"
    auto_class = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model = auto_class.from_pretrained(base.path, trust_remote_code=config.trust_remote_code, **kwargs)
    model.requires_grad_(False)
    model.eval()
    give_head_plain_strides(model)
    if place is not None and not spread:
        model.to(place)
    logger.info("%s: %s, attention %s", os.path.basename(config.model), dtype, attention)
    return model
