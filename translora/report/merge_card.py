"""The model card of a merged adapter: what it was made of, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from translora.report.card import render_card

SOURCES = {
    "cat": "CAT with learned coefficients (LoRA Soups, [arXiv 2410.13025](https://arxiv.org/abs/2410.13025))",
    "iteris": "IterIS ([arXiv 2411.15231](https://arxiv.org/abs/2411.15231))",
    "regmean": "RegMean ([arXiv 2212.09849](https://arxiv.org/abs/2212.09849)) on the adapters' updates",
    "fedex": "FedEx-LoRA ([arXiv 2410.09432](https://arxiv.org/abs/2410.09432)): mean and exact residual",
    "component_mean": "the mean of rank-1 components over the adapters that have them "
    "(HAFL, [arXiv 2411.06581](https://arxiv.org/abs/2411.06581))",
}
"""Others are PEFT's `add_weighted_adapter`."""


@dataclass(frozen=True)
class Ingredient:
    """One of the adapters."""

    name: str
    sha256: str
    rank: int
    weight: float | None
    data_sha256: str | None


def merge_card(
    *,
    name: str,
    method: str,
    base: str,
    with_encoder: bool,
    rank: int,
    truncated: bool,
    ingredients: Sequence[Ingredient],
    mixture: Sequence[str],
) -> str:
    """README.md of a merged adapter as the Hugging Face hub reads it.

    Args:
        name: of the adapter.
        method: as on the command line.
        base: name of the base.
        with_encoder: it is an encoder-decoder.
        rank: of the result.
        truncated: whether the rank was cut.
        ingredients: the adapters.
        mixture: sha256 of the files that coefficients were learnt on.
    """
    return render_card(
        "merge_card.md.j2",
        base,
        ["translora", "lora", "merge"],
        "text2text-generation" if with_encoder else "text-generation",
        name=name,
        source=SOURCES.get(method, f"PEFT's `{'cat' if method == 'static_cat' else method}`"),
        method=method,
        model=base,
        auto_class="AutoModelForSeq2SeqLM" if with_encoder else "AutoModelForCausalLM",
        rank=rank,
        truncated=truncated,
        ingredients=ingredients,
        mixture=mixture,
    )
