"""Packed attention with capped scores, against transformers' eager attention one sample at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomForCausalLM,
    Gemma2Config,
    Gemma2Model,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from tests.tiny import make_base
from translora.bundle.base import UnusableBaseError
from translora.config import BaseModelConfig
from translora.engine.attention import PACKED, packed_inputs, packed_sdpa
from translora.engine.loading import (
    attention_of,
    caps_attention,
    check_attention,
    flash_attentions,
    resolve_attention,
)

CONFIG = Gemma2Config(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=50,
    sliding_window=4,
    attn_logit_softcapping=0.5,
    attn_implementation="eager",
)
SAMPLES = [[5, 6, 7, 8, 9, 10, 11], [9, 3], [30, 31, 32, 33, 34, 35, 36], [12]]


def test_capped_attention_of_packed_samples_is_that_of_each_alone() -> None:
    torch.manual_seed(0)
    model = Gemma2Model(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).last_hidden_state[0] for ids in SAMPLES]
        model.set_attn_implementation(PACKED)
        inputs = packed_inputs([len(ids) for ids in SAMPLES], torch.device("cpu"))
        packed = model(
            input_ids=torch.tensor([[token for ids in SAMPLES for token in ids]]), use_cache=False, **inputs
        ).last_hidden_state[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not flash_attentions(), reason="needs a GPU with flash-attention")
def test_flash_attention_of_packed_samples_is_that_of_sdpa() -> None:
    """In bfloat16: as near to float32's as SDPA's bfloat16 is, gradients too."""
    torch.manual_seed(0)
    place, flash = torch.device("cuda"), flash_attentions()[0]
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="sdpa",
    )
    model = LlamaModel(config).to(place)
    lengths = [700, 3, 64, 1, 129]
    ids_1T = torch.randint(0, 50, (1, sum(lengths)), device=place)

    def states(attention: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        own = copy.deepcopy(model).to(dtype)
        own.set_attn_implementation(attention)
        embedded = own.embed_tokens(ids_1T).detach().requires_grad_(True)
        hidden = own(inputs_embeds=embedded, use_cache=False, **packed_inputs(lengths, place)).last_hidden_state
        hidden.float().square().mean().backward()
        assert embedded.grad is not None
        return hidden.detach().float(), embedded.grad.float()

    exact, plain, found = states(PACKED, torch.float32), states(PACKED, torch.bfloat16), states(flash, torch.bfloat16)
    for true, sdpa, own in zip(exact, plain, found, strict=True):
        assert (own - true).norm() < 1.5 * (sdpa - true).norm()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_sample_that_is_not_a_number_reaches_no_other(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 4, generator=generator) for _ in range(3))
    query[:, :, 3:6] = torch.nan
    value[:, :, 3:6] = torch.nan
    output, _ = packed_sdpa(torch.nn.Identity(), query, key, value, None, softcap=softcap, packed_lengths=(3, 3, 3))
    assert output.isfinite().all(-1).all(-1)[0].tolist() == [True] * 3 + [False] * 3 + [True] * 3


def test_flash_attention_is_chosen_for_models_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the packages are there: a base that worked without one works with it, too."""
    monkeypatch.setattr("translora.engine.loading.flash_attentions", lambda: ["flash_attention_3", "flash_attention_2"])
    chosen = {
        kind: resolve_attention("auto", torch.bfloat16, kind)
        for kind in (LlamaForCausalLM, Llama4ForCausalLM, BloomForCausalLM, GptOssForCausalLM, None)
    }
    assert chosen[LlamaForCausalLM] == chosen[None] == "flash_attention_3"
    assert chosen[Llama4ForCausalLM] == "sdpa" and chosen[BloomForCausalLM] == "eager"
    assert GptOssForCausalLM._compatible_flash_implementations is not None
    assert chosen[GptOssForCausalLM] in (*GptOssForCausalLM._compatible_flash_implementations, "sdpa", "eager")
    assert resolve_attention("auto", torch.float32, LlamaForCausalLM) == "sdpa"
    assert resolve_attention("flash_attention_2", torch.bfloat16, BloomForCausalLM) == "flash_attention_2", "as asked"


def test_a_flash_attention_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = BaseModelConfig(model="base", attn_implementation="flash_attention_2")
    if not torch.cuda.is_available():
        with pytest.raises(
            UnusableBaseError, match=r"base: attn_implementation: flash_attention_2 is not .* has none; in"
        ):
            check_attention(asked, torch.bfloat16)
    monkeypatch.setattr("translora.engine.loading.flash_attentions", lambda: ["flash_attention_2"])
    check_attention(asked, torch.bfloat16)
    with pytest.raises(UnusableBaseError, match="base: flash_attention_2 has no float32; set dtype to bfloat16"):
        check_attention(asked, torch.float32)
    with pytest.raises(UnusableBaseError, match=r"flash_attention_3 is not installed.* has flash_attention_2; in"):
        check_attention(asked.model_copy(update={"attn_implementation": "flash_attention_3"}), torch.bfloat16)
    check_attention(BaseModelConfig(model="base"), torch.float32)


def test_sdpa_is_never_chosen_for_a_base_that_caps_its_scores(tmp_path: Path) -> None:
    assert caps_attention({"attn_logit_softcapping": 50.0}) and caps_attention({"text_config": CONFIG.to_dict()})
    assert not caps_attention({"attn_logit_softcapping": None, "text_config": None})
    assert resolve_attention("auto", torch.float32, capped=True) == "eager"
    assert resolve_attention("auto", torch.float32) == "sdpa"
    make_base(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_logit_softcapping": 50.0}))
    assert attention_of(BaseModelConfig(model=str(tmp_path)), torch.float32) == "eager"
    with pytest.raises(ValueError, match="caps its attention scores, which SDPA cannot; set attn"):
        attention_of(BaseModelConfig(model=str(tmp_path), attn_implementation="sdpa"), torch.float32)
