"""What an actor does with one block of rows: generate, screen and label, or answer."""

from __future__ import annotations

import math
from typing import Any

from translora.config import SamplingConfig
from translora.engine.decode import Request
from translora.engine.prompts import prompt_format, raw_prompt
from translora.engine.protocol import Engine
from translora.synthesis.calls import Row
from translora.synthesis.prompts import discriminator_question


def generate_block(engine: Engine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """Complete the few-shot prompts; adds `text` and `finished`.

    Rows: prompt, stop, seed. Settings: sampling.
    """
    sampling = SamplingConfig.model_validate(settings["sampling"])
    requests = [
        Request(raw_prompt(engine.tokenizer, row["prompt"]), None, sampling.max_new_tokens, row["stop"], row["seed"])
        for row in rows
    ]
    completions = engine.generate(requests, sampling)
    return [
        {**row, "text": completion.text.strip(), "finished": completion.finished}
        for row, completion in zip(rows, completions, strict=True)
    ]


def answer_block(engine: Engine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """Answer task inputs greedily; adds `answer` (stripped) and `finished`.

    Rows: slot (adapter of the bank, or None for the bare base), input, template, stop, and a limit of their own in the
    place of the setting. Settings: max_answer_tokens.
    """
    requests = [
        Request(
            prompt_format(engine.tokenizer, row["template"]).render(row["input"]),
            row["slot"],
            row.get("limit") or settings["max_answer_tokens"],
            row["stop"],
        )
        for row in rows
    ]
    completions = engine.generate(requests)
    return [
        {**row, "answer": completion.text.strip(), "finished": completion.finished}
        for row, completion in zip(rows, completions, strict=True)
    ]


def encoded(engine: Engine, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """Token ids of each row's prompt and of its `answer` with its end.

    Rows: input, answer, template, and with_end: False where the answer's writer has learnt no end.
    """
    return [
        prompt_format(engine.tokenizer, row["template"]).encode_pair(
            row["input"], row["answer"], with_end=row.get("with_end", True)
        )
        for row in rows
    ]


def answer_likelihood(engine: Engine, rows: list[Row], slots: list[str | None]) -> list[float]:
    """Mean log-likelihood of a token of each row's `answer`, its end among them, under the adapter of `slots`.

    Rows: what `encoded` needs.
    """
    return [sum(own) / len(own) for own in engine.log_likelihood(encoded(engine, rows), slots)]


def with_and_without(
    engine: Engine, samples: list[tuple[list[int], list[int]]], slots: list[str | None]
) -> list[tuple[list[float], list[float]]]:
    """log p of each token of an answer under the adapter of `slots`, and under the bare base."""
    own, bare = (engine.log_likelihood(samples, asked) for asked in (slots, [None] * len(samples)))
    return list(zip(own, bare, strict=True))


def teach_block(engine: Engine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """What each row's teacher thinks at every token of its own answer; adds `teacher`.

    Rows: slot (the teacher), input, answer, template. Settings: top_k (or None) adds answer_ids, tokens and log_p;
    excess (or False) adds spans and excess: each token's characters in the answer, and its
    log p(source base + adapter) - log p(source base).
    """
    samples, slots = encoded(engine, rows), [row["slot"] for row in rows]
    found: list[Row] = [{"answer_ids": list(answer_ids)} for _, answer_ids in samples]
    if settings["top_k"] is not None:
        odds = engine.top_log_probabilities(samples, slots, settings["top_k"])
        for thought, (tokens, log_p) in zip(found, odds, strict=True):
            thought |= {"tokens": tokens, "log_p": log_p}
    if settings["excess"]:
        for thought, row, (own, bare) in zip(found, rows, with_and_without(engine, samples, slots), strict=True):
            prompts = prompt_format(engine.tokenizer, row["template"])
            thought["spans"] = [list(span) for span in prompts.answer_spans(row["input"], row["answer"])]
            thought["excess"] = [token - base for token, base in zip(own, bare, strict=True)]
    return [{**row, "teacher": thought} for row, thought in zip(rows, found, strict=True)]


def gate_block(engine: Engine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """As `answer_block`, and for rows with a `reference` its mean log-likelihood per token; adds `loglik`, or None.

    Rows: as there, and reference (the teacher's answer to the input, or None).
    """
    found: list[Row] = [{**row, "loglik": None} for row in answer_block(engine, rows, settings)]
    judged = [row for row in found if row["reference"]]
    if judged:
        references = [{**row, "answer": row["reference"]} for row in judged]
        for row, value in zip(
            judged, answer_likelihood(engine, references, [row["slot"] for row in judged]), strict=True
        ):
            row["loglik"] = value
    return found


def token_block(engine: Engine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """How far the adapter of `slot` would write each row's `answer`; adds `agreed`.

    The share of its tokens, its end among them, that are the likeliest ones after those before them. Rows: slot (or
    None for the bare base), input, answer, template.
    """
    samples = encoded(engine, rows)
    likeliest = engine.top_log_probabilities(samples, [row["slot"] for row in rows], 1)
    found = []
    for row, (_, answer), (tokens, _) in zip(rows, samples, likeliest, strict=True):
        same = [own == first for own, (first, *_) in zip(answer, tokens, strict=True)]
        found.append({**row, "agreed": sum(same) / len(same)})
    return found


def discriminator_scores(engine: Engine, rows: list[Row]) -> list[float]:
    """log p(yes | t(x)) - log p(no | t(x)) under each row's discriminator (arXiv 2405.17258).

    Rows: discriminator (slot), task_name, input, template.
    """
    questions = [
        prompt_format(engine.tokenizer, row["template"]).render(discriminator_question(row["input"], row["task_name"]))
        for row in rows
    ]
    return engine.log_odds(questions, [row["discriminator"] for row in rows])


def choice_block(engine: Engine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """Log-likelihood of each choice as the answer, its end not counted; adds `logliks`, in the order of the choices.

    Rows: slot (adapter of the bank, or None for the bare base), input, template, choices.
    """
    samples, slots = [], []
    for row in rows:
        prompts = prompt_format(engine.tokenizer, row["template"])
        samples += [prompts.encode_pair(row["input"], choice, with_end=False) for choice in row["choices"]]
        slots += [row["slot"]] * len(row["choices"])
    sums = iter([sum(own) for own in engine.log_likelihood(samples, slots)])
    return [{**row, "logliks": [next(sums) for _ in row["choices"]]} for row in rows]


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
    """Score every row by its own screen and let the teacher answer; what a discriminator refuses is not answered.

    Rows: screen, and what `discriminator_scores` and `answer_block` need, slot being
    the teacher. Adds `score`, `answer`, `finished`; a refused row has answer None.
    """
    found = [{**row, "score": None, "answer": None, "finished": False} for row in rows]
    judged = [row for row in found if row["screen"] == "discriminator"]
    if judged:
        for row, score in zip(judged, discriminator_scores(engine, judged), strict=True):
            row["score"] = score
    kept = [row for row in found if row["score"] is None or row["score"] > 0]
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
