"""The screens: scores that decide which invented inputs are kept, and how a block of them is screened and labelled."""

from __future__ import annotations

import math
from typing import Any

from translora.actors.blocks import answer_block, answer_likelihood, encoded, with_and_without
from translora.actors.calls import Row
from translora.engine.prompts import prompt_format
from translora.engine.protocol import Engine
from translora.run.state import BY_DISCRIMINATOR, was_refused
from translora.synthesis.prompts import discriminator_question


def discriminator_scores(engine: Engine, rows: list[Row]) -> list[float]:
    """log p(yes | t(x)) - log p(no | t(x)) under each row's discriminator (arXiv 2405.17258).

    Rows: discriminator (slot), task_name, input, template.
    """
    questions = [
        prompt_format(engine.tokenizer, row["template"]).render(discriminator_question(row["input"], row["task_name"]))
        for row in rows
    ]
    return engine.log_odds(questions, [row["discriminator"] for row in rows])


def judge_block(engine: Engine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """Score inputs by their discriminators; adds `score`. Rows: what `discriminator_scores` needs."""
    return [{**row, "score": score} for row, score in zip(rows, discriminator_scores(engine, rows), strict=True)]


def confidence_scores(engine: Engine, rows: list[Row]) -> list[float]:
    """How sure the adapter is of its answer: the geometric mean of its tokens' probabilities, 0 to 1.

    What is unlike the inputs that a model was trained on gets less of it (maximum softmax probability, arXiv
    1610.02136). Rows: slot (the teacher), input, answer, template.
    """
    return [math.exp(value) for value in answer_likelihood(engine, rows, [row["slot"] for row in rows])]


def excess_scores(engine: Engine, rows: list[Row]) -> list[float]:
    """Contrastive excess: mean over the answer's tokens of log p(source base + adapter) - log p(source base).

    How much the adapter has to say about an input, by which TiTok (arXiv 2510.04682) filters; it needs nothing of the
    adapter's owner. Rows: slot (the teacher), input, answer, template.
    """
    found = with_and_without(engine, encoded(engine, rows), [row["slot"] for row in rows])
    return [sum(own) / len(own) - sum(bare) / len(bare) for own, bare in found]


ANSWER_SCORES = {"confidence": confidence_scores, "excess": excess_scores}
"""Screens that score what the teacher answered."""


def screen_and_label_block(engine: Engine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """Score every row by its own screen and let the teacher answer; what is refused is not answered.

    Rows: screen, and what `discriminator_scores` and `answer_block` need, slot being
    the teacher. Adds `score`, `answer`, `finished`; a refused row has answer None.
    """
    found = [{**row, "score": None, "answer": None, "finished": False} for row in rows]
    judged = [row for row in found if row["screen"] in BY_DISCRIMINATOR]
    if judged:
        for row, score in zip(judged, discriminator_scores(engine, judged), strict=True):
            row["score"] = score
    kept = [row for row in found if not was_refused(row["score"], row["screen"])]
    if kept:
        for row, answered in zip(kept, answer_block(engine, kept, settings), strict=True):
            row |= {"answer": answered["answer"], "finished": answered["finished"]}
    for screen, scores in ANSWER_SCORES.items():
        whole = [row for row in kept if row["screen"] == screen and row["answer"] and row["finished"]]
        if whole:
            # An adapter whose answers end at a text learnt no end, and is not asked how sure it is of one.
            ended = [{**row, "with_end": row["stop"] is None} for row in whole]
            for row, score in zip(whole, scores(engine, ended), strict=True):
                row["score"] = score
    return found
