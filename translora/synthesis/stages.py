"""What an actor does with one block of rows: generate, screen and label, or answer."""

from __future__ import annotations

from typing import Any

from translora.config import SamplingConfig
from translora.engine.decode import Request
from translora.engine.prompts import prompt_format, raw_prompt
from translora.engine.transformers import TransformersEngine
from translora.synthesis.prompts import discriminator_question

Row = dict[str, Any]


def generate_block(engine: TransformersEngine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
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


def answer_block(engine: TransformersEngine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """Answer task inputs greedily; adds `answer` (stripped) and `finished`.

    Rows: slot (adapter of the bank, or None for the bare base), input, template, stop. Settings: max_answer_tokens.
    """
    requests = [
        Request(
            prompt_format(engine.tokenizer, row["template"]).render(row["input"]),
            row["slot"],
            settings["max_answer_tokens"],
            row["stop"],
        )
        for row in rows
    ]
    completions = engine.generate(requests)
    return [
        {**row, "answer": completion.text.strip(), "finished": completion.finished}
        for row, completion in zip(rows, completions, strict=True)
    ]


def screen_block(engine: TransformersEngine, rows: list[Row]) -> list[float | None]:
    """log p(yes | t(x)) - log p(no | t(x)) under each row's discriminator; None for rows without one.

    Rows: discriminator (slot or None), task_name, input, template.
    """
    screened = [row for row in rows if row["discriminator"] is not None]
    if not screened:
        return [None] * len(rows)
    questions = [
        prompt_format(engine.tokenizer, row["template"]).render(discriminator_question(row["input"], row["task_name"]))
        for row in screened
    ]
    scores = iter(engine.log_odds(questions, [row["discriminator"] for row in screened]))
    return [None if row["discriminator"] is None else next(scores) for row in rows]


def screen_and_label_block(engine: TransformersEngine, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    """Score every row, and let the teacher answer those that the screen keeps.

    Rows: as for `screen_block` and `answer_block`, slot being the teacher. Adds `score`, `answer`, `finished`; a
    refused row has answer None.
    """
    scored = [{**row, "score": score} for row, score in zip(rows, screen_block(engine, rows), strict=True)]
    kept = [row for row in scored if row["score"] is None or row["score"] > 0]
    answered = iter(answer_block(engine, kept, settings) if kept else [])
    return [
        next(answered) if row["score"] is None or row["score"] > 0 else {**row, "answer": None, "finished": False}
        for row in scored
    ]
