"""`translora migrate`: the way of a fleet from its bundles to new bundles, top to bottom.

verify -> synthesis (generate, screen, label; in rounds) -> distill -> gate and publish. Each phase takes the
adapters that reached it, works on all of them at once, and leaves files behind that a rerun verifies and skips.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from translora.bundle import BaseInfo, Bundle, BundleError, inspect_base, read_bundle, verify_bundle, write_bundle
from translora.bundle.base import linear_modules
from translora.config import AdapterEntry, FleetConfig, TrainConfig
from translora.distill.job import FAILURE, TrainJob, make_job
from translora.distill.launch import train_adapters
from translora.distill.zero3 import read_ds_config
from translora.engine.loading import load_tokenizer, resolve_dtype
from translora.engine.prompts import prompt_format
from translora.gate.agreement import GateMember, run_gate
from translora.report.card import model_card
from translora.run.files import derive_seed, read_jsonl, sha256_path, write_parquet
from translora.run.member import (
    DISCRIMINATOR,
    MAX_NAME,
    STUDENT,
    SYNTHETIC,
    Member,
    Run,
    attempt_size,
    cohort,
    continue_state,
    end_cohort,
    expand_entries,
    is_name,
)
from translora.run.progress import Progress
from translora.run.rundir import open_run
from translora.run.state import AdapterState, Phase, load_state, state_path
from translora.run.tracker import Tracker
from translora.synthesis.discriminator import discriminator_rows
from translora.synthesis.prompts import generation_prompt
from translora.synthesis.rounds import Pool, choose_screen, synthesise

logger = logging.getLogger(__name__)
SAVE_EVERY_SECONDS = 2.0


def migrate(config: FleetConfig, start_cluster: Callable[[], None] = lambda: None) -> list[AdapterState]:
    """Migrate a fleet; returns every adapter's state. A rerun continues where a killed run stopped.

    Args:
        config: the fleet file.
        start_cluster: called when everything has been checked, and only if there is work: starts Ray.

    Raises:
        ValueError: the config or a base cannot be used. A fault of one bundle quarantines that adapter alone.
    """
    entries = expand_entries(config.adapters)
    source, target = (inspect_base(base.model, base.trust_remote_code) for base in (config.source, config.target))
    if source.fingerprint == target.fingerprint:
        raise ValueError(f"source and target are the same base ({source.path}); set `target` to the new base")
    with (
        open_run(config.run_dir, config),
        Tracker(config.run_dir, config.tracking, config.model_dump(mode="json"), config.run_dir.name) as tracker,
    ):
        generator = config.synthesis.generator or config.target
        run = Run(
            config=config,
            source=source,
            target=target,
            tracker=tracker,
            source_tokenizer=load_tokenizer(config.source),
            generator_tokenizer=load_tokenizer(generator),
        )
        check_training(config, target)
        verified = {name: verify(run, name, entry) for name, entry in entries.items()}
        members = [member for member in verified.values() if isinstance(member, Member)]
        if any(member.state.status == "pending" for member in members):
            start_cluster()
        while any(member.state.status == "pending" for member in members):  # again for what the gate sent back
            for phase in PHASE_WORK:
                run_phase(run, phase, members)
        return [found.state if isinstance(found, Member) else found for found in verified.values()]


def run_phase(run: Run, phase: Phase, members: list[Member]) -> None:
    """Do a phase's work for all members that wait for it, those of a killed run's cohort first."""
    while todo := [member for member in members if member.waits_for(phase)]:
        group = cohort(run.config.run_dir, phase, todo, members)
        start = time.monotonic()
        PHASE_WORK[phase](run, group)
        seconds = time.monotonic() - start
        run.tracker.log({f"time/{phase}_seconds": seconds, "perf/adapters": float(len(group))})
        for member in group:
            member.state.seconds[phase] = round(member.state.seconds.get(phase, 0.0) + seconds, 1)
            run.save(member.state)
        end_cohort(run.config.run_dir, phase)


def check_training(config: FleetConfig, target: BaseInfo) -> None:
    """Check what the distillation will need before the synthesis is paid for.

    Raises:
        ValueError: the DeepSpeed config cannot be used, or a target module is no linear module of the target base.
    """
    check_section(config.distill, target, "distill")


def check_section(settings: TrainConfig, base: BaseInfo, section: str) -> None:
    """Check what a training on `base` will need; `section` is where the settings come from.

    Raises:
        ValueError: the DeepSpeed config cannot be used, or a target module is no linear module of the base.
    """
    read_ds_config(settings.ds_config, resolve_dtype(settings.dtype))
    linears = {name.rpartition(".")[2] for name in linear_modules(base)}
    missing = [name for name in settings.lora.target_modules if name not in linears]
    if missing:
        raise ValueError(
            f"{section}.lora.target_modules: {', '.join(missing)} not in {base.name}; "
            f"it has {', '.join(sorted(linears))}"
        )


def verify(run: Run, name: str, entry: AdapterEntry) -> Member | AdapterState:
    """Read and check one bundle, and what an earlier run left of it; only its state when it is quarantined."""
    config = run.config
    state = AdapterState(name=name, bundle=entry.bundle)
    try:
        if state_path(config.run_dir, name).is_file():
            state = load_state(config.run_dir, name)
    except ValueError as error:
        # Not written over: it may be of a newer version, and the work of that version with it.
        logger.error("%s: quarantined: %s", name, error)
        return state.model_copy(update={"status": "quarantined", "reason": str(error)})
    try:
        bundle = read_bundle(entry.bundle)
        check_name_and_size(config, entry, bundle)
        verify_bundle(bundle, run.source)
        choose_screen(config.synthesis, bundle)
        check_prompts(run, bundle)
        eval_rows = read_jsonl(entry.eval_data, required=("input", "target")) if entry.eval_data else []
    except (BundleError, ValueError) as error:
        run.quarantine(state, str(error))
        return state
    num_samples = entry.num_samples or bundle.manifest.num_samples
    fresh = AdapterState(
        name=name,
        bundle=entry.bundle,
        bundle_digest=bundle.digest,
        task_name=bundle.manifest.task_name,
        phase="synthesis",
        num_samples=num_samples,
    )
    state = continue_state(config.run_dir, fresh, run.target)
    if eval_rows and state.phase == "done" and state.accuracy is None:
        logger.warning(
            "%s: eval_data %s is not measured: the adapter was finished before it was named%s",
            name,
            entry.eval_data,
            f"; delete {config.run_dir / state.output} to repeat its gate" if state.output else "",
        )
    run.save(state)
    num_heldout = max(config.gate.min_holdout, math.ceil(config.gate.holdout_fraction * num_samples))
    directory, size = config.run_dir / "adapters" / name, attempt_size(state, config.gate)
    return Member(bundle, state, directory, size, num_heldout, eval_rows)


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
    context = run.source.config.get("max_position_embeddings")
    if context is not None and num_tokens > context:
        raise ValueError(
            f"{bundle.path}: its prompt template makes prompts and answers of {num_tokens} tokens, the source base's "
            f"context is {context}; ship a shorter template"
        )
    prompt = generation_prompt(bundle.seeds, 0, 0)
    num_tokens = len(run.generator_tokenizer(prompt)["input_ids"]) + synthesis.sampling.max_new_tokens
    context = inspect_base((synthesis.generator or run.config.target).model).config.get("max_position_embeddings")
    if context is not None and num_tokens > context:
        raise ValueError(
            f"{bundle.path}: its seeds make a prompt of {num_tokens} tokens, the generator's context is {context}; "
            "ship fewer or shorter seeds"
        )


def synthesis_phase(run: Run, members: list[Member]) -> None:
    """Fill every adapter's synthetic set and write it, split into train, heldout and refused."""
    config = run.config
    generator = config.synthesis.generator or config.target
    pools = []
    for member in members:
        needed = member.num_samples + member.num_heldout
        budget = math.ceil(config.synthesis.max_generated_factor * needed)
        screen = choose_screen(config.synthesis, member.bundle)
        surplus = config.synthesis.excess_surplus if screen == "excess" else 1.0
        pools.append(Pool(member.name, member.bundle, needed, budget, screen, surplus))
        if member.state.attempt > 1:
            pools[-1].carry_on(member.state.synthesis, pq.read_table(member.earlier_set).to_pylist())

    def after_round() -> None:
        for member, pool in zip(members, pools, strict=True):
            if not member.waits_for("synthesis"):
                continue
            member.state.synthesis = pool.stats.model_copy(deep=True)
            run.save(member.state)
            run.tracker.log(
                {"adapter/accepted": float(pool.stats.accepted), "adapter/acceptance": pool.stats.acceptance},
                step=pool.stats.rounds,
                adapter=member.name,
            )

    synthesise(
        pools,
        generator=generator,
        source=config.source,
        fingerprints=(inspect_base(generator.model).fingerprint, run.source.fingerprint),
        config=config.synthesis,
        resources=config.resources,
        seed=config.seed,
        run_dir=config.run_dir,
        on_round=after_round,
    )
    for member, pool in zip(members, pools, strict=True):
        if not member.waits_for("synthesis"):
            continue
        member.state.synthesis = pool.stats
        if len(pool.accepted) < max(2, config.synthesis.min_accepted_fraction * pool.needed):
            run.quarantine(member.state, f"too few synthetic samples: {pool.stats.shortfall}")
            continue
        if pool.stats.shortfall:
            logger.warning("%s: goes on with fewer samples: %s", member.name, pool.stats.shortfall)
        if pool.stats.warning:
            logger.warning("%s: %s", member.name, pool.stats.warning)
        write_synthetic(member, pool, config.seed, config.gate.min_holdout)
        run.advance(member, "distill", member.directory / SYNTHETIC)


def write_synthetic(member: Member, pool: Pool, seed: int, min_holdout: int) -> None:
    """Write the adapter's synthetic set: input, answer, score, split (train, heldout, refused)."""
    order = list(range(len(pool.accepted)))
    random.Random(derive_seed(seed, member.name, "split")).shuffle(order)
    share = round(len(order) * member.num_heldout / pool.needed)
    num_heldout = max(1, min(member.num_heldout, max(share, min_holdout), len(order) // 2))
    heldout = set(order[:num_heldout])
    rows = [
        {"adapter": member.name, **row, "split": "heldout" if index in heldout else "train"}
        for index, row in enumerate(pool.accepted)
    ] + [{"adapter": member.name, **row, "split": "refused"} for row in pool.refused]
    names = ("adapter", "sample_id", "input", "answer", "score", "split")
    types = (pa.string(), pa.int64(), pa.string(), pa.string(), pa.float64(), pa.string())
    table = pa.Table.from_pylist(rows, pa.schema(list(zip(names, types, strict=True))))
    write_parquet(member.directory / SYNTHETIC, table)


def train_jobs(run: Run, member: Member) -> list[TrainJob]:
    """The two trainings of an adapter on the target base: the student, and a discriminator for the next hop."""
    config, directory = run.config, member.directory
    train, heldout, refused = (member.samples(split) for split in ("train", "heldout", "refused"))
    seed = derive_seed(config.seed, member.name, DISCRIMINATOR)
    positives = [row["input"] for row in train + heldout]
    questions = discriminator_rows(
        positives, [row["input"] for row in refused], member.state.task_name, config.discriminator.max_samples, seed
    )
    answers = [{"input": row["input"], "answer": row["answer"]} for row in train]
    return [
        make_job(
            member.name,
            kind,
            rows,
            settings,
            output=directory / kind,
            work_dir=directory / "train" / kind,
            root_seed=config.seed,
            with_end=kind == STUDENT,
        )
        for kind, rows, settings in (
            (STUDENT, answers, config.distill),
            (DISCRIMINATOR, questions, config.discriminator),
        )
    ]


def distill_phase(run: Run, members: list[Member]) -> None:
    """Train all students and discriminators on one worker group that holds the target base."""
    config = run.config
    members = [member for member in members if member.waits_for("distill")]
    by_name = {member.name: member for member in members}
    jobs = {job.name: job for member in members for job in train_jobs(run, member)}
    last_saved = 0.0
    steps: dict[str, tuple[int, int]] = {}

    def on_step(job_name: str, row: dict[str, float]) -> None:
        nonlocal last_saved
        name, _, kind = job_name.rpartition("/")
        step, total = int(row["step"]), int(row["num_steps"])
        steps[job_name] = (step, total)
        progress.update(sum(step for step, _ in steps.values()), f"{job_name} {step}/{total} loss {row['loss']:.3f}")
        run.tracker.log({f"loss/{kind}": row["loss"], "time/train_seconds": row["seconds"]}, step=step, adapter=name)
        if kind == STUDENT:
            state = by_name[name].state
            state.step, state.num_steps = step, total
            if time.monotonic() - last_saved > SAVE_EVERY_SECONDS or step == total:
                last_saved = time.monotonic()
                run.save(state)

    total_steps = sum(job.expected_steps(config.distill.batch_size) for job in jobs.values())
    with Progress("distill", total_steps) as progress:
        train_adapters(
            config.target,
            run.target.name,
            list(jobs.values()),
            config.distill,
            config.resources,
            config.run_dir,
            on_step,
        )
    for member in members:
        failures = [path for path in (member.directory / "train").glob(f"*/{FAILURE}")]
        if failures:
            run.quarantine(member.state, json.loads(failures[0].read_text())["reason"])
            continue
        member.state.losses = json.loads((member.directory / STUDENT / "losses.json").read_text())
        member.state.step = member.state.num_steps = len(member.state.losses)
        run.advance(member, "gate", member.directory / STUDENT, member.directory / DISCRIMINATOR)


def gate_phase(run: Run, members: list[Member]) -> None:
    """Judge every student on its held-out prompts; what passes becomes a bundle of the target base."""
    config = run.config
    gate_members = [
        GateMember(
            name=member.name,
            student_dir=member.directory / STUDENT,
            teacher_dir=member.bundle.path,
            teacher_template=member.bundle.manifest.prompt_template,
            heldout=member.samples("heldout"),
            eval_rows=member.eval_rows,
            only_answer=member.state.synthesis.only_answer,
        )
        for member in members
    ]
    results = run_gate(
        gate_members,
        source=config.source,
        target=config.target,
        config=config.gate,
        batch_size=config.synthesis.batch_size,
        max_answer_tokens=config.synthesis.max_answer_tokens,
        resources=config.resources,
        run_dir=config.run_dir,
        digests={member.name: sha256_path(member.directory / STUDENT) for member in members}
        | {"source base": run.source.fingerprint, "target base": run.target.fingerprint},
    )
    template = prompt_format(load_tokenizer(config.target)).template
    failed: list[Member] = []
    for member in members:
        if not member.waits_for("gate"):
            continue
        member.state.gate, member.state.accuracy = results[member.name]
        gate = member.state.gate
        run.tracker.log(
            {"adapter/agreement": gate.agreement_student, "adapter/agreement_base": gate.agreement_base},
            adapter=member.name,
        )
        if not gate.passed:
            failed.append(member)
            continue
        try:
            publish(run, member, template)
        except BundleError as error:
            run.quarantine(member.state, f"cannot be published: {error}")
    for member in failed:
        state = member.state
        assert state.gate is not None
        if state.attempt <= config.gate.retries:
            logger.warning("%s: did not pass the gate (%s): again with more samples", member.name, state.gate.reason)
            run.send_back(member)
        else:
            state.status, state.reason = "failed_gate", state.gate.reason
            run.advance(member, "done")


def publish(run: Run, member: Member, template: str) -> None:
    """Write the migrated adapter as a bundle of the target base, ready for the next hop."""
    manifest, gate = member.bundle.manifest, member.state.gate
    assert gate is not None
    output = run.config.run_dir / "bundles" / member.name
    write_bundle(
        output,
        adapter_dir=member.directory / STUDENT,
        discriminator_dir=member.directory / DISCRIMINATOR,
        seeds=member.bundle.seeds,
        task_name=manifest.task_name,
        base=run.target,
        num_samples=member.state.num_samples,
        prompt_template=template,
        provenance={
            "migrated_from": manifest.base_name,
            "source_bundle_sha256": member.bundle.digest,
            "agreement_with_teacher": gate.agreement_student,
            "agreement_of_bare_base": gate.agreement_base,
        },
        model_card=model_card(
            member.state,
            source=run.source.name,
            target=run.target.name,
            prompt_template=template,
            before=str(manifest.provenance.get("migrated_from", "")),
        ),
    )
    member.state.output = f"bundles/{member.name}"
    member.state.status = "migrated"
    run.advance(member, "done", output)


PHASE_WORK: dict[Phase, Callable[[Run, list[Member]], None]] = {
    "synthesis": synthesis_phase,
    "distill": distill_phase,
    "gate": gate_phase,
}
"""In order. A phase gets the adapters that are worked on together, some of which may have left it already."""
