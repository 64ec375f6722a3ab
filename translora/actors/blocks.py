"""What an actor does with one block of rows: generate, answer, rate answers. Screens: translora.synthesis.screens."""

from __future__ import annotations

from typing import Any

from translora.actors.calls import Row
from translora.config import SamplingConfig
from translora.engine.decode import Request
from translora.engine.prompts import prompt_format, raw_prompt
from translora.engine.protocol import Engine


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


def likelihood_block(engine: Engine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """Log-likelihood of each row's whole `answer`, its end among it; adds `loglik`.

    Rows: slot (the teacher), and what `encoded` needs.
    """
    found = engine.log_likelihood(encoded(engine, rows), [row["slot"] for row in rows])
    return [{**row, "loglik": sum(own)} for row, own in zip(rows, found, strict=True)]


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
