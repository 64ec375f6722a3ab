"""The gate: whether the student gives the teacher's answers on prompts held out from its training.

Also measures accuracy on real held-out data where the fleet file names some. Both are exact match after
normalising case and white space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from translora.config import BaseModelConfig, GateConfig, ResourceConfig
from translora.run.files import digest
from translora.run.progress import Progress
from translora.run.state import Accuracy, GateResult
from translora.synthesis.actors import Hosts, Row, cut_blocks, run_blocks
from translora.synthesis.prompts import LINE_END, normalise
from translora.synthesis.stages import gate_block


@dataclass(frozen=True)
class GateMember:
    """One migrated adapter before the gate."""

    name: str
    student_dir: Path
    teacher_dir: Path
    teacher_template: str
    heldout: list[dict[str, str]]
    """Held-out synthetic samples: `input`, and the teacher's `answer`."""
    eval_rows: list[dict[str, str]]
    """Real held-out data: `input`, `target`; empty where there is none."""
    only_answer: str | None = None
    """The teacher's answer to every synthetic sample, where it has only one."""


def share_equal(answers: Sequence[str | None], references: Sequence[str]) -> float:
    """Share of answers equal to their reference after normalisation; None is never equal."""
    pairs = zip(answers, references, strict=True)
    equal = (answer is not None and normalise(answer) == normalise(reference) for answer, reference in pairs)
    return sum(equal) / len(references)


def judge(
    agreement_student: float,
    agreement_base: float,
    num_heldout: int,
    config: GateConfig,
    *,
    only_answer: str | None = None,
    logliks: tuple[float | None, float | None] = (None, None),
) -> GateResult:
    """The verdict on one adapter: enough agreement, and enough of it beyond the bare target base's.

    Args:
        only_answer: what the teacher answers to every sample, if it has one answer only. Agreement with it is no sign
            that anything but that answer was learnt, and the adapter does not pass.
        logliks: mean log-likelihood of a token of the teacher's answers under student and bare base.
    """
    reasons = []
    if only_answer is not None:
        reasons.append(
            f"the teacher answers {only_answer!r} to every sample, so agreement says nothing; "
            "ship seeds of every answer"
        )
    if agreement_student < config.min_agreement:
        reasons.append(f"agreement {agreement_student:.2f} < gate.min_agreement {config.min_agreement:.2f}")
    if agreement_student - agreement_base < config.min_gain:
        gain = agreement_student - agreement_base
        reasons.append(f"gain over the target base {gain:+.2f} < gate.min_gain {config.min_gain:+.2f}")
    return GateResult(
        num_heldout=num_heldout,
        agreement_student=agreement_student,
        agreement_base=agreement_base,
        loglik_student=logliks[0],
        loglik_base=logliks[1],
        passed=not reasons,
        reason="; ".join(reasons),
    )


def _rows(member: GateMember, slot: str | None, arm: str, template: str) -> list[Row]:
    samples, is_gate = [(row["input"], row["answer"]) for row in member.heldout], arm.startswith("gate")
    if not is_gate:
        samples = [(row["input"], row["target"]) for row in member.eval_rows]
    # A bare base does not know where to stop: where all answers are one line, its first line is its answer. An
    # adapter has learnt to stop; one that runs on is wrong.
    one_line = all("\n" not in answer.strip() for _, answer in samples)
    common = {"adapter": member.name, "arm": arm, "slot": slot, "template": template}
    stop = LINE_END if slot is None and one_line else None
    return [
        {**common, "index": index, "input": text, "stop": stop, "reference": answer if is_gate else None}
        for index, (text, answer) in enumerate(samples)
    ]


def _mean_logliks(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Mean log-likelihood of the references by (adapter, arm), of the arms that have references."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["loglik"] is not None:
            found.setdefault((row["adapter"], row["arm"]), []).append(row["loglik"])
    return {key: sum(values) / len(values) for key, values in found.items()}


def _answers(rows: Sequence[Row]) -> dict[tuple[str, str], list[str | None]]:
    """Answers by (adapter, arm), in the order of the inputs; None for one that did not end."""
    found: dict[tuple[str, str], list[str | None]] = {}
    for row in sorted(rows, key=lambda row: (row["adapter"], row["arm"], row["index"])):
        answer = row["answer"] if row["finished"] else None
        found.setdefault((row["adapter"], row["arm"]), []).append(answer)
    return found


def run_gate(
    members: Sequence[GateMember],
    *,
    source: BaseModelConfig,
    target: BaseModelConfig,
    config: GateConfig,
    batch_size: int,
    max_answer_tokens: int,
    resources: ResourceConfig,
    run_dir: Path,
    digests: Mapping[str, str],
) -> dict[str, tuple[GateResult, Accuracy | None]]:
    """Answer the held-out prompts with student and bare target base, all adapters in mixed batches, and judge.

    Args:
        digests: content hashes of the students and fingerprints of the bases: a rerun reuses the answers of the same
            weights only.
    """
    target_rows: list[Row] = []
    source_rows: list[Row] = []
    for member in members:
        for slot, gate_arm, eval_arm in (
            (f"student/{member.name}", "gate_student", "migrated"),
            (None, "gate_base", "target_base"),
        ):
            target_rows += _rows(member, slot, gate_arm, "auto") + _rows(member, slot, eval_arm, "auto")
        for slot, arm in ((f"teacher/{member.name}", "source_adapter"), (None, "source_base")):
            source_rows += _rows(member, slot, arm, member.teacher_template)

    answers: dict[tuple[str, str], list[str | None]] = {}
    logliks: dict[tuple[str, str], float] = {}
    settings = {"max_answer_tokens": max_answer_tokens}
    students = {f"student/{member.name}": str(member.student_dir) for member in members}
    teachers = {f"teacher/{member.name}": str(member.teacher_dir) for member in members}
    with Hosts(resources) as hosts:
        for label, base, adapters, rows in (
            ("gate: target base", target, students, target_rows),
            ("gate: source base", source, teachers, source_rows),
        ):
            if not rows:
                continue
            blocks = cut_blocks(rows, batch_size, lambda row: len(row["input"]))
            key = digest(blocks, settings, base.model_dump(), dict(digests))
            with Progress(label, len(rows)) as progress:
                computed = run_blocks(
                    blocks,
                    gate_block,
                    base=base,
                    adapters=adapters,
                    settings=settings,
                    hosts=hosts,
                    directory=run_dir / "gate" / key,
                    on_block=progress.fraction,
                )
            answers |= _answers(computed)
            logliks |= _mean_logliks(computed)
    return {member.name: _judge_member(member, answers, logliks, config) for member in members}


def _judge_member(
    member: GateMember,
    answers: Mapping[tuple[str, str], list[str | None]],
    logliks: Mapping[tuple[str, str], float],
    config: GateConfig,
) -> tuple[GateResult, Accuracy | None]:
    labels = [sample["answer"] for sample in member.heldout]
    gate = judge(
        share_equal(answers[member.name, "gate_student"], labels),
        share_equal(answers[member.name, "gate_base"], labels),
        len(labels),
        config,
        only_answer=member.only_answer,
        logliks=(logliks.get((member.name, "gate_student")), logliks.get((member.name, "gate_base"))),
    )
    if not member.eval_rows:
        return gate, None
    targets = [row["target"] for row in member.eval_rows]
    shares = {
        arm: share_equal(answers[member.name, arm], targets)
        for arm in ("source_base", "source_adapter", "target_base", "migrated")
    }
    return gate, Accuracy(num_items=len(targets), **shares)
