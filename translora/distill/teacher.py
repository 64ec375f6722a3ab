"""What the teachers think of their answers, token by token, for students that need it.

For `distill.loss: kl` their probabilities, K of them and no whole vocabulary; for `distill.token_share` how much more
likely a token is with the adapter than without (TiTok). Both are computed once, for the samples of the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from translora.actors.blocks import teach_block
from translora.actors.hosts import Hosts
from translora.actors.rows import run_rows
from translora.errors import InputError
from translora.run.member import Member, Run
from translora.run.state import SYNTHETIC

Teacher = dict[str, Any]
"""Of a sample with an answer of A tokens: answer_ids [A]; tokens [A, K] and log_p [A, K] for kl; spans [A, 2]
and excess [A] for token_share."""


def check_vocabularies(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
    """Probabilities can be compared token by token if a token is the same text in both bases.

    Raises:
        InputError: it is not.
    """
    if source.get_vocab() != target.get_vocab():
        raise InputError("distill.loss: kl compares token by token, and the bases have different vocabularies; use sft")


def ask_teachers(run: Run, members: Sequence[Member]) -> dict[str, list[Teacher]]:
    """What the teachers think of their answers to the training samples, by adapter, in the samples' order.

    Nobody is asked where the training needs no answer. An adapter whose rows cannot be computed is quarantined, and
    missing from the result.
    """
    config = run.config
    if config.distill.loss != "kl" and config.distill.token_share == 1:
        return {}
    rows = [
        {
            "adapter": member.name,
            "index": index,
            "slot": member.name,
            "input": row["input"],
            "answer": row["answer"],
            "template": member.bundle.manifest.prompt_template,
        }
        for member in members
        if (member.directory / SYNTHETIC).is_file()
        for index, row in enumerate(member.samples("train"))
    ]
    faults: dict[str, str] = {}
    with Hosts(config.resources, config.run_dir, config.synthesis.batch_size) as hosts:
        found = run_rows(
            "ask the teachers",
            rows,
            teach_block,
            base=config.source,
            hosts=hosts,
            place="rounds/teach",
            weights=[run.source.identity, {member.name: member.bundle.digest for member in members}],
            adapters={member.name: str(member.bundle.path) for member in members},
            settings={
                "top_k": config.distill.kl_top_k if config.distill.loss == "kl" else None,
                "excess": config.distill.token_share < 1,
            },
            order=lambda row: len(row["input"]) + len(row["answer"]),
            faults=faults,
        )
    answers: dict[str, list[Teacher]] = {member.name: [] for member in members if member.name not in faults}
    for row in sorted(found, key=lambda row: (row["adapter"], row["index"])):
        if row["adapter"] in answers:
            answers[row["adapter"]].append(row["teacher"])
    for member in members:
        if member.name in faults and member.waits_for("distill"):
            run.quarantine(member.state, faults[member.name])
    return answers
