"""What is checked of the settings against the bases before the first phase."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from translora.bundle import BaseInfo
from translora.bundle.base import ENCODER_DECODERS, info_of, refuse_encoder_decoder, refuse_quantised
from translora.bundle.modules import linear_modules
from translora.config import BaseModelConfig, FleetConfig, SamplingConfig, TrainConfig
from translora.distill.data import num_too_long
from translora.distill.ds_config import check_partitions, read_ds_config
from translora.distill.teacher import check_vocabularies
from translora.engine.loading import attention_of, check_attention, load_tokenizer, num_gpus, resolve_dtype
from translora.engine.prompts import PromptFormat, prompt_format
from translora.engine.protocol import warn_of_answers
from translora.engine.vllm_settings import check_engine, check_rank
from translora.errors import InputError
from translora.lora.kinds import SOURCES_ONLY
from translora.lora.peft_io import is_banked
from translora.lora.targets import ALL_LINEAR, resolve_targets
from translora.lora.warm_start import check_warm_start
from translora.run.recipes import base_settings
from translora.synthesis.prompts import generation_prompt

logger = logging.getLogger(__name__)


def check_training(config: FleetConfig, source: BaseInfo, target: BaseInfo) -> None:
    """Check what the distillation will need before the synthesis is paid for.

    Raises:
        InputError: the DeepSpeed config cannot be used, a target module is no linear module of the target base, a base
            cannot have the attention or the engine that is asked for, the loss wants one vocabulary and the bases
            have two, or a warm start wants one shape and they have two.
    """
    if config.synthesis.generator is not None:
        refuse_encoder_decoder(info_of(config.synthesis.generator), "inputs are invented by")
    check_source(config.source, source)
    for settings in base_settings(config):
        attention_of(settings, resolve_dtype(settings.dtype))
        if config.resources.gpus_per_actor == 0 or num_gpus():  # else the machines of the workers have to know
            check_attention(settings, resolve_dtype(settings.dtype))
        check_engine(settings)
    if config.target.vllm is not None and config.distill.peft is not None:
        raise InputError("target.vllm: vLLM computes LoRAs alone; leave it out, or distill.peft")
    if config.distill.peft is None:
        check_rank(config.distill.lora.total_rank, config.target, "distill.lora")
    check_section(config.distill, target, "distill")
    if config.prompt_template != "source":  # else it is each adapter's own
        check_target_context(config, target, config.prompt_template)
        warn_of_answers(load_tokenizer(config.target), config.prompt_template)
    if config.distill.loss == "kl":
        check_vocabularies(load_tokenizer(config.source), load_tokenizer(config.target))
    if config.distill.token_share < 1:
        for settings in (config.source, config.target):
            prompt_format(load_tokenizer(settings)).answer_spans("", "a")
    if config.distill.warm_start:
        check_warm_start(source, target, config.distill.lora.target_modules)
        if load_tokenizer(config.source).get_vocab() != load_tokenizer(config.target).get_vocab():
            logger.warning("distill.warm_start: the bases have different vocabularies: a copied adapter may say little")


def check_source(settings: BaseModelConfig, source: BaseInfo) -> None:
    """An encoder-decoder may be a source, of a kind that is known here.

    Raises:
        InputError: it is of an unknown kind, or vLLM is to compute with it.
    """
    if not source.is_encoder_decoder:
        return
    kind = source.config.get("model_type")
    if kind not in ENCODER_DECODERS:
        known = ", ".join(ENCODER_DECODERS)
        raise InputError(f"{source.name}: a source with an encoder has to be one of {known}; {kind} is not supported")
    if settings.vllm is not None:
        raise InputError(f"{settings.model}: vLLM has no {kind}; leave source.vllm out")


def check_target_context(config: FleetConfig, target: BaseInfo, template: str) -> None:
    """Whether the target base has room for an input and its answer in a template.

    Raises:
        InputError: it has not, or the template is none, or needs a chat template that the base has not.
    """
    synthesis, context = config.synthesis, context_of(config.target, target)
    try:
        empty = prompt_format(load_tokenizer(config.target), template).encode_prompt("")
    except ValueError as error:
        raise InputError(f"prompt_template: {config.target.model}: {error}") from error
    if len(empty) >= config.distill.max_length:
        raise InputError(
            f"{config.target.model}: the prompt template alone has {len(empty)} tokens, distill.max_length is "
            f"{config.distill.max_length}; raise it, or shorten the template"
        )
    virtual = (config.distill.peft or {}).get("num_virtual_tokens") or 0
    num_tokens = virtual + len(empty) + synthesis.sampling.max_new_tokens + synthesis.max_answer_tokens
    if context is not None and num_tokens > context:
        own = ", or num_virtual_tokens" * bool(virtual) + ", or shorten the prompt template" * ("{input}" in template)
        raise InputError(
            f"{config.target.model}: inputs and answers of {num_tokens} tokens do not fit its context of {context}; "
            f"lower synthesis.sampling.max_new_tokens or max_answer_tokens{own}"
        )


def check_seeds(
    seeds: Sequence[str], tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig, context: int | None, whose: str
) -> None:
    """Whether inputs like the seeds can be invented: each has room, and so has the prompt that shows them.

    Args:
        tokenizer: the generator's.
        context: tokens that the generator takes, None where nothing is said.
        whose: what the generator is called in an error.

    Raises:
        InputError: most inputs would be cut off, or the prompt does not fit.
    """
    lengths = sorted(len(tokenizer(seed, add_special_tokens=False)["input_ids"]) for seed in seeds)
    if (usual := lengths[(len(lengths) - 1) // 2]) > sampling.max_new_tokens:
        raise InputError(
            f"{whose}: its seeds have {usual} tokens and more, and inputs of more than {sampling.max_new_tokens} are "
            f"cut off and dropped; raise synthesis.sampling.max_new_tokens to at least {lengths[-1]}, or shorten them"
        )
    num_tokens = len(tokenizer(generation_prompt(seeds, 0, 0))["input_ids"]) + sampling.max_new_tokens
    if context is not None and num_tokens > context:
        raise InputError(
            f"{whose}: its seeds make a prompt of {num_tokens} tokens, the generator's context is {context}; "
            "ship fewer or shorter seeds"
        )


def check_inputs(
    inputs: Iterable[str], prompts: PromptFormat, num_answer_tokens: int, context: int | None, where: str
) -> None:
    """Whether real inputs, and answers to them, fit into a base's context.

    Args:
        where: the file or task that they are from.

    Raises:
        InputError: some do not.
    """
    if context is None:
        return
    room = context - num_answer_tokens
    # No token is shorter than a byte: most inputs need not be cut into tokens for this.
    long = [text for text in inputs if len(prompts.render(text).encode()) > room]
    if over := [size for text in long if (size := len(prompts.encode_prompt(text))) > room]:
        raise InputError(
            f"{where}: {len(over)} of its inputs make prompts of up to {max(over)} tokens, which leave "
            f"{prompts.tokenizer.name_or_path} no room for answers of {num_answer_tokens} in its context of {context}; "
            "leave them out"
        )


def check_lengths(
    rows: Sequence[Mapping[str, str]], prompts: PromptFormat, max_length: int, where: str, setting: str
) -> None:
    """Whether there is something to train on, before anything is computed for it.

    Args:
        rows: with input and target.
        where: the file or task that they are from.
        setting: the name of `max_length`.

    Raises:
        InputError: no row is short enough.
    """
    samples = [(row["input"], row["target"].strip()) for row in rows]
    if all(num_too_long([sample], prompts, max_length) for sample in samples):  # the first short one ends it
        raise InputError(
            f"{where}: each of its {len(rows)} rows is longer than {setting}, {max_length} tokens; raise it"
        )


def check_section(settings: TrainConfig, base: BaseInfo, section: str) -> None:
    """Check what a training on `base` will need; `section` is where the settings come from.

    Raises:
        InputError: the DeepSpeed config cannot be used, a target module is no linear module of the base, or the base is
            quantised.
    """
    refuse_quantised(base.config, f"{section}: {base.name}")
    refuse_encoder_decoder(base, f"{section} is for")
    ds_config = read_ds_config(settings.ds_config, resolve_dtype(settings.dtype))
    check_partitions(ds_config, settings.num_workers, f"{section}.ds_config {settings.ds_config}")
    linears = linear_modules(base)
    resolve_targets(linears, settings.lora.target_modules, base.name, f"{section}.lora.target_modules")
    has_experts, are_linear = (any(".experts." in name for name in names) for names in (base.shapes, linears))
    if settings.lora.target_modules == ALL_LINEAR and has_experts and not are_linear:
        logger.warning("%s: its experts are no linear modules: %s adapts what is beside them", base.name, ALL_LINEAR)
    if settings.peft is not None:
        if is_banked(settings.peft):
            logger.warning(
                "%s.peft: PEFT trains this LoRA alone; as %s.lora it would be one of a gang", section, section
            )
        if settings.lora.has_options:
            raise InputError(
                f"{section}.lora: init, lora_plus_ratio, gradient, random_half, chain and flat_sigma are not for "
                f"{section}.peft"
            )
        check_method(settings, base, f"{section}.peft")


def check_targets(settings: Mapping[str, Any], linears: Sequence[str], base: BaseInfo, section: str) -> None:
    """Whether the base has each module that a method of PEFT is to adapt: PEFT asks for one of them alone.

    Raises:
        InputError: it has not; names the module.
    """
    if settings.get("feedforward_modules") == ALL_LINEAR:
        raise InputError(f"{section}.feedforward_modules: PEFT knows no {ALL_LINEAR} here; name the modules")
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or not targets:
        return  # a text is a pattern, or all-linear
    targets = [str(target) for target in targets]
    for target in targets:
        if "." in target and not any(f".{name}".endswith(f".{target}") for name in linears):
            raise InputError(
                f"{section}.target_modules: {target} not in {base.name}; its modules are named like {linears[0]}"
            )
    lasts = [target.rpartition(".")[2] for target in targets]
    resolve_targets(linears, lasts, base.name, f"{section}.target_modules")


def check_method(settings: TrainConfig, base: BaseInfo, section: str) -> None:
    """Check that PEFT can put a student on `base`.

    Raises:
        InputError: it cannot, or its virtual keys and values would get lost; names the setting.
    """
    from translora.lora.method_settings import check_text, parse_method
    from translora.lora.methods import expected_shapes
    from translora.lora.peft_io import check_name

    assert settings.peft is not None
    config = parse_method(settings.peft, section, base.path)
    check_targets(settings.peft, list(linear_modules(base)), base, section)
    if config.peft_type in SOURCES_ONLY:
        raise InputError(
            f"{section}: {config.peft_type.value} cannot be trained on a partitioned base; take another method"
        )
    if settings.gradient_checkpointing and config.peft_type == "PREFIX_TUNING":
        raise InputError(f"{section}: PREFIX_TUNING has no recomputation; set gradient_checkpointing to false")
    try:
        names = expected_shapes(base, config)
        for name in names if is_banked(settings.peft) else ():
            check_name(name, "what it makes")
    except ValueError as error:
        raise InputError(f"{section}: {error}") from error
    own = BaseModelConfig(model=str(base.path), trust_remote_code=base.trust_remote_code)
    check_text(config, load_tokenizer(own), section)


def context_of(settings: BaseModelConfig, base: BaseInfo) -> int | None:
    """Tokens that a base takes as its engine holds it; None where nothing is said."""
    context: int | None = base.config.get("max_position_embeddings")
    own = (settings.vllm or {}).get("max_model_len", -1)
    return own if own > 0 else context
