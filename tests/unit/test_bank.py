from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.tiny import make_adapter, make_base
from translora.lora.bank import initial_weights, load_bank, new_bank
from translora.lora.peft_io import read_lora, write_lora

OPTIONS = {
    "plain": {"rank": 4},
    "smaller rank": {"rank": 2, "alpha": 3.0},
    "rslora": {"rank": 8, "use_rslora": True},
    "all linear modules": {"rank": 4, "target_modules": ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")},
    "rank and alpha patterns": {
        "rank": 4,
        "rank_pattern": {"v_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
    },
}


def load(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bank") / "base", request.param)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {
        name: make_adapter(base.parent / f"adapter{seed}", base, seed=seed, **options)  # type: ignore[arg-type]
        for seed, (name, options) in enumerate(OPTIONS.items())
    }


def test_each_row_of_a_mixed_batch_equals_peft(base: Path, adapters: dict[str, Path]) -> None:
    ids_BT = torch.randint(4, 300, (len(adapters) + 1, 9), generator=torch.Generator().manual_seed(0))
    model = load(base)
    bank = load_bank(model, {name: read_lora(path) for name, path in adapters.items()})
    names: list[str | None] = [*adapters, None]
    bank.route_rows(names, torch.device("cpu"))
    with torch.no_grad():
        mixed = model(ids_BT).logits
        bare = load(base)(ids_BT).logits
        for row, name in enumerate(names):
            if name is None:
                torch.testing.assert_close(mixed[row], bare[row])
                continue
            expected = PeftModel.from_pretrained(load(base), adapters[name]).eval()(ids_BT[row : row + 1]).logits[0]
            torch.testing.assert_close(
                mixed[row], expected, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )
            # The classic failure is a base that answers for its adapter without a word.
            assert (mixed[row] - bare[row]).abs().max() > 1e-2, name


def test_a_batch_of_one_adapter_equals_the_mixed_batch(base: Path, adapters: dict[str, Path]) -> None:
    ids_BT = torch.randint(4, 300, (3, 7), generator=torch.Generator().manual_seed(1))
    model = load(base)
    bank = load_bank(model, {name: read_lora(path) for name, path in adapters.items()})
    with torch.no_grad():
        bank.route_rows(["plain"] * 3, torch.device("cpu"))
        alone = model(ids_BT).logits
        bank.route_rows(["plain", "rslora", "plain"], torch.device("cpu"))
        mixed = model(ids_BT).logits
    torch.testing.assert_close(alone[[0, 2]], mixed[[0, 2]], rtol=1e-5, atol=1e-5)
    assert (alone[1] - mixed[1]).abs().max() > 1e-2


def test_a_neighbour_that_is_not_a_number_poisons_nobody(base: Path, adapters: dict[str, Path]) -> None:
    ids_BT = torch.randint(4, 300, (3, 7), generator=torch.Generator().manual_seed(5))
    model = load(base)
    bank = load_bank(model, {name: read_lora(adapters[name]) for name in ("plain", "rslora")})
    bank.route_rows(["plain", "rslora", None], torch.device("cpu"))
    with torch.no_grad():
        before = model(ids_BT).logits
        for module in bank.modules.values():
            module.lora_A[bank.slot("plain")] = float("nan")
        after = model(ids_BT).logits
    assert after[0].isnan().all()
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=0)


def test_trainable_slots_start_as_the_base_and_export_to_peft(base: Path, tmp_path: Path) -> None:
    model = load(base)
    bank = new_bank(model, ["student"], target_modules=["q_proj", "v_proj"], rank=4, alpha=8)
    assert [p.requires_grad for p in model.parameters()].count(True) == len(bank.parameters()) > 0
    shapes = {name: (module.base.out_features, module.base.in_features) for name, module in bank.modules.items()}
    weights = initial_weights(shapes, 4, seed=3)
    ids_BT = torch.randint(4, 300, (2, 7), generator=torch.Generator().manual_seed(2))
    bank.route_rows(["student"] * 2, torch.device("cpu"))
    with torch.no_grad():
        for name, module in bank.modules.items():
            module.lora_A[0].copy_(weights[name][0])
        torch.testing.assert_close(model(ids_BT).logits, load(base)(ids_BT).logits)
        generator = torch.Generator().manual_seed(4)
        for module in bank.modules.values():
            module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator) * 0.2)
        trained = model(ids_BT).logits
    (tmp_path / "adapter").mkdir()
    exported = {name: (module.lora_A[0], module.lora_B[0]) for name, module in bank.modules.items()}
    write_lora(tmp_path / "adapter", exported, alpha=8, base_model="base")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()(ids_BT).logits
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    one = initial_weights({"a": (8, 6), "b": (4, 6)}, 2, seed=1)
    again = initial_weights({"a": (8, 6), "b": (4, 6)}, 2, seed=1)
    other = initial_weights({"a": (8, 6), "b": (4, 6)}, 2, seed=2)
    assert torch.equal(one["a"][0], again["a"][0])
    assert not torch.equal(one["a"][0], other["a"][0])
    assert one["b"][0].abs().max() <= 6**-0.5
    assert not one["b"][1].any()


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    wider = make_base(tmp_path / "wider", hidden_size=64)
    adapter = read_lora(make_adapter(tmp_path / "adapter", wider))
    with pytest.raises(ValueError, match=r"q_proj is 32 -> 32 in this base, but 64 -> 64 in the adapter"):
        load_bank(load(base), {"stranger": adapter})
    deeper = make_base(tmp_path / "deeper", num_layers=3)
    with pytest.raises(ValueError, match=r"the base has no linear module model.layers.2"):
        load_bank(load(base), {"stranger": read_lora(make_adapter(tmp_path / "deep_adapter", deeper))})


def test_an_unknown_target_module_is_refused_with_the_names_that_exist(base: Path) -> None:
    with pytest.raises(ValueError, match=r"no linear module 'qkv_proj' in the base; it has .*q_proj"):
        new_bank(load(base), ["student"], target_modules=["qkv_proj"], rank=4, alpha=8)
