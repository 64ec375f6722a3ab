"""What is checked of each adapter before the first phase: its bundle, its settings, and what a run left of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from translora.bundle import Bundle, read_bundle, verify_bundle
from translora.bundle.adapter import highest_rank, is_in_bank, read_adapter_config
from translora.bundle.remote import fetch_all, is_remote
from translora.config import AdapterEntry, FleetConfig
from translora.distill.data import check_links, num_steps
from translora.distill.phase import student_start
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.engine.protocol import check_answers
from translora.engine.vllm_settings import check_plain, check_rank
from translora.errors import InputError
from translora.run.check import check_inputs, check_seeds, check_target_context, context_of
from translora.run.cohorts import cohort_names
from translora.run.files import read_jsonl
from translora.run.member import Member, Run
from translora.run.recipes import Bases, Seals, recipes, spending
from translora.run.resume import continue_state, withdraw_others
from translora.run.state import BY_DISCRIMINATOR, AdapterState, load_state, state_path
from translora.synthesis.pool import choose_screen

DOWNLOADS = "downloads"
"""Copies of remote bundles, below the run directory."""
logger = logging.getLogger(__name__)


def verify_fleet(
    run: Run, entries: Mapping[str, AdapterEntry], seals: Seals, faults: Mapping[str, str]
) -> dict[str, Member | AdapterState]:
    """Read and check every bundle and what an earlier run left of it; only the state where there is nothing to do.

    A finished adapter whose files are as they were when they were last verified is not read again.

    Args:
        faults: why an entry is quarantined unread, by name.
    """
    found: dict[str, Member | AdapterState] = {}
    run_dir = run.config.run_dir
    withdraw_others(run_dir, run.target)
    busy = cohort_names(run_dir)
    remote = {name: entry.bundle for name, entry in entries.items() if is_remote(entry.bundle)}
    wanted = {name: url for name, url in remote.items() if name not in faults}
    faults = {**faults, **fetch_all(wanted, run_dir / DOWNLOADS)}
    for name, entry in entries.items():
        if name in faults:
            found[name] = refused(run, name, entry, faults[name])
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
        InputError: it cannot be read. It may be of a newer version, and the work of that version with it: such a file
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
        check_size(config, entry, bundle)
        verify_bundle(bundle, run.source)
        screen = choose_screen(config.synthesis, bundle, entry.screen)
        check_stop(config, entry)
        check_plain(bundle.path, config.source)
        for directory in filter(None, (bundle.path, bundle.discriminator_dir)):
            if (rank := highest_rank(directory)) > config.max_rank:
                raise InputError(f"{directory}: its rank is {rank}, max_rank is {config.max_rank}; raise max_rank")
            check_rank(rank, config.source, str(directory))
        check_prompts(run, bundle)
        template = config.template_of(entry, bundle.manifest.prompt_template)
        check_target_context(config, run.target, template)
        if not config.stays_copy(entry):
            check_student_length(run, bundle, template)
        if screen in BY_DISCRIMINATOR:
            check_answers(run.source_tokenizer, bundle.manifest.prompt_template)
        check_copy(run, bundle, entry)
        num_samples = entry.num_samples or bundle.manifest.num_samples
        check_steps(config, entry, num_samples)
        eval_rows = read_eval_rows(run, bundle, entry)
    except ValueError as error:
        run.quarantine(state, str(error))
        return state
    bases = Bases(run.source, run.target, run.generator)
    fresh = AdapterState(
        name=name,
        bundle=entry.bundle,
        bundle_digest=bundle.digest,
        task_name=bundle.manifest.task_name,
        phase="synthesis",
        num_samples=num_samples,
        recipes=recipes(config, entry, bundle_digest=bundle.digest, num_samples=num_samples, bases=bases),
        spending=spending(config),
    )
    state = continue_state(config.run_dir, fresh, run.target)
    run.save(state)
    return Member(bundle, state, config.run_dir / "adapters" / name, eval_rows, entry)


def read_eval_rows(run: Run, bundle: Bundle, entry: AdapterEntry) -> list[dict[str, Any]]:
    """Real inputs and targets that the adapter and its student are measured on.

    Raises:
        InputError: they cannot be read, or do not fit a base.
    """
    if entry.eval_data is None:
        return []
    rows, config = read_jsonl(entry.eval_data, required=("input", "target")), run.config
    template = config.template_of(entry, bundle.manifest.prompt_template)
    for settings, base, own in (
        (config.source, run.source, bundle.manifest.prompt_template),
        (config.target, run.target, template),
    ):
        prompts, context = prompt_format(load_tokenizer(settings), own), context_of(settings, base)
        inputs = (row["input"] for row in rows)
        check_inputs(inputs, prompts, config.synthesis.max_answer_tokens, context, entry.eval_data)
    return rows


def check_student_length(run: Run, bundle: Bundle, template: str) -> None:
    """Whether inputs like the seeds, and an answer of a token, are short enough to train on.

    Raises:
        InputError: not one is.
    """
    prompts, longest = prompt_format(load_tokenizer(run.config.target), template), run.config.distill.max_length
    sizes = [len(prompts.encode_prompt(seed)) for seed in bundle.seeds]
    if min(sizes) >= longest:
        raise InputError(
            f"{bundle.path}: its seeds make prompts of {min(sizes)} to {max(sizes)} tokens, distill.max_length is "
            f"{longest}; raise it"
        )


def check_copy(run: Run, bundle: Bundle, entry: AdapterEntry) -> None:
    """A student that is not trained has to begin as its source adapter, on all of its modules and of no smaller rank.

    Raises:
        InputError: it would not.
    """
    if run.config.stays_copy(entry):
        start = student_start(run, bundle.path)
        if start.path is None:
            raise InputError(f"{bundle.path}: {start.remark}, and 0 epochs train nothing; give it epochs of its own")
        if start.lost:
            raise InputError(
                f"{bundle.path}: {start.remark}, and is no copy then; add {', '.join(start.lost)} to "
                "distill.lora.target_modules, or give it epochs of its own"
            )
        if start.rank > run.config.distill.lora.rank:
            raise InputError(
                f"{bundle.path}: {start.remark}, and is no copy then; set distill.lora.rank to {start.rank}, or give "
                "it epochs of its own"
            )


def check_stop(config: FleetConfig, entry: AdapterEntry) -> None:
    """A teacher that does not end its answers says nothing of where they end.

    Raises:
        InputError: the loss would ask it.
    """
    if entry.stop is None:
        return
    why = f"{entry.bundle}: `stop` is for a teacher that does not end its answers, and"
    if config.distill.loss == "kl":
        raise InputError(f"{why} distill.loss: kl would imitate it there; use auto")


def check_steps(config: FleetConfig, entry: AdapterEntry, num_samples: int) -> None:
    """Whether a student has steps for each link of a chain, and for EVA's initialisation.

    Raises:
        InputError: it has not.
    """
    if config.distill.peft is None and not config.stays_copy(entry):
        lora, steps = (
            config.distill.lora,
            num_steps(num_samples, config.training_of(entry).epochs, config.distill.batch_size),
        )
        check_links(lora.num_links, steps, int(lora.init == "eva"), entry.bundle)


def check_size(config: FleetConfig, entry: AdapterEntry, bundle: Bundle) -> None:
    """How much work the bundle's owner asks for.

    Raises:
        InputError: |D| is above the limit, and the fleet file does not confirm it.
    """
    num_samples = bundle.manifest.num_samples
    if entry.num_samples is None and num_samples > config.max_num_samples:
        raise InputError(
            f"{bundle.path}: its |D| is {num_samples:,}, max_num_samples is {config.max_num_samples:,}; set "
            "num_samples for this adapter, or raise max_num_samples"
        )


def check_prompts(run: Run, bundle: Bundle) -> None:
    """Whether the bundle's template and seeds can be used with the bases' tokenizers.

    Raises:
        InputError: no chat template for a `chat` bundle, a template or seeds that do not fit a base's context, or seeds
            longer than what is invented.
    """
    synthesis = run.config.synthesis
    try:
        empty = prompt_format(run.source_tokenizer, bundle.manifest.prompt_template).encode_prompt("")
    except ValueError as error:
        raise InputError(f"{bundle.path}: {error}") from error
    virtual = 0 if is_in_bank(bundle.path) else read_adapter_config(bundle.path).get("num_virtual_tokens") or 0
    num_tokens = virtual + len(empty) + synthesis.sampling.max_new_tokens + synthesis.max_answer_tokens
    context = context_of(run.config.source, run.source)
    if context is not None and num_tokens > context:
        raise InputError(
            f"{bundle.path}: its prompt template {'and virtual tokens make' if virtual else 'makes'} prompts and "
            f"answers of {num_tokens} tokens, the source base's context is {context}; ship a shorter template"
        )
    context = context_of(run.config.generator, run.generator)
    check_seeds(bundle.seeds, run.generator_tokenizer, synthesis.sampling, context, str(bundle.path))
