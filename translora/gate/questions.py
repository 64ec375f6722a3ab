"""What the gate and the evaluation ask students, teachers and bare bases: answers, likelihoods, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from translora.actors.blocks import choice_block, gate_block, token_block
from translora.actors.calls import Row
from translora.actors.rows import run_rows
from translora.config import GateConfig
from translora.synthesis.prompts import LINE_END, answer_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    limit: int | None = None,
) -> list[Row]:
    """Rows of `gate_block` for one arm: samples are (input, reference), slot None is the bare base.

    `with_likelihood` asks for the references' log-likelihood under the arm, too. `stop` is a text at which the arm's
    answers end, `limit` the tokens that they may have where it is not max_answer_tokens.
    """
    # A bare base does not know where to stop: where all answers are one line, its first line is its answer. An
    # adapter has learnt to stop; one that runs on is wrong.
    one_line = all("\n" not in reference.strip() for _, reference in samples)
    common: Row = {"adapter": name, "arm": arm, "slot": slot, "template": template, "cut": False}
    common |= {} if limit is None else {"limit": limit}
    end = LINE_END if slot is None and one_line else answer_stop(stop)
    return [
        {**common, "index": index, "input": text, "stop": end, "reference": reference if with_likelihood else None}
        for index, (text, reference) in enumerate(samples)
    ]


def answer_limit(
    least: int,
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    answers: Sequence[str],
    context: int | None,
) -> int | None:
    """Tokens that an adapter's answers may have on the target base, where `least` would not do; else None.

    `synthesis.max_answer_tokens` is counted on the source base, and tokenizers cut one text into more tokens or fewer.
    An answer has room on the target where it, and its end, had room on the source.

    Args:
        source, target: the bases' tokenizers.
        answers: expected ones.
        context: tokens that the target takes, None where nothing is said: half of it is left to the inputs.
    """
    fitting = [text for text in set(answers) if len(source(text, add_special_tokens=False)["input_ids"]) < least]
    longest = max((len(target(text, add_special_tokens=False)["input_ids"]) + 1 for text in fitting), default=0)
    limit = longest if context is None else min(longest, context // 2)
    return limit if limit > least else None


def by_arm(rows: Sequence[Row], key: str) -> dict[tuple[str, str], list[Any]]:
    """What rows have under a key, by (adapter, arm), in the order of the samples; those that have None are left out."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in sorted(rows, key=lambda row: (row["adapter"], row["arm"], row["index"])):
        if row[key] is not None:
            found.setdefault((row["adapter"], row["arm"]), []).append(row[key])
    return found


def run_answers(
    label: str, rows: Sequence[Row], *, max_answer_tokens: int, **where: Any
) -> tuple[Answers, dict[tuple[str, str], float]]:
    """Answer the rows of `answer_rows`, all arms in mixed batches; `where` are arguments of `run_rows`.

    An answer that did not end is None, but for rows that say `cut`: theirs is what there is.

    Returns:
        Answers by (name, arm), in the order of the samples, and the mean log-likelihood of a token of the references
        of the arms that ask for it.
    """
    settings = {"max_answer_tokens": max_answer_tokens}
    computed = run_rows(label, rows, gate_block, place="gate/answers", settings=settings, **where)
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
