"""The model card of a migrated bundle: what it is, where it comes from, how to load it and what it cannot promise."""

from __future__ import annotations

import json
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from translora import __version__
from translora.report.markdown import code, escape, one_line
from translora.report.table import (
    ACCURACY_FIELDS,
    agreement_interval,
    chance_text,
    informedness_text,
    interval,
    loglik_text,
    percent,
    remarks,
)
from translora.report.templates import environment
from translora.run.state import AdapterState

Began = Literal["fresh", "warm", "copy"]
"""As no adapter; as its source adapter and then trained; as its source adapter, which it stayed."""


def model_card(
    state: AdapterState,
    *,
    source: str,
    target: str,
    prompt_template: str,
    before: str = "",
    method: str = "LoRA",
    began: Began = "fresh",
    holds_bos: bool = False,
) -> str:
    """README.md of a bundle as the Hugging Face hub reads it; the same text for the same migration, at any time.

    Args:
        state: of an adapter that passed the gate; no paths and no times of it are used.
        source: name of the base that the adapter comes from.
        target: name of the base that it is made for.
        prompt_template: of the new bundle, `chat` or a string with {input}.
        before: name of the base before the source, where the adapter had been moved before.
        method: what kind of adapter it is.
        began: what its weights were before they were trained.
        holds_bos: whether the template begins with the token that begins a text.
    """
    assert state.gate is not None
    return render_card(
        "card.md.j2",
        target,
        ["translora", method.lower().replace("_", "-")],
        state=state,
        method=method,
        began=began,
        source=source,
        target=target,
        before=before,
        prompt_template=prompt_template,
        holds_bos=holds_bos,
        intervals=[
            agreement_interval(state.gate),
            interval(state.accuracy.migrated, state.accuracy.num_items) if state.accuracy else "",
        ],
        accuracies=[getattr(state.accuracy, field) for field in ACCURACY_FIELDS if state.accuracy],
        chance=chance_text(state.gate),
        informedness=informedness_text(state.gate),
        loglik=loglik_text(state.gate),
        remarks=remarks(state),
    )


def python_text(text: str) -> str:
    """A text as Python writes it, in a fence of Markdown."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")  # JSON's strings are Python's too


def render_card(template: str, base: str, tags: list[str], pipeline_tag: str = "text-generation", **values: Any) -> str:
    """A model card for an adapter of `base` in the hub's format: its metadata, and the template with these values."""
    metadata = ModelCardData(base_model=base, library_name="peft", tags=tags, pipeline_tag=pipeline_tag)
    templates = environment(keep_trailing_newline=True)
    templates.filters |= {"percent": percent, "code": code, "line": one_line, "text": escape, "python": python_text}
    body = templates.get_template(template).render(version=__version__, **values)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}"))
