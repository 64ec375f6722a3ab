"""Bases of several families, through bank, generation and gang, against PEFT; benchmarks.families runs all of them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families import check
from tests.tiny import make_base
from translora.bundle.base import UnusableBaseError
from translora.engine.head import check_head


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "qwen3", "qwen3_moe", "cohere"])
def test_a_family_gives_what_peft_gives(family: str, tmp_path: Path) -> None:
    found = check(family, tmp_path)
    assert found.likelihood < 1e-4
    assert found.tokens == "4/4"
    assert found.gradient < 1e-3


@pytest.mark.parametrize("family", ["mt5", "umt5"])
def test_an_encoder_decoder_answers_as_with_peft(family: str, tmp_path: Path) -> None:
    found = check(family, tmp_path)
    assert found.likelihood < 1e-4 and found.tokens == "4/4" and found.gradient is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "gpt2 has no linear modules"),
        ("mamba", "continued from its keys and values gets other logits"),
    ],
)
def test_a_family_that_cannot_be_moved_is_refused_with_the_reason(family: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        check(family, tmp_path)


def test_a_base_with_something_between_trunk_and_head_is_refused(tmp_path: Path) -> None:
    """Odds, likelihoods and the loss are made of the last hidden states."""
    base = make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    check_head(model)
    model.lm_head = torch.nn.Sequential(torch.nn.LayerNorm(32), model.lm_head)
    model.get_output_embeddings = lambda: model.lm_head[1]
    with pytest.raises(UnusableBaseError, match="llama: its logits are not its head's of the last hidden states"):
        check_head(model)
