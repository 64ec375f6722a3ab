"""The gate: whether the student gives the teacher's answers on prompts held out from its training.

Also measures accuracy on real held-out data where the fleet file names some. Both are exact match after
normalising case and white space; the agreement of long answers can be that of their tokens instead.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from translora.config import BaseModelConfig, GateConfig
from translora.gate.verdict import chance_agreement, chance_gain, chance_likelihood, informedness, judge, share_equal
from translora.run.state import Accuracy, GateResult
from translora.synthesis.actors import Hosts, run_rows
from translora.synthesis.calls import Row
from translora.synthesis.prompts import LINE_END, answer_stop
from translora.synthesis.quality import majority_share, num_seen
from translora.synthesis.stages import choice_block, gate_block, token_block

logger = logging.getLogger(__name__)
Answers = dict[tuple[str, str], list[str | None]]
"""By name and arm, in the order of the samples; None for one that did not end."""
Shares = dict[tuple[str, str], list[float]]
"""By name and arm, in the order of the samples: the share of the teacher's tokens that the arm finds likeliest."""
Logliks = dict[tuple[str, str], list[list[float]]]
"""By name and arm, in the order of the samples: log-likelihoods of each one's choices."""
LONG = 80
"""Characters of a long answer: a student seldom writes so many as its teacher does, to the letter."""


@dataclass(frozen=True)
class GateMember:
    """One migrated adapter before the gate."""

    name: str
    student_dir: Path
    teacher_dir: Path
    template: str
    """The student's prompt template, and the teacher's."""
    teacher_template: str
    heldout: list[dict[str, str]]
    """Held-out synthetic samples: `input`, and the teacher's `answer`."""
    eval_rows: list[dict[str, str]]
    """Real held-out data: `input`, `target`; empty where there is none."""
    classes: Sequence[str] = ()
    """The teacher's different answers to the synthetic samples, where they are few; empty for free text."""
    config: GateConfig = field(default_factory=GateConfig)
    """Its own thresholds."""
    trained: Sequence[str] = ()
    """The synthetic inputs that the student was trained on."""
    stop: str | None = None
    """Where its teacher's answers end, if the teacher does not end them itself."""

    @property
    def has_long_answers(self) -> bool:
        """Whether half of the teacher's answers are LONG."""
        return not self.classes and median(len(row["answer"]) for row in self.heldout) >= LONG


def answer_rows(
    name: str,
    arm: str,
    samples: Sequence[tuple[str, str]],
    slot: str | None,
    template: str,
    *,
    with_likelihood: bool = False,
    stop: str | None = None,
) -> list[Row]:
    """Rows of `gate_block` for one arm: samples are (input, reference), slot None is the bare base.

    `with_likelihood` asks for the references' log-likelihood under the arm, too. `stop` is a text at which the arm's
    answers end.
    """
    # A bare base does not know where to stop: where all answers are one line, its first line is its answer. An
    # adapter has learnt to stop; one that runs on is wrong.
    one_line = all("\n" not in reference.strip() for _, reference in samples)
    common = {"adapter": name, "arm": arm, "slot": slot, "template": template, "cut": False}
    end = LINE_END if slot is None and one_line else answer_stop(stop)
    return [
        {**common, "index": index, "input": text, "stop": end, "reference": reference if with_likelihood else None}
        for index, (text, reference) in enumerate(samples)
    ]


def by_arm(rows: Sequence[Row], key: str) -> dict[tuple[str, str], list[Any]]:
    """What rows have under a key, by (adapter, arm), in the order of the samples; those that have None are left out."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in sorted(rows, key=lambda row: (row["adapter"], row["arm"], row["index"])):
        if row[key] is not None:
            found.setdefault((row["adapter"], row["arm"]), []).append(row[key])
    return found


def run_answers(
    label: str,
    rows: Sequence[Row],
    *,
    base: BaseModelConfig,
    adapters: Mapping[str, str],
    batch_size: int,
    max_answer_tokens: int,
    hosts: Hosts,
    run_dir: Path,
    digests: Mapping[str, str],
    faults: dict[str, str] | None = None,
) -> tuple[Answers, dict[tuple[str, str], float]]:
    """Answer the rows of `answer_rows` on one base, all arms in mixed batches.

    An answer that did not end is None, but for rows that say `cut`: theirs is what there is.

    Args:
        label: of the progress.
        run_dir: finished blocks go to its `gate`.
        adapters: PEFT directory by slot.
        digests: content hashes of adapters and bases: answers of the same weights alone are used again.
        faults: gets the reason by name of those that cannot be answered for, as in `run_rows`.

    Returns:
        Answers by (name, arm), in the order of the samples, and the mean log-likelihood of a token of the references
        of the arms that ask for it.
    """
    computed = run_rows(
        label,
        rows,
        gate_block,
        base=base,
        hosts=hosts,
        batch_size=batch_size,
        run_dir=run_dir,
        place="gate/answers",
        weights=dict(digests),
        adapters=adapters,
        settings={"max_answer_tokens": max_answer_tokens},
        faults=faults,
    )
    found: Answers = {}
    for row in sorted(computed, key=lambda row: (row["adapter"], row["arm"], row["index"])):
        text = row["answer"] if row["finished"] or row["cut"] else None
        found.setdefault((row["adapter"], row["arm"]), []).append(text)
    return found, {arm: fmean(values) for arm, values in by_arm(computed, "loglik").items()}


def class_rows(member: GateMember, slot: str) -> list[Row]:
    """Rows of `choice_block`: how likely the student finds each of the teacher's few answers."""
    common: Row = {"adapter": member.name, "arm": "student", "slot": slot, "template": member.template}
    common["choices"] = list(member.classes)
    return [{**common, "index": index, "input": row["input"]} for index, row in enumerate(member.heldout)]


def run_choices(label: str, rows: Sequence[Row], **where: Any) -> Logliks:
    """Rate the choices of `choice_block`'s rows; `where` are arguments of `run_rows`."""
    return by_arm(run_rows(f"{label}: choices", rows, choice_block, place="gate/choices", **where), "logliks")


def token_rows(member: GateMember, slot: str) -> list[Row]:
    """Rows of `token_block`: the student, the bare target base, and the student with the inputs of other samples."""
    inputs, answers = ([row[key] for row in member.heldout] for key in ("input", "answer"))
    arms = (("student", slot, inputs), ("base", None, inputs), ("elsewhere", slot, [*inputs[1:], inputs[0]]))
    common: Row = {"adapter": member.name, "template": member.template}
    return [
        {**common, "arm": arm, "slot": own, "index": index, "input": x, "answer": y}
        for arm, own, texts in arms
        for index, (x, y) in enumerate(zip(texts, answers, strict=True))
    ]


def run_tokens(label: str, rows: Sequence[Row], **where: Any) -> Shares:
    """Compute `token_rows`; `where` are arguments of `run_rows`."""
    return by_arm(run_rows(f"{label}: tokens", rows, token_block, place="gate/tokens", **where), "agreed")


def run_gate(
    members: Sequence[GateMember],
    *,
    source: BaseModelConfig,
    target: BaseModelConfig,
    batch_size: int,
    max_answer_tokens: int,
    hosts: Hosts,
    run_dir: Path,
    digests: Mapping[str, str],
) -> tuple[dict[str, tuple[GateResult, Accuracy | None]], dict[str, str]]:
    """Answer the held-out prompts with student and bare target base, all adapters in mixed batches, and judge.

    Returns the verdicts by name, and the reasons by name of those that cannot be judged. Real data whose answers cannot
    be computed leaves an adapter without an accuracy, and says so.

    Args:
        digests: content hashes of the students and teachers, and fingerprints of the bases: a rerun reuses the answers
            of the same weights only.
    """
    heldout_rows: list[Row] = []
    target_rows: list[Row] = []
    source_rows: list[Row] = []
    for member in members:
        name, student, teacher = member.name, f"student/{member.name}", f"teacher/{member.name}"
        heldout = [(row["input"], row["answer"]) for row in member.heldout]
        real = [(row["input"], row["target"]) for row in member.eval_rows]
        for slot, gate_arm, eval_arm in ((student, "gate_student", "migrated"), (None, "gate_base", "target_base")):
            heldout_rows += answer_rows(name, gate_arm, heldout, slot, member.template, with_likelihood=True)
            target_rows += answer_rows(name, eval_arm, real, slot, member.template)
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
    where: dict[str, Any] = {
        "base": target,
        "adapters": students,
        "batch_size": batch_size,
        "hosts": hosts,
        "run_dir": run_dir,
        "weights": dict(digests),
        "faults": faults,
    }
    shares: Shares = {}
    likely: Logliks = {}
    if by_tokens:
        rows = [row for one in by_tokens for row in token_rows(one, f"student/{one.name}")]
        shares = run_tokens("gate: long answers", rows, **where)
    if by_class:
        rows = [row for one in by_class for row in class_rows(one, f"student/{one.name}")]
        likely = run_choices("gate: few answers", rows, **where)
    for label, base, adapters, rows, missing in (
        ("gate: held-out prompts", target, students, heldout_rows, faults),
        ("gate: real data, target base", target, students, target_rows, unmeasured),
        ("gate: real data, source base", source, teachers, source_rows, unmeasured),
    ):
        if not rows:
            continue
        found, means = run_answers(
            label,
            rows,
            base=base,
            adapters=adapters,
            batch_size=batch_size,
            max_answer_tokens=max_answer_tokens,
            hosts=hosts,
            run_dir=run_dir,
            digests=digests,
            faults=missing,
        )
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
