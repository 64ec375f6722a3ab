"""What the teachers think of their answers, for students that need it.

For `distill.loss: auto` how likely they find each of their answers, where these are few; for `kl` their probabilities
token by token, K of them and no whole vocabulary; for `distill.token_share` how much more likely a token is with the
adapter than without (TiTok). All are computed once, for the samples of the set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from translora.actors.blocks import label_block, teach_block
from translora.actors.calls import Row
from translora.actors.hosts import Hosts
from translora.actors.rows import run_rows
from translora.config import TrainConfig
from translora.errors import InputError
from translora.run.member import Member, Run
from translora.run.state import SYNTHETIC
from translora.synthesis.prompts import normalise

if TYPE_CHECKING:
    from translora.actors.host import BlockFunction

Teacher = dict[str, Any]
"""Of a sample with an answer of A tokens: for soft labels shares, the probability by answer; answer_ids [A], tokens
[A, K] and log_p [A, K] for kl; spans [A, 2] and excess [A] for token_share."""
MIN_SHARE = 0.01
"""Probability of an answer that a student is trained on: each costs as much as a sample."""


def check_vocabularies(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
    """Probabilities can be compared token by token if a token is the same text in both bases.

    Raises:
        InputError: it is not.
    """
    if source.get_vocab() != target.get_vocab():
        raise InputError(
            "distill.loss: kl compares token by token, and the bases have different vocabularies; use auto"
        )


def has_soft_labels(config: TrainConfig) -> bool:
    """Whether students with few answers are trained on each of them; chosen tokens are those of one answer."""
    return config.loss == "auto" and config.token_share == 1


def ask_teachers(run: Run, members: Sequence[Member]) -> dict[str, list[Teacher]]:
    """What the teachers think of their answers to the training samples, by adapter, in the samples' order.

    Nobody is asked where the training needs no answer. An adapter whose rows cannot be computed is quarantined, and
    missing from the result.
    """
    train = run.config.distill
    members = [member for member in members if (member.directory / SYNTHETIC).is_file()]
    if has_soft_labels(train):
        members = [member for member in members if len(member.state.synthesis.classes) > 1]
        rows = [row for member in members for row in choice_rows(member)]
        found = ask(run, members, rows, label_block, "labels", {})
        return {
            name: [{"shares": shares(row["choices"], row["logliks"], row["answer"])} for row in own]
            for name, own in found.items()
        }
    if train.loss != "kl" and train.token_share == 1:
        return {}
    rows = [row for member in members for row in teacher_rows(member)]
    settings = {"top_k": train.kl_top_k if train.loss == "kl" else None, "excess": train.token_share < 1}
    found = ask(run, members, rows, teach_block, "teach", settings)
    return {name: [row["teacher"] for row in own] for name, own in found.items()}


def teacher_rows(member: Member) -> Iterator[Row]:
    """Rows of `teach_block`."""
    for index, row in enumerate(member.samples("train")):
        yield {
            "adapter": member.name,
            "index": index,
            "slot": member.name,
            "input": row["input"],
            "answer": row["answer"],
            "template": member.bundle.manifest.prompt_template,
        }


def choice_rows(member: Member) -> Iterator[Row]:
    """Rows of `label_block`: the choices are the teacher's answers to all samples, the one to this sample first."""
    for row in teacher_rows(member):
        own = normalise(row["answer"])
        choices = [row["answer"], *(text for text in member.state.synthesis.classes if normalise(text) != own)]
        yield {**row, "choices": choices, "with_end": member.entry.stop is None}


def shares(choices: Sequence[str], logliks: Sequence[float], answer: str) -> dict[str, float]:
    """Probabilities of the answers, as shares of all that are likely enough; the teacher's own is always among them.

    Args:
        choices: different answers.
        logliks: of each as a whole answer.
        answer: the teacher's own, one of them.
    """
    most = max(logliks)
    odds = {text: math.exp(value - most) for text, value in zip(choices, logliks, strict=True)}
    total = sum(odds.values())
    kept = {text: value for text, value in odds.items() if value >= MIN_SHARE * total or text == answer}
    return {text: value / sum(kept.values()) for text, value in kept.items()}


def ask(
    run: Run, members: Sequence[Member], rows: Sequence[Row], function: BlockFunction, place: str, settings: Any
) -> dict[str, list[Row]]:
    """Compute rows on the source base; what came back by adapter, in the samples' order."""
    if not rows:
        return {}
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
    for member in members:
        if member.name in faults and member.waits_for("distill"):
            run.quarantine(member.state, faults[member.name])
    return found
