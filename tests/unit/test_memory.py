"""The memory of a training pass, from fake tensors: against autograd, whole depth and what a process really takes."""

import gc

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from benchmarks.memory import compare
from translora.config import LoraSettings, TrainConfig
from translora.distill.frozen import FrozenLinear, keep_no_inputs
from translora.distill.memory import estimated_gang_bytes, gang_bytes, student_bytes
from translora.distill.pass_memory import PassSize, _run_pass, pass_bytes
from translora.engine.fake import LiveBytes, depths_to_run, fake_base

DEEP = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4, vocab_size=500, head_dim=16
)
TRAIN = TrainConfig(dtype="bfloat16")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_a_frozen_linear_has_the_gradient_of_autograd(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    weight, offset = torch.randn(4, 8), torch.randn(4) if bias else None
    x, same = (torch.ones(shape).cumsum(0).requires_grad_() for _ in range(2))
    own, expected = FrozenLinear.apply(x, weight, offset), F.linear(same, weight, offset)
    torch.testing.assert_close(own, expected)
    own.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


def test_a_frozen_linear_keeps_nothing_and_one_that_is_trained_is_left_alone() -> None:
    before = keep_no_inputs()
    try:
        frozen, trained = torch.nn.Linear(64, 64, bias=False).requires_grad_(False), torch.nn.Linear(64, 64, bias=False)
        for layer, num_kept in ((frozen, 1), (trained, 2)):
            start = torch.randn(10, 64, requires_grad=True)
            with LiveBytes([start, layer.weight]) as memory:
                result = layer(start * 2)
            assert memory.live == num_kept * result.nbytes, "the result, and for a trained weight its input"
            result.sum().backward()
            assert start.grad is not None and (layer.weight.grad is None) == (layer is frozen)
    finally:
        F.linear = before


def test_live_bytes_counts_storages_once_and_forgets_what_is_freed() -> None:
    there = torch.zeros(10)
    with LiveBytes([there]) as memory:
        view = there.view(2, 5)
        made = there + 1
        other = made[:5]
        assert (memory.live, memory.peak) == (40, 40)
        more = torch.cat([made, made])
        assert memory.live == 120
        del more
        gc.collect()
        assert (memory.live, memory.peak) == (40, 120)
        memory.begin_peak()
        assert memory.peak == 40
    del view, other


SMALL = {name: DEEP.to_dict()[name] for name in ("hidden_size", "num_attention_heads", "vocab_size", "head_dim")}
EXPERTS = Qwen3MoeConfig(
    **SMALL,
    intermediate_size=512,
    moe_intermediate_size=32,
    num_experts=4,
    num_experts_per_tok=2,
    num_hidden_layers=7,
    mlp_only_layers=[0],
)
BY_TURNS = Gemma3TextConfig(
    **SMALL, num_hidden_layers=8, layer_types=["sliding_attention", "full_attention"] * 4, sliding_window=16
)


@pytest.mark.parametrize(("base", "depths"), [(DEEP, (1, 2)), (EXPERTS, (2, 4)), (BY_TURNS, (2, 4))])
@pytest.mark.parametrize("again", [False, True])
def test_a_few_layers_tell_what_all_of_them_take(base: PreTrainedConfig, depths: tuple[int, int], again: bool) -> None:
    assert depths_to_run(base) == depths
    train = TRAIN.model_copy(update={"gradient_checkpointing": again})
    whole, few = (run(base, torch.bfloat16, train, PassSize(2, 3, 40, 8)) for run in (_run_pass, pass_bytes))
    assert few.activations == pytest.approx(whole.activations, rel=0.01)
    assert few.peak == pytest.approx(whole.peak, rel=0.01)


def test_recomputation_keeps_little_of_a_pass_and_a_student_owns_18_bytes_a_weight() -> None:
    again = TRAIN.model_copy(update={"gradient_checkpointing": True})
    kept, little = (pass_bytes(DEEP, torch.bfloat16, train, PassSize(1, 4, 64, 8)) for train in (TRAIN, again))
    assert little.activations < 0.3 * kept.activations
    shapes = {"a": (64, 64), "b": (32, 64)}
    own = student_bytes(shapes, LoraSettings(rank=8), torch.bfloat16)
    assert own == 18 * 8 * (128 + 96)


def test_what_hooks_hold_is_the_students_and_what_they_need_for_a_moment_is_the_pass() -> None:
    size = PassSize(1, 4, 64, 8)
    plain, noisy, first = (
        pass_bytes(DEEP, torch.bfloat16, TRAIN.model_copy(update={"lora": LoraSettings(rank=8, **lora)}), size)
        for lora in ({}, {"flat_sigma": 0.1}, {"init": "eva"})
    )
    assert noisy.activations == plain.activations == first.activations, "nothing is kept for the backward pass"
    assert noisy.backward >= plain.backward
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 64}
    wide = LlamaConfig(**{**DEEP.to_dict(), "num_hidden_layers": 2, **heads})
    few = PassSize(1, 1, 8, 8)
    plain, noisy = (
        _run_pass(wide, torch.bfloat16, TRAIN.model_copy(update={"lora": LoraSettings(rank=8, **lora)}), few)
        for lora in ({}, {"flat_sigma": 0.1})
    )
    assert noisy.backward > plain.backward, "the noise on the projections is what is largest here"


@pytest.mark.parametrize("vocab_size", [500, 128_000])
@pytest.mark.parametrize("again", [False, True])
def test_two_students_tell_what_sixteen_take(vocab_size: int, again: bool) -> None:
    config = LlamaConfig(**{**DEEP.to_dict(), "vocab_size": vocab_size})
    train = TRAIN.model_copy(update={"gradient_checkpointing": again})
    gang = gang_bytes(config, torch.bfloat16, train, {}, 4, 64)
    for size in (1, 4, 16):
        real = pass_bytes(config, torch.bfloat16, train, PassSize(size, 4, 64, 64)).peak
        assert real * 0.98 <= gang.of(size) <= 1.2 * real, "never less, and not much more"
    assert gang.largest(gang.of(7)) == 7 and gang.largest(gang.of(7) - 1) == 6
    assert gang.largest(0) == 0


def test_flash_attention_keeps_no_copies_of_keys_and_values() -> None:
    config = LlamaConfig(**{**DEEP.to_dict(), "num_key_value_heads": 1})
    plain, flash = (pass_bytes(config, torch.bfloat16, TRAIN, PassSize(1, 2, 200, 8, flash)) for flash in (False, True))
    assert flash.activations < plain.activations


def test_an_estimate_stands_in_where_fake_tensors_cannot() -> None:
    shapes = {"q_proj": (64, 64)}
    exact = gang_bytes(DEEP, torch.bfloat16, TRAIN, shapes, 4, 300, 8)
    guess = estimated_gang_bytes(DEEP, torch.bfloat16, TRAIN, shapes, 4 * 300)
    assert 0.7 * exact.backward[1] < guess.backward[1] < 2 * exact.backward[1]


def test_a_base_of_70b_needs_no_memory_and_no_weights() -> None:
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    with fake_base(config, torch.bfloat16, "sdpa") as model:
        assert sum(parameter.numel() for parameter in model.parameters()) > 60e9
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama, grouped queries", "gemma 3, tied head of 128k"])
def test_the_planned_peak_is_the_measured_one(name: str) -> None:
    planned, measured = compare(name)
    assert planned == pytest.approx(measured, rel=0.15)
