"""The gate: whether the student gives the teacher's answers on prompts held out from its training.

Also measures accuracy on real held-out data where the fleet file names some. Both are exact match after
normalising case and white space; the agreement of long answers can be that of their tokens instead.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from translora.actors.calls import Row
from translora.actors.hosts import Hosts
from translora.config import BaseModelConfig
from translora.engine.loading import load_tokenizer
from translora.gate.questions import (
    Answers,
    GateMember,
    Logliks,
    Shares,
    answer_limit,
    answer_rows,
    class_rows,
    run_answers,
    run_choices,
    run_tokens,
    token_rows,
)
from translora.gate.verdict import (
    chance_agreement,
    chance_gain,
    chance_likelihood,
    informedness,
    judge,
    mean_interval,
    share_equal,
)
from translora.run.state import Accuracy, GateResult
from translora.synthesis.quality import majority_share, num_seen

logger = logging.getLogger(__name__)


def run_gate(
    members: Sequence[GateMember],
    *,
    source: BaseModelConfig,
    target: BaseModelConfig,
    max_answer_tokens: int,
    context: int | None = None,
    hosts: Hosts,
    weights: Mapping[str, str],
) -> tuple[dict[str, tuple[GateResult, Accuracy | None]], dict[str, str]]:
    """Answer the held-out prompts with student and bare target base, all adapters in mixed batches, and judge.

    Returns the verdicts by name, and the reasons by name of those that cannot be judged. Real data whose answers cannot
    be computed leaves an adapter without an accuracy, and says so.

    Args:
        max_answer_tokens: of the teachers' answers, in tokens of the source base.
        context: tokens that the target takes, if it says so.
        weights: content hashes of the students and teachers, and identities of the bases: a rerun reuses the answers
            of the same weights only.
    """
    tokenizers = load_tokenizer(source), load_tokenizer(target)
    heldout_rows: list[Row] = []
    target_rows: list[Row] = []
    source_rows: list[Row] = []
    for member in members:
        name, student, teacher = member.name, f"student/{member.name}", f"teacher/{member.name}"
        heldout = [(row["input"], row["answer"]) for row in member.heldout]
        real = [(row["input"], row["target"]) for row in member.eval_rows]
        limits = [
            answer_limit(max_answer_tokens, *tokenizers, [answer for _, answer in samples], context)
            for samples in (heldout, real)
        ]
        for slot, gate_arm, eval_arm in ((student, "gate_student", "migrated"), (None, "gate_base", "target_base")):
            heldout_rows += answer_rows(
                name, gate_arm, heldout, slot, member.template, with_likelihood=True, limit=limits[0]
            )
            target_rows += answer_rows(name, eval_arm, real, slot, member.template, limit=limits[1])
        source_rows += answer_rows(name, "source_adapter", real, teacher, member.teacher_template, stop=member.stop)
        source_rows += answer_rows(name, "source_base", real, None, member.teacher_template)

    answers: Answers = {}
    logliks: dict[tuple[str, str], float] = {}
    faults: dict[str, str] = {}
    unmeasured: dict[str, str] = {}
    students = {f"student/{member.name}": str(member.student_dir) for member in members}
    teachers = {f"teacher/{member.name}": str(member.teacher_dir) for member in members}
    by_tokens = [one for one in members if one.config.long_answers == "tokens" and one.has_long_answers]
    by_class = [one for one in members if len(one.classes) > 1]
    where: dict[str, Any] = {"hosts": hosts, "weights": dict(weights)}
    on_target = where | {"base": target, "adapters": students}
    on_source = where | {"base": source, "adapters": teachers}
    shares: Shares = {}
    likely: Logliks = {}
    if by_tokens:
        rows = [row for one in by_tokens for row in token_rows(one, f"student/{one.name}")]
        shares = run_tokens("gate: long answers", rows, **on_target, faults=faults)
    if by_class:
        rows = [row for one in by_class for row in class_rows(one, f"student/{one.name}")]
        likely = run_choices("gate: few answers", rows, **on_target, faults=faults)
    for label, rows, place, missing in (
        ("gate: held-out prompts", heldout_rows, on_target, faults),
        ("gate: real data, target base", target_rows, on_target, unmeasured),
        ("gate: real data, source base", source_rows, on_source, unmeasured),
    ):
        if rows:
            found, means = run_answers(label, rows, max_answer_tokens=max_answer_tokens, **place, faults=missing)
            answers |= found
            logliks |= means
    for name, reason in unmeasured.items():
        logger.warning("%s: its accuracy on real data is not measured: %s", name, reason)
    sound = [
        dataclasses.replace(member, eval_rows=[]) if member.name in unmeasured else member
        for member in members
        if member.name not in faults
    ]
    return {
        member.name: _judge_member(member, answers, logliks, shares, likely.get((member.name, "student")))
        for member in sound
    }, faults


def _judge_member(
    member: GateMember,
    answers: Mapping[tuple[str, str], Sequence[str | None]],
    logliks: Mapping[tuple[str, str], float],
    shares: Shares,
    likely_NK: Sequence[Sequence[float]] | None = None,
) -> tuple[GateResult, Accuracy | None]:
    labels = [sample["answer"] for sample in member.heldout]
    student, base = answers[member.name, "gate_student"], answers[member.name, "gate_base"]
    measured = GateResult(
        num_heldout=len(labels),
        has_long_answers=member.has_long_answers,
        agreement_student=share_equal(student, labels),
        agreement_base=share_equal(base, labels),
        only_answer=member.classes[0] if len(member.classes) == 1 else None,
        informedness=informedness(student, labels) if member.classes else None,
        commonest=majority_share(labels),
        chance="agreement" if likely_NK is None else "likelihood",
        p_value=(
            chance_agreement(student, labels)
            if likely_NK is None
            else chance_likelihood(likely_NK, member.classes, labels)
        ),
        loglik_student=logliks.get((member.name, "gate_student")),
        loglik_base=logliks.get((member.name, "gate_base")),
        passed=False,
    )
    if (member.name, "student") in shares:
        right, bare, elsewhere = (shares[member.name, arm] for arm in ("student", "base", "elsewhere"))
        # A student that finds the right tokens behind the teacher's own may still come to no end by itself.
        right = [0.0 if text is None else share for text, share in zip(student, right, strict=True)]
        measured.unit, measured.commonest = "tokens", None
        measured.agreement_student, measured.agreement_base = fmean(right), fmean(bare)
        measured.agreement_interval = mean_interval(right)
        # Better than both: the greater p-value is that of the two together (an intersection-union test).
        measured.p_value = max(chance_gain(right, bare), chance_gain(right, elsewhere))
    gate = judge(measured, member.config)
    if not member.eval_rows:
        return gate, None
    targets = [row["target"] for row in member.eval_rows]
    right_shares = {
        arm: share_equal(answers[member.name, arm], targets)
        for arm in ("source_base", "source_adapter", "target_base", "migrated")
    }
    seen = num_seen(member.trained, member.eval_rows)
    return gate, Accuracy(num_items=len(targets), num_seen=seen, **right_shares)
