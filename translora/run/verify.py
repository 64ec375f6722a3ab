"""What is checked before the first phase: the settings against the bases, each bundle, and what a run left of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from translora.bundle import BaseInfo, Bundle, BundleError, read_bundle, verify_bundle
from translora.bundle.adapter import highest_rank, is_in_bank
from translora.bundle.base import ENCODER_DECODERS, info_of, linear_modules, refuse_encoder_decoder, refuse_quantised
from translora.bundle.remote import fetch_all, is_remote
from translora.config import AdapterEntry, BaseModelConfig, FleetConfig, TrainConfig
from translora.distill.data import check_links, num_steps
from translora.distill.ds_config import check_partitions, read_ds_config
from translora.distill.phase import student_start
from translora.distill.teacher import check_vocabularies
from translora.engine.loading import attention_of, check_attention, load_tokenizer, num_gpus, resolve_dtype
from translora.engine.prompts import prompt_format
from translora.engine.protocol import check_answers, warn_of_answers
from translora.engine.vllm_settings import check_engine, check_rank
from translora.lora.kinds import SOURCES_ONLY
from translora.lora.peft_io import is_banked
from translora.lora.targets import ALL_LINEAR, resolve_targets
from translora.lora.warm_start import check_warm_start
from translora.run.files import read_jsonl
from translora.run.member import MAX_NAME, Member, Run, attempt_sizes, cohort_names, is_name
from translora.run.recipes import Seals, base_settings, recipes
from translora.run.resume import continue_state
from translora.run.state import AdapterState, load_state, state_path
from translora.synthesis.pool import choose_screen
from translora.synthesis.prompts import generation_prompt

DOWNLOADS = "downloads"
"""Copies of remote bundles, below the run directory."""
logger = logging.getLogger(__name__)


def check_training(config: FleetConfig, source: BaseInfo, target: BaseInfo) -> None:
    """Check what the distillation will need before the synthesis is paid for.

    Raises:
        ValueError: the DeepSpeed config cannot be used, a target module is no linear module of the target base, a base
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
        raise ValueError("target.vllm: vLLM computes LoRAs alone; leave it out, or distill.peft")
    if config.distill.peft is None:
        check_rank(config.distill.lora.total_rank, config.target, "distill.lora")
    check_section(config.distill, target, "distill")
    template = "auto" if config.prompt_template == "source" else config.prompt_template
    check_target_context(config, target, template)
    warn_of_answers(load_tokenizer(config.target), template)
    if config.distill.loss == "kl":
        check_vocabularies(load_tokenizer(config.source), load_tokenizer(config.target))
    if config.distill.token_share < 1:
        for settings in (config.source, config.target):
            prompt_format(load_tokenizer(settings)).answer_spans("a")
    if config.distill.warm_start:
        check_warm_start(source, target, config.distill.lora.target_modules)
        if load_tokenizer(config.source).get_vocab() != load_tokenizer(config.target).get_vocab():
            logger.warning("distill.warm_start: the bases have different vocabularies: a copied adapter may say little")


def check_source(settings: BaseModelConfig, source: BaseInfo) -> None:
    """An encoder-decoder may be a source, of a kind that is known here.

    Raises:
        ValueError: it is of an unknown kind, or vLLM is to compute with it.
    """
    if not source.is_encoder_decoder:
        return
    kind = source.config.get("model_type")
    if kind not in ENCODER_DECODERS:
        known = ", ".join(ENCODER_DECODERS)
        raise ValueError(f"{source.name}: a source with an encoder has to be one of {known}; {kind} is not supported")
    if settings.vllm is not None:
        raise ValueError(f"{settings.model}: vLLM has no {kind}; leave source.vllm out")


def check_target_context(config: FleetConfig, target: BaseInfo, template: str) -> None:
    """Whether the target base has room for an input and its answer in a template.

    Raises:
        ValueError: it has not, or the template is none, or needs a chat template that the base has not.
    """
    synthesis, context = config.synthesis, context_of(config.target, target)
    try:
        empty = prompt_format(load_tokenizer(config.target), template).encode_prompt("")
    except ValueError as error:
        raise ValueError(f"prompt_template: {config.target.model}: {error}") from error
    virtual = (config.distill.peft or {}).get("num_virtual_tokens") or 0
    num_tokens = virtual + len(empty) + synthesis.sampling.max_new_tokens + synthesis.max_answer_tokens
    if context is not None and num_tokens > context:
        own = ", or num_virtual_tokens" * bool(virtual) + ", or shorten the prompt template" * ("{input}" in template)
        raise ValueError(
            f"{config.target.model}: inputs and answers of {num_tokens} tokens do not fit its context of {context}; "
            f"lower synthesis.sampling.max_new_tokens or max_answer_tokens{own}"
        )


def check_section(settings: TrainConfig, base: BaseInfo, section: str) -> None:
    """Check what a training on `base` will need; `section` is where the settings come from.

    Raises:
        ValueError: the DeepSpeed config cannot be used, a target module is no linear module of the base, or the base is
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
            raise ValueError(
                f"{section}.lora: init, lora_plus_ratio, gradient, random_half, chain and flat_sigma are not for "
                f"{section}.peft"
            )
        check_method(settings, base, f"{section}.peft")


def check_method(settings: TrainConfig, base: BaseInfo, section: str) -> None:
    """Check that PEFT can put a student on `base`.

    Raises:
        ValueError: it cannot, or its virtual keys and values would get lost; names the setting.
    """
    from translora.lora.methods import check_text, expected_shapes, parse_method
    from translora.lora.peft_io import check_name

    assert settings.peft is not None
    config = parse_method(settings.peft, section, base.path)
    if config.peft_type in SOURCES_ONLY:
        raise ValueError(
            f"{section}: {config.peft_type.value} cannot be trained on a partitioned base; take another method"
        )
    if settings.gradient_checkpointing and config.peft_type == "PREFIX_TUNING":
        raise ValueError(f"{section}: PREFIX_TUNING has no recomputation; set gradient_checkpointing to false")
    try:
        names = expected_shapes(base, config)
        for name in names if is_banked(settings.peft) else ():
            check_name(name, "what it makes")
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from error
    own = BaseModelConfig(model=str(base.path), trust_remote_code=base.trust_remote_code)
    check_text(config, load_tokenizer(own), section)


def verify_fleet(
    run: Run, entries: Mapping[str, AdapterEntry], seals: Seals, unmerged: Mapping[str, str]
) -> dict[str, Member | AdapterState]:
    """Read and check every bundle and what an earlier run left of it; only the state where there is nothing to do.

    A finished adapter whose files are as they were when they were last verified is not read again.

    Args:
        unmerged: why a bundle could not be merged from others, by name.
    """
    found: dict[str, Member | AdapterState] = {}
    run_dir = run.config.run_dir
    busy = cohort_names(run_dir)
    remote = {name: entry.bundle for name, entry in entries.items() if is_remote(entry.bundle)}
    unreachable = {**unmerged, **fetch_all(remote, run_dir / DOWNLOADS)}
    for name, entry in entries.items():
        if name in unreachable:
            found[name] = refused(run, name, entry, unreachable[name])
            continue
        if name in remote:
            entry = entry.model_copy(update={"bundle": str(run_dir / DOWNLOADS / name)})
        looked = seals.look(entry)
        sealed = None if name in busy else sealed_state(run, name, entry, seals)
        found[name] = sealed or verify(run, name, entry)
        if isinstance(member := found[name], Member):
            member.looked = looked
            seals.put(entry, member.state, looked)
    seals.save()
    if skipped := sum(isinstance(one, AdapterState) and one.phase == "done" for one in found.values()):
        logger.info("%d of %d adapters are finished and unchanged", skipped, len(found))
    return found


def known_state(run: Run, name: str, entry: AdapterEntry) -> AdapterState:
    """The state that an earlier run left, or a first one.

    Raises:
        ValueError: it cannot be read. It may be of a newer version, and the work of that version with it: such a file
            is never written over, see `unreadable`.
    """
    if state_path(run.config.run_dir, name).is_file():
        return load_state(run.config.run_dir, name)
    return AdapterState(name=name, bundle=entry.bundle)


def unreadable(name: str, entry: AdapterEntry, reason: str) -> AdapterState:
    """A quarantine that is not written down."""
    logger.error("%s: quarantined: %s", name, reason)
    return AdapterState(name=name, bundle=entry.bundle, status="quarantined", reason=reason)


def refused(run: Run, name: str, entry: AdapterEntry, reason: str) -> AdapterState:
    """Quarantine an adapter whose bundle cannot be had; what an earlier run made of it is kept."""
    try:
        state = known_state(run, name, entry)
    except ValueError:
        return unreadable(name, entry, reason)
    run.quarantine(state, reason)
    return state


def sealed_state(run: Run, name: str, entry: AdapterEntry, seals: Seals) -> AdapterState | None:
    """The state of a finished adapter that nothing has happened to; None where it must be looked at."""
    try:
        state = load_state(run.config.run_dir, name)
    except ValueError:
        return None
    return state if seals.fits(entry, state) else None


def verify(run: Run, name: str, entry: AdapterEntry) -> Member | AdapterState:
    """Read and check one bundle, and what an earlier run left of it; only its state when it is quarantined."""
    config = run.config
    try:
        state = known_state(run, name, entry)
    except ValueError as error:
        return unreadable(name, entry, str(error))
    try:
        bundle = read_bundle(entry.bundle)
        check_name_and_size(config, entry, bundle)
        verify_bundle(bundle, run.source)
        screen = choose_screen(config.synthesis, bundle, entry.screen)
        check_stop(config, entry, screen)
        if config.source.vllm is not None and not is_in_bank(bundle.path):
            raise ValueError(f"{bundle.path}: is no plain LoRA, and vLLM computes no others; leave source.vllm out")
        for directory in filter(None, (bundle.path, bundle.discriminator_dir)):
            check_rank(highest_rank(directory), config.source, str(directory))
        check_prompts(run, bundle)
        check_target_context(config, run.target, config.template_of(entry, bundle.manifest.prompt_template))
        if screen == "discriminator":
            check_answers(run.source_tokenizer, bundle.manifest.prompt_template)
        check_copy(run, bundle, entry)
        num_samples = entry.num_samples or bundle.manifest.num_samples
        check_steps(config, entry, num_samples)
        eval_rows = read_jsonl(entry.eval_data, required=("input", "target")) if entry.eval_data else []
    except (BundleError, ValueError) as error:
        run.quarantine(state, str(error))
        return state
    bases = (run.source, run.target, run.generator)
    fresh = AdapterState(
        name=name,
        bundle=entry.bundle,
        bundle_digest=bundle.digest,
        task_name=bundle.manifest.task_name,
        phase="synthesis",
        num_samples=num_samples,
        recipes=recipes(config, entry, bundle_digest=bundle.digest, num_samples=num_samples, bases=bases),
    )
    state = continue_state(config.run_dir, fresh, run.target)
    run.save(state)
    sizes = attempt_sizes(state, config.gate)
    return Member(bundle, state, config.run_dir / "adapters" / name, *sizes, eval_rows, entry)


def check_copy(run: Run, bundle: Bundle, entry: AdapterEntry) -> None:
    """A student that is not trained has to begin as its source adapter.

    Raises:
        ValueError: it would not.
    """
    if run.config.epochs_of(entry) == 0:
        start, remark = student_start(run, bundle.path)
        if start is None:
            raise ValueError(f"{bundle.path}: {remark}, and 0 epochs train nothing; give it epochs of its own")


def check_stop(config: FleetConfig, entry: AdapterEntry, screen: str) -> None:
    """A teacher that does not end its answers says nothing of where they end.

    Raises:
        ValueError: the loss or the screen would ask it.
    """
    if entry.stop is None:
        return
    why = f"{entry.bundle}: `stop` is for a teacher that does not end its answers, and"
    if config.distill.loss == "kl":
        raise ValueError(f"{why} distill.loss: kl would imitate it there; use sft")
    if screen == "excess":
        raise ValueError(f"{why} the screen excess counts their ends; use confidence")


def check_steps(config: FleetConfig, entry: AdapterEntry, num_samples: int) -> None:
    """Whether a student has steps for each link of a chain, and for EVA's initialisation.

    Raises:
        ValueError: it has not.
    """
    if config.distill.peft is None and config.epochs_of(entry) > 0:
        lora, steps = config.distill.lora, num_steps(num_samples, config.epochs_of(entry), config.distill.batch_size)
        check_links(lora.num_links, steps, int(lora.init == "eva"), entry.bundle)


def check_name_and_size(config: FleetConfig, entry: AdapterEntry, bundle: Bundle) -> None:
    """What the bundle's owner chose and the fleet would feel: its directory's name, and how much work it asks for.

    Raises:
        ValueError: the name is none for an adapter, or |D| is above the limit and the fleet file does not confirm it.
    """
    if not is_name(bundle.path.name):
        raise ValueError(
            f"{bundle.path}: the directory's name cannot be an adapter's; rename it: at most {MAX_NAME} printable "
            "characters, no dot or ~ in front, no space at its ends"
        )
    num_samples = bundle.manifest.num_samples
    if entry.num_samples is None and num_samples > config.max_num_samples:
        raise ValueError(
            f"{bundle.path}: its |D| is {num_samples:,}, max_num_samples is {config.max_num_samples:,}; set "
            "num_samples for this adapter, or raise max_num_samples"
        )


def context_of(settings: BaseModelConfig, base: BaseInfo) -> int | None:
    """Tokens that a base takes as its engine holds it; None where nothing is said."""
    context: int | None = base.config.get("max_position_embeddings")
    own = (settings.vllm or {}).get("max_model_len", -1)
    return own if own > 0 else context


def check_prompts(run: Run, bundle: Bundle) -> None:
    """Whether the bundle's template and seeds can be used with the bases' tokenizers.

    Raises:
        ValueError: no chat template for a `chat` bundle, or a template or seeds that do not fit a base's context.
    """
    synthesis = run.config.synthesis
    try:
        empty = prompt_format(run.source_tokenizer, bundle.manifest.prompt_template).encode_prompt("")
    except ValueError as error:
        raise ValueError(f"{bundle.path}: {error}") from error
    num_tokens = len(empty) + synthesis.sampling.max_new_tokens + synthesis.max_answer_tokens
    context = context_of(run.config.source, run.source)
    if context is not None and num_tokens > context:
        raise ValueError(
            f"{bundle.path}: its prompt template makes prompts and answers of {num_tokens} tokens, the source base's "
            f"context is {context}; ship a shorter template"
        )
    prompt = generation_prompt(bundle.seeds, 0, 0)
    num_tokens = len(run.generator_tokenizer(prompt)["input_ids"]) + synthesis.sampling.max_new_tokens
    context = context_of(run.config.generator, run.generator)
    if context is not None and num_tokens > context:
        raise ValueError(
            f"{bundle.path}: its seeds make a prompt of {num_tokens} tokens, the generator's context is {context}; "
            "ship fewer or shorter seeds"
        )
