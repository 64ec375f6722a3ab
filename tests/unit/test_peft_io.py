from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import make_adapter, make_base
from translora.lora.peft_io import LoraWeights, lora_config, read_lora, write_lora

IDS = torch.tensor([[5, 9, 33, 80, 120, 7]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "base")


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def merged_logits(base: Path, lora: LoraWeights) -> torch.Tensor:
    """The base with W + scaling * B A in place of W: what PEFT's output must be."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for module, (lora_A, lora_B) in lora.modules.items():
            model.get_submodule(module).weight += lora.scaling[module] * (lora_B @ lora_A)
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 3.0},
        {"use_rslora": True},
        {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 1.0}},
        {"rank_pattern": {r"model\.layers\.0\..*": 3}, "use_rslora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 6, "q_proj": 2}},
        {"rank_pattern": {r".*\.(q|k|o)_proj": 2}},
    ],
    ids=["plain", "alpha", "rslora", "all-linear", "patterns", "regex", "first-pattern-wins", "alternatives"],
)
def test_scaling_and_ranks_are_as_in_peft(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank=4, **options)
    lora = read_lora(adapter)
    expected = peft_logits(base, adapter)
    torch.testing.assert_close(merged_logits(base, lora), expected, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS).logits
    assert (expected - plain).abs().max() > 1e-2
    if "rank_pattern" in options:
        assert len({lora_A.shape[0] for lora_A, _ in lora.modules.values()}) > 1
    assert lora.max_rank == max(lora_A.shape[0] for lora_A, _ in lora.modules.values())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "loftq", "new-one"])
def test_inits_that_change_the_base_are_refused(init: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: init_lora_weights is '.*base's weights") as caught:
        read_lora(adapter)
    convertible = init not in {"loftq", "new-one"}
    assert ("path_initial_model_for_weight_conversion" in str(caught.value)) == convertible


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", "eva", True, False])
def test_inits_that_leave_the_base_alone_are_as_in_peft(init: str | bool, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    torch.testing.assert_close(
        merged_logits(base, read_lora(adapter)), peft_logits(base, adapter), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_adapters_are_as_in_peft(init: str, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8.0, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.2
        trained = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="init_lora_weights"):
        read_lora(tmp_path / "raw")
    model.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    torch.testing.assert_close(merged_logits(base, read_lora(tmp_path / "done")), trained, rtol=1e-3, atol=1e-3)


def test_what_is_written_peft_reads(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank=4, alpha=8.0)
    lora = read_lora(adapter)
    (tmp_path / "copy").mkdir()
    write_lora(tmp_path / "copy", lora.modules, alpha=8.0, base_model="base")
    again = read_lora(tmp_path / "copy")
    assert again.scaling == lora.scaling
    assert all(torch.equal(again.modules[m][0], lora.modules[m][0]) for m in lora.modules)
    assert torch.equal(peft_logits(base, tmp_path / "copy"), peft_logits(base, adapter))


def test_writing_keeps_dtype_and_is_repeatable(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(2, 8, generator=generator).bfloat16(), torch.randn(6, 2, generator=generator).bfloat16())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_lora(tmp_path / name, {"model.layers.0.self_attn.q_proj": pair}, alpha=4.0, base_model="base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    lora = read_lora(tmp_path / "one")
    assert lora.modules["model.layers.0.self_attn.q_proj"][0].dtype == torch.bfloat16
    assert lora.scaling == {"model.layers.0.self_attn.q_proj": 2.0}


def test_views_of_larger_tensors_are_written_alone(tmp_path: Path) -> None:
    stacked_A, stacked_B = torch.randn(3, 2, 64), torch.randn(3, 64, 2)
    write_lora(tmp_path, {"m.q_proj": (stacked_A[1], stacked_B[1])}, alpha=1.0, base_model="base")
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2 * 2 * 64 * 4 + 500
    assert torch.equal(read_lora(tmp_path).modules["m.q_proj"][0], stacked_A[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": None}, "r is None"),
        ({"r": True}, "r is True"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, "expected a positive number"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"rank_pattern": [4]}, "rank_pattern is no object"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern.q_proj is '4'"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj is None"),
        ({"rank_pattern": {"(q": 4}}, "no valid pattern"),
        ({"rank_pattern": {"(.*a)+": 4}}, "use plain module names"),
        ({"rank_pattern": {"a*" * 20: 4}}, "use plain module names"),
        ({"rank_pattern": {"q" * 300: 4}}, "use plain module names"),
        ({"rank_pattern": {"a?" * 20 + "a" * 20: 4}}, "use plain module names"),
        ({"rank_pattern": {"(a|aa)?": 4}}, "use plain module names"),
        ({"rank_pattern": {"(a|aa)" * 20: 4}}, "use plain module names"),
        ({"rank_pattern": {"(?x:(a|aa) +)": 4}}, "use plain module names"),
        ({"alpha_pattern": {f"q.*{index}": 4 for index in range(20)}}, "20 keys that are patterns, the limit is 16"),
    ],
)
def test_odd_numbers_are_refused(values: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=r"adapter_config\.json") as caught:
        lora_config(adapter)
    assert message in str(caught.value)


@settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_config_is_read_or_refused(data: st.DataObject, base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    path = adapter / "adapter_config.json"
    if not adapter.exists():
        make_adapter(adapter, base)
    original = path.read_text()
    value = json.loads(original)
    key = data.draw(st.sampled_from(sorted(value)))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    value[key] = data.draw(scalars | st.lists(scalars) | st.dictionaries(st.text(max_size=8), scalars))
    path.write_text(json.dumps(value))
    try:
        read_lora(adapter)
    except ValueError as error:
        assert str(adapter) in str(error)
    finally:
        path.write_text(original)
