"""The phase of a fleet that trains every adapter's student, and discriminators for the next hop."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from translora.bundle.adapter import is_in_bank
from translora.bundle.modules import linear_modules
from translora.distill.data import num_too_long
from translora.distill.job import TrainJob, make_job
from translora.distill.launch import train_adapters
from translora.distill.teacher import Teacher, ask_teachers
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.lora.peft_io import read_lora
from translora.lora.targets import resolve_targets
from translora.lora.warm_start import not_copied
from translora.run.files import derive_seed
from translora.run.member import Member, Run
from translora.run.state import DISCRIMINATOR, STUDENT, is_against
from translora.synthesis.discriminator import Inputs, discriminator_rows, hold_out

logger = logging.getLogger(__name__)
SAVE_EVERY_SECONDS = 2.0


def discriminator_inputs(run: Run, member: Member) -> tuple[Inputs, Inputs | None]:
    """What the next hop's discriminator is trained on, and what it is measured on: for and against the screen's score.

    What was kept of a surplus, or left out of it, in spite of its score is neither.
    """
    chosen = [row for split in ("train", "heldout") for row in member.samples(split)]
    kept = [row["input"] for row in chosen if not is_against(row["score"])]
    others = [row["input"] for row in member.samples("refused") if is_against(row["score"])]
    return hold_out(Inputs(kept, others), derive_seed(run.config.seed, member.name, DISCRIMINATOR))


def train_jobs(run: Run, member: Member, teacher: Sequence[Teacher] | None) -> list[TrainJob]:
    """The trainings of an adapter on the target base: its student, and a discriminator if it leaves one.

    Args:
        teacher: what it thinks of each training sample, where the loss needs it.
    """
    config, directory, entry = run.config, member.directory, member.entry
    answers: list[dict[str, Any]] = [
        {"input": row["input"], "answer": row["answer"]} for row in member.samples("train")
    ]
    for row, thought in zip(answers, teacher or (), strict=teacher is not None):
        row["teacher"] = thought
    common: dict[str, Any] = {"root_seed": config.seed, "template": member.template(config)}
    student = make_job(
        member.name,
        STUDENT,
        answers,
        config.training_of(entry),
        output=directory / STUDENT,
        work_dir=directory / "train" / STUDENT,
        with_end=True,
        peft=config.distill.peft,
        start=warm_start(run, member),
        **common,
    )
    if not member.state.synthesis.leaves_discriminator:
        return [student]
    known, _ = discriminator_inputs(run, member)
    if not known.real:
        return [student]
    seed = derive_seed(config.seed, member.name, DISCRIMINATOR)
    return [
        student,
        make_job(
            member.name,
            DISCRIMINATOR,
            discriminator_rows(known, member.state.task_name, config.discriminator.max_samples, seed),
            config.discriminator,
            output=directory / DISCRIMINATOR,
            work_dir=directory / "train" / DISCRIMINATOR,
            with_end=False,
            **common,
        ),
    ]


def warm_start(run: Run, member: Member) -> Path | None:
    """The adapter that a student begins as, where the settings ask for it and there is one; says what gets lost."""
    start = student_start(run, member.bundle.path)
    if start.remark:
        logger.warning("%s: %s", member.name, start.remark)
    return start.path


class Start(NamedTuple):
    """What a student begins as."""

    path: Path | None = None
    """The adapter's directory; None where the student begins anew."""
    remark: str = ""
    """What gets lost of it."""
    rank: int = 0
    """The highest of the modules that both adapt."""
    lost: Sequence[str] = ()
    """Ends of the names of modules that the adapter has and the student has not."""


def student_start(run: Run, path: Path) -> Start:
    """What the student of the bundle at `path` begins as."""
    settings = run.config.distill
    if not settings.warm_start:
        return Start()
    if not is_in_bank(path):
        return Start(remark="is no plain LoRA: its student begins without it")
    source = read_lora(path)
    own = resolve_targets(linear_modules(run.target), settings.lora.target_modules, run.target.name, "distill.lora")
    copied = source.modules.keys() & set(own)
    if not copied:
        return Start(remark="adapts none of the student's modules: its student begins without it")
    rank = max(len(source.modules[name][0]) for name in copied)
    remarks, lost = [], not_copied(source, own)
    if lost:
        names = ", ".join(lost)
        remarks = [f"adapts {names}, which distill.lora.target_modules does not: its student begins without these"]
    if rank > settings.lora.rank:
        remarks.append(f"has rank {rank}, of which its student begins with {settings.lora.rank}")
    return Start(path, "; ".join(remarks), rank, lost)


def distill_phase(run: Run, members: list[Member]) -> None:
    """Train all students, and what discriminators they leave, on one worker group that holds the target base."""
    config = run.config
    waiting = [member for member in members if member.waits_for("distill")]
    for member in waiting:
        member.state.training_warnings = []
    teachers = ask_teachers(run, members)  # of the whole cohort: a rerun finds the same batches again
    members = [member for member in waiting if member.waits_for("distill")]
    tokenizer = load_tokenizer(config.target)
    for member in (one for one in members if not config.stays_copy(one.entry)):
        rows = [(row["input"], row["answer"]) for row in member.samples("train")]
        prompts = prompt_format(tokenizer, member.template(config))
        member.state.synthesis.num_too_long = num_too_long(rows, prompts, config.distill.max_length)
    for member in members:
        counts = [len(one["probabilities"]) for one in teachers.get(member.name, ()) if "probabilities" in one]
        member.state.answers_per_sample = round(fmean(counts), 2) if counts else None
    by_name = {member.name: member for member in members}
    jobs = [job for member in members for job in train_jobs(run, member, teachers.get(member.name))]
    last_saved = 0.0

    def on_step(job: TrainJob, row: dict[str, float]) -> None:
        nonlocal last_saved
        step, total = int(row["step"]), int(row["num_steps"])
        metrics = {f"loss/{job.kind}": row["loss"], "time/train_seconds": row["seconds"]}
        run.tracker.log(metrics, step=step, adapter=job.owner)
        if job.kind == STUDENT:
            state = by_name[job.owner].state
            state.step, state.num_steps = step, total
            if time.monotonic() - last_saved > SAVE_EVERY_SECONDS or step == total:
                last_saved = time.monotonic()
                run.save(state)

    train_adapters(
        config.target,
        run.target.name,
        jobs,
        config.distill,
        config.resources,
        config.run_dir,
        label="distill",
        on_step=on_step,
    )
    for member in members:
        own = {job.kind: job.failure() for job in jobs if job.owner == member.name}
        if (reason := own[STUDENT]) is not None:
            run.quarantine(member.state, reason)
            continue
        if (reason := own.get(DISCRIMINATOR)) is not None:
            member.warn(f"the discriminator for the next hop could not be trained ({reason}): it is left out")
        member.state.losses = json.loads((member.directory / STUDENT / "losses.json").read_text())
        member.state.step = member.state.num_steps = len(member.state.losses)
        run.advance(member, "gate", *(member.directory / kind for kind, reason in own.items() if reason is None))
