import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from translora.engine import head as head_module
from translora.engine.head import Head, cross_entropy, divergence, top_log_probabilities

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 50,
}


def make_head(bias: bool = False, scale: float = 1.0, softcap: float | None = None) -> Head:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(50, 16, generator=generator), requires_grad=False)
    offset = nn.Parameter(torch.randn(50, generator=generator), requires_grad=False) if bias else None
    return Head(weight, offset, scale, softcap)


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"scale": 0.25}, {"softcap": 3.0}, {"bias": True, "scale": 2.0, "softcap": 2.0}]
)
@pytest.mark.parametrize("elements", [50, 150, 10_000])
def test_the_chunked_loss_and_its_gradient_equal_those_of_torch(
    options: dict[str, object], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", elements)
    head = make_head(**options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 16, generator=generator, requires_grad=True)
    labels, weights = torch.arange(7), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 1.0])
    losses = cross_entropy(hidden, head, labels, weights)
    upstream = torch.linspace(0.5, 2, 7)
    (losses * upstream).sum().backward()
    again = hidden.detach().clone().requires_grad_()
    expected = F.cross_entropy(head.logits(again), labels, reduction="none") * weights
    (expected * upstream).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(hidden.grad, again.grad)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"scale": 0.25}, {"bias": True, "scale": 2.0, "softcap": 2.0}])
@pytest.mark.parametrize("elements", [50, 10_000])
def test_the_divergence_counts_all_tokens_that_the_teacher_does_not_name_as_one(
    options: dict[str, object], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", elements)
    head = make_head(**options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 16, generator=generator, requires_grad=True)
    whole = torch.randn(6, 50, generator=generator).log_softmax(-1)
    log_p, tokens = whole.topk(5, dim=-1)
    log_p[2, 3:], tokens[2, 3:] = -torch.inf, 0  # a place with three tokens, filled up
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 0.25])
    losses = divergence(hidden, head, tokens, log_p, weights)
    losses.sum().backward()

    again = hidden.detach().clone().requires_grad_()
    q = head.logits(again).softmax(-1)
    for row in range(6):
        named = tokens[row, :3] if row == 2 else tokens[row]
        p, own = log_p[row, : len(named)].exp(), q[row, named]
        events = torch.cat([p, 1 - p.sum(0, keepdim=True)]), torch.cat([own, 1 - own.sum(0, keepdim=True)])
        expected = weights[row] * (events[0] * (events[0] / events[1]).log()).sum()
        torch.testing.assert_close(losses[row], expected)
        expected.backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, again.grad, atol=1e-5, rtol=1e-4)


def test_a_certain_teacher_gives_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 16, generator=generator, requires_grad=True)
    again = hidden.detach().clone().requires_grad_()
    labels, weights = torch.tensor([3, 0, 49, 7]), torch.tensor([1.0, 1.0, 0.5, 2.0])
    tokens, log_p = torch.zeros(4, 3, dtype=torch.long), torch.full((4, 3), -torch.inf)
    tokens[:, 0], log_p[:, 0] = labels, 0.0
    first, second = (
        divergence(hidden, make_head(), tokens, log_p, weights),
        cross_entropy(again, make_head(), labels, weights),
    )
    torch.testing.assert_close(first, second)
    first.sum().backward()
    second.sum().backward()
    torch.testing.assert_close(hidden.grad, again.grad)


def test_the_most_likely_tokens_come_with_their_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 100)
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    tokens, log_p = top_log_probabilities(hidden, make_head(), 4)
    expected = make_head().logits(hidden).log_softmax(-1).sort(-1, descending=True)
    torch.testing.assert_close(log_p, expected.values[:, :4])
    assert torch.equal(tokens, expected.indices[:, :4])


def test_a_row_that_is_not_a_number_poisons_no_other() -> None:
    hidden = torch.ones(3, 16)
    hidden[1] = float("nan")
    hidden.requires_grad_()
    losses = cross_entropy(hidden, make_head(), torch.arange(3), torch.ones(3))
    losses.sum().backward()
    assert hidden.grad is not None
    assert losses.isfinite().tolist() == hidden.grad.isfinite().all(-1).tolist() == [True, False, True]


def test_no_positions_at_all_have_no_loss() -> None:
    losses = cross_entropy(torch.ones(0, 16, requires_grad=True), make_head(), torch.arange(0), torch.ones(0))
    losses.sum().backward()
    assert losses.shape == (0,)


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0, attn_implementation="eager")),
        Cohere2ForCausalLM(Cohere2Config(**SMALL, logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
        GraniteForCausalLM(GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=4.0)),
    ],
    ids=["gemma2", "cohere2", "granite"],
)
def test_logits_are_those_that_the_model_itself_computes(model: nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model.eval()(ids).logits[0]
        hidden = model.base_model(ids).last_hidden_state[0]  # type: ignore[operator, union-attr]
        head = Head.of(model)
        torch.testing.assert_close(head.logits(hidden), expected)
        tokens = torch.tensor([3, 9])
        torch.testing.assert_close(head.logits(hidden, tokens), expected[:, tokens])


def test_a_head_with_nothing_said_of_its_logits_is_plain() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    head = Head.of(model)
    assert (head.scale, head.softcap, head.bias) == (1.0, None, None) and head.parameters == [model.lm_head.weight]


def test_a_treatment_of_the_logits_that_is_not_known_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.config.lm_head_multiplier = 0.5
    with pytest.raises(ValueError, match="changed by lm_head_multiplier"):
        Head.of(model)
