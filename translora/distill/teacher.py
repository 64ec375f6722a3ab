"""What the teachers think of their answers, for students that need it.

For `distill.loss: auto` how likely they find each of their answers, where these are few; for `kl` their probabilities
token by token, K of them and no whole vocabulary; for `distill.token_share` how much more likely a token is with the
adapter than without (TiTok). All are computed once, for the samples of the set.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, TypedDict

from transformers import PreTrainedTokenizerBase

from translora.actors.blocks import likelihood_block, teach_block
from translora.actors.calls import Row
from translora.actors.hosts import Hosts
from translora.actors.rows import run_rows
from translora.errors import InputError
from translora.run.member import Member, Run
from translora.run.state import SYNTHETIC
from translora.synthesis.prompts import normalise

if TYPE_CHECKING:
    from translora.actors.host import BlockFunction

logger = logging.getLogger(__name__)
MIN_PROBABILITY = 0.01
"""Of an answer that a student learns: each costs as much as a sample."""
MIN_MASS = 0.5
"""Probability of all answers to a sample together: a teacher that gives them less writes them otherwise."""


class Teacher(TypedDict, total=False):
    """What a teacher thinks of one sample, whose answer has A tokens; what the loss needs of it."""

    probabilities: dict[str, float]
    """Soft labels: of each of its answers."""
    answer_ids: list[int]
    """kl: A of them."""
    tokens: list[list[int]]
    """kl: the likeliest ones, [A, K]."""
    log_p: list[list[float]]
    """kl: their log-probabilities, [A, K]."""
    spans: list[list[int]]
    """token_share: the first character of each token and the one behind the last, [A, 2]."""
    excess: list[float]
    """token_share: how much likelier it is with the adapter than without, [A]."""


def check_vocabularies(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
    """Probabilities can be compared token by token if a token is the same text in both bases.

    Raises:
        InputError: it is not.
    """
    if source.get_vocab() != target.get_vocab():
        raise InputError(
            "distill.loss: kl compares token by token, and the bases have different vocabularies; use auto"
        )


def ask_teachers(run: Run, members: Sequence[Member]) -> dict[str, list[Teacher]]:
    """What the teachers think of their answers to the training samples, by adapter, in the samples' order.

    Nobody is asked where the training needs no answer. An adapter whose rows cannot be computed is missing from the
    result: it is trained with sft where soft labels were to be had, and quarantined where the loss needs a teacher.
    """
    train = run.config.distill
    members = [member for member in members if (member.directory / SYNTHETIC).is_file()]
    members = [member for member in members if not run.config.stays_copy(member.entry)]
    if train.loss == "auto" and train.token_share == 1:  # chosen tokens are those of one answer
        return ask_for_soft_labels(run, [member for member in members if has_few_answers(member)])
    if train.loss != "kl" and train.token_share == 1:
        return {}
    rows = [row for member in members for row in answer_rows(member)]
    settings = {"top_k": train.kl_top_k if train.loss == "kl" else None, "excess": train.token_share < 1}
    found, faults = ask(run, members, rows, teach_block, "teach", settings)
    for member in members:
        if member.name in faults and member.waits_for("distill"):
            run.quarantine(member.state, faults[member.name])
    return {name: [row["teacher"] for row in own] for name, own in found.items()}


def has_few_answers(member: Member) -> bool:
    """Whether a teacher has several answers that exclude each other, as those do not whose end is not known."""
    return len(member.state.synthesis.classes) > 1 and member.entry.stop is None


def answer_rows(member: Member) -> list[Row]:
    """The training samples, each with its teacher's answer."""
    template = member.bundle.manifest.prompt_template
    common = {"adapter": member.name, "slot": member.name, "template": template}
    return [
        {**common, "index": index, "input": row["input"], "answer": row["answer"]}
        for index, row in enumerate(member.samples("train"))
    ]


def ask_for_soft_labels(run: Run, members: Sequence[Member]) -> dict[str, list[Teacher]]:
    """How likely each teacher finds, for each sample, all answers that it gave to any.

    Sequence-level distillation (Kim and Rush, arXiv 1606.07947) with the teacher's own distribution over its answers.
    """
    rows = [
        {**row, "answer": text, "given": text == row["answer"]}
        for member in members
        for row in answer_rows(member)
        for text in possible_answers(row["answer"], member.state.synthesis.classes)
    ]
    found, faults = ask(run, members, rows, likelihood_block, "soft-labels", {})
    labels, reasons = {}, {name: f"its teacher cannot be asked ({fault})" for name, fault in faults.items()}
    for name, own in found.items():
        try:
            labels[name] = soft_labels(own)
        except NoSoftLabelsError as error:
            reasons[name] = str(error)
    for member in members:
        if member.name in reasons and member.waits_for("distill"):
            member.warn(f"trained without soft labels, with sft: {reasons[member.name]}")
    return labels


class NoSoftLabelsError(Exception):
    """Why a teacher's probabilities cannot be had."""


def soft_labels(rows: Sequence[Row]) -> list[Teacher]:
    """The probabilities of each sample's answers.

    Args:
        rows: an adapter's, of `likelihood_block`, in the samples' order.

    Raises:
        NoSoftLabelsError: the teacher does not write its answers as it was asked for them.
    """
    samples: dict[int, list[Row]] = {}
    for row in rows:
        samples.setdefault(row["index"], []).append(row)
    middle = median(mass(answers) for answers in samples.values())
    if not middle >= MIN_MASS:
        raise NoSoftLabelsError(
            f"its teacher gives all of its answers together a probability of {100 * middle:.0f} %, as if it wrote or "
            "ended them otherwise; compare its prompt template with the one it was trained with"
        )
    return [{"probabilities": probabilities(answers)} for answers in samples.values()]


def mass(answers: Sequence[Row]) -> float:
    """Probability that a teacher gives all answers to a sample together; 0 where it is not a number."""
    found = sum(math.exp(row["loglik"]) for row in answers)
    return 0.0 if math.isnan(found) else found


def possible_answers(given: str, classes: Iterable[str]) -> list[str]:
    """The answer that was given, as it was spelled, and all others."""
    return [given, *(text for text in classes if normalise(text) != normalise(given))]


def probabilities(answers: Sequence[Row]) -> dict[str, float]:
    """The teacher's distribution over its likely answers to a sample, the one that it gave always among them.

    That one alone where the likelihoods do not tell of what it wrote: where they find all answers unlikely, or the one
    that it wrote. Rounded, so that a batch of other neighbours, whose last bits differ, makes no other student.

    Args:
        answers: rows of `likelihood_block`, with `given`: whether it is the teacher's own.
    """
    given_first = sorted(answers, key=lambda row: (not row["given"], row["answer"]))
    total, given = mass(answers), given_first[0]["answer"]
    kept = {
        row["answer"]: math.exp(row["loglik"])
        for row in given_first
        if math.exp(row["loglik"]) >= MIN_PROBABILITY * total
    }
    if total < MIN_MASS or given not in kept:
        return {given: 1.0}
    return {text: round(value / sum(kept.values()), 4) for text, value in kept.items()}


def ask(
    run: Run, members: Sequence[Member], rows: Sequence[Row], function: BlockFunction, place: str, settings: Any
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Compute rows on the source base: what came back by adapter, in the samples' order, and why some did not."""
    if not rows:
        return {}, {}
    config = run.config
    faults: dict[str, str] = {}
    with Hosts(config.resources, config.run_dir, config.synthesis.batch_size) as hosts:
        computed = run_rows(
            "ask the teachers",
            rows,
            function,
            base=config.source,
            hosts=hosts,
            place=f"rounds/{place}",
            weights=[run.source.identity, {member.name: member.bundle.digest for member in members}],
            adapters={member.name: str(member.bundle.path) for member in members},
            settings=settings,
            order=lambda row: len(row["input"]) + len(row["answer"]),
            faults=faults,
        )
    found: dict[str, list[Row]] = {member.name: [] for member in members if member.name not in faults}
    for row in sorted(computed, key=lambda row: (row["adapter"], row["index"])):
        if row["adapter"] in found:
            found[row["adapter"]].append(row)
    return found, faults
