"""The phase of a fleet that judges every student and publishes those that pass as bundles of the target base."""

from __future__ import annotations

import logging

from translora.actors.hosts import Hosts
from translora.bundle import BundleError, write_bundle
from translora.bundle.manifest import DiscriminatorQuality
from translora.distill.phase import discriminator_inputs, student_start
from translora.engine.loading import load_tokenizer
from translora.engine.prompts import prompt_format
from translora.gate.agreement import run_gate
from translora.gate.questions import GateMember
from translora.report.card import Began, model_card
from translora.run.check import context_of
from translora.run.files import remove_directory
from translora.run.member import Member, Run, relative_to
from translora.run.state import BUNDLES, DISCRIMINATOR, STUDENT
from translora.synthesis.discriminator import Judge, measure

logger = logging.getLogger(__name__)


def gate_phase(run: Run, members: list[Member]) -> None:
    """Judge every student on its held-out prompts; what passes becomes a bundle of the target base."""
    config = run.config
    gate_members = [
        GateMember(
            name=member.name,
            student_dir=member.directory / STUDENT,
            teacher_dir=member.bundle.path,
            template=member.template(config),
            teacher_template=member.bundle.manifest.prompt_template,
            heldout=member.samples("heldout"),
            eval_rows=member.eval_rows,
            classes=list(member.state.synthesis.classes),
            config=config.gate_of(member.entry),
            trained=trained_inputs(run, member),
            stop=member.entry.stop,
        )
        for member in members
    ]
    bases = {"source base": run.source.identity, "target base": run.target.identity}
    teachers = {f"teacher/{member.name}": member.bundle.digest for member in members}
    leaving = [member for member in members if member.state.has_discriminator]
    with Hosts(config.resources, config.run_dir, config.synthesis.batch_size) as hosts:
        qualities = measure(
            judges(run, leaving),
            base=config.target,
            hosts=hosts,
            weights=artifacts(run, leaving, DISCRIMINATOR) | bases,
        )
        results, faults = run_gate(
            gate_members,
            source=config.source,
            target=config.target,
            max_answer_tokens=config.synthesis.max_answer_tokens,
            context=context_of(config.target, run.target),
            hosts=hosts,
            weights=artifacts(run, members, STUDENT) | bases | teachers,
        )
    failed: list[Member] = []
    for member in members:
        if not member.waits_for("gate"):
            continue
        if member.name in faults:
            run.quarantine(member.state, faults[member.name])
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
            publish(run, member, qualities.get(member.name))
        except BundleError as error:
            run.quarantine(member.state, f"cannot be published: {error}")
    for member in failed:
        fail(run, member)


def fail(run: Run, member: Member) -> None:
    """Another attempt from more samples, where there is one left and those of the last one helped; else the end."""
    state = member.state
    assert state.gate is not None
    reason, agreement, before = state.gate.reason, state.gate.agreement_student, state.earlier_agreement
    is_low = state.gate.min_agreement is None or agreement < state.gate.min_agreement
    if run.config.stays_copy(member.entry):
        reason += "; it is a copy of its source adapter, which more samples do not change: give it epochs of its own"
    elif before is not None and is_low and agreement <= before:
        reason += f"; more samples do not help: agreement {agreement:.2f} after {before:.2f}"
    elif state.attempt <= run.config.gate.retries:
        logger.warning("%s: did not pass the gate (%s): again with more samples", member.name, reason)
        run.send_back(member)
        return
    state.status, state.reason = "failed_gate", reason
    remove_directory(run.config.run_dir / BUNDLES / member.name)  # of an earlier run, with other settings
    run.advance(member, "done")


def trained_inputs(run: Run, member: Member) -> list[str]:
    """What a student was trained on, where it is compared with real data; a copy was trained on nothing."""
    if not member.eval_rows or run.config.stays_copy(member.entry):
        return []
    return [row["input"] for row in member.samples("train")]


def artifacts(run: Run, members: list[Member], kind: str) -> dict[str, str]:
    """Hashes of the members' students or discriminators."""
    return {
        member.name: member.state.artifacts[relative_to(run.config.run_dir, member.directory / kind)]
        for member in members
    }


def judges(run: Run, members: list[Member]) -> dict[str, Judge]:
    """The next hop's discriminators of these members for which inputs were held out."""
    found = {}
    for member in members:
        _, unseen = discriminator_inputs(run, member)
        if unseen is not None:
            template = member.template(run.config)
            found[member.name] = Judge(member.directory / DISCRIMINATOR, member.state.task_name, template, unseen)
    return found


def publish(run: Run, member: Member, quality: DiscriminatorQuality | None) -> None:
    """Write the migrated adapter as a bundle of the target base, ready for the next hop."""
    manifest, gate = member.bundle.manifest, member.state.gate
    assert gate is not None
    prompts = prompt_format(load_tokenizer(run.config.target), member.template(run.config))
    start = student_start(run, member.bundle.path).path
    began: Began = "fresh" if start is None else "copy" if run.config.stays_copy(member.entry) else "warm"
    output = run.config.run_dir / "bundles" / member.name
    write_bundle(
        output,
        adapter_dir=member.directory / STUDENT,
        discriminator_dir=member.directory / DISCRIMINATOR if member.state.has_discriminator else None,
        seeds=member.bundle.seeds,
        task_name=manifest.task_name,
        base=run.target,
        num_samples=member.state.num_samples,
        prompt_template=prompts.template,
        discriminator_quality=quality,
        provenance={
            "migrated_from": manifest.base_name,
            "source_bundle_sha256": member.bundle.digest,
            "agreement_with_teacher": gate.agreement_student,
            "agreement_of_bare_base": gate.agreement_base,
            **({"began_as": "the source adapter"} if start is not None else {}),
        },
        model_card=model_card(
            member.state,
            source=run.source.name,
            target=run.target.name,
            prompt_template=prompts.template,
            holds_bos=prompts.holds_bos,
            before=str(manifest.provenance.get("migrated_from", "")),
            method=run.config.distill.method,
            began=began,
        ),
    )
    member.state.output = f"bundles/{member.name}"
    member.state.status = "migrated"
    run.advance(member, "done", output)
