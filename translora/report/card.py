"""The model card of a migrated bundle: what it is, where it comes from, how to load it and what it cannot promise."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from translora import __version__
from translora.report.table import ACCURACY_FIELDS, loglik_text, percent, remarks
from translora.report.templates import environment
from translora.run.state import AdapterState


def model_card(state: AdapterState, *, source: str, target: str, prompt_template: str, before: str = "") -> str:
    """README.md of a bundle as the Hugging Face hub reads it; the same text for the same migration, at any time.

    Args:
        state: of an adapter that passed the gate; no paths and no times of it are used.
        source: name of the base that the adapter comes from.
        target: name of the base that it is made for.
        prompt_template: of the new bundle, `chat` or a string with {input}.
        before: name of the base before the source, where the adapter had been moved before.
    """
    assert state.gate is not None
    metadata = ModelCardData(
        base_model=target, library_name="peft", tags=["translora", "lora"], pipeline_tag="text-generation"
    )
    templates = environment(keep_trailing_newline=True)
    templates.filters |= {"percent": percent, "code": code_cell, "line": one_line}
    body = templates.get_template("card.md.j2").render(
        state=state,
        source=source,
        target=target,
        before=before,
        prompt_template=prompt_template,
        accuracies=[getattr(state.accuracy, field) for field in ACCURACY_FIELDS if state.accuracy],
        loglik=loglik_text(state.gate),
        remarks=remarks(state),
        version=__version__,
    )
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}"))


def one_line(text: str) -> str:
    """The text on one line, so that it stays where it is put."""
    return " ".join(text.split())


def code_cell(text: str) -> str:
    """The text as code in a cell of a table."""
    text = one_line(text).replace("`", "'").replace("|", r"\|")
    return f"`{text}`"
