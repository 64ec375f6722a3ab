from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.tiny import make_adapter, make_base
from translora.engine.attention import PACKED, packed_inputs
from translora.engine.memory import adapter_sizes, bank_numbers
from translora.lora.bank import AdapterBank, initial_weights, load_bank, new_bank
from translora.lora.banked import Segment, SegmentLora, Slot
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


def test_a_module_has_room_for_those_alone_that_adapt_it(base: Path, adapters: dict[str, Path]) -> None:
    """Of their greatest rank, and as a plan counts it."""
    bank = load_bank(load(base), {name: read_lora(path) for name, path in adapters.items()})
    loras = [read_lora(path) for path in adapters.values()]
    for name, module in bank.modules.items():
        own = [lora.modules[name] for lora in loras if name in lora.modules]
        assert module.lora_A.shape[:2] == (len(own) + 1, max(len(lora_A) for lora_A, _ in own))
    assert {len(module.lora_A) for module in bank.modules.values()} > {len(adapters) + 1}, "some adapt less than others"
    numbers = sum(module.lora_A.numel() + module.lora_B.numel() for module in bank.modules.values())
    assert numbers == bank_numbers([adapter_sizes(str(path)) for path in adapters.values()])


def test_scaling_is_not_rounded_to_the_dtype_of_the_base(base: Path, tmp_path: Path) -> None:
    """20/12 is none of bfloat16's numbers; alone or among others, an adapter is as strong as it was trained."""
    adapter = make_adapter(tmp_path / "adapter", base, rank=12, alpha=20)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    lora = read_lora(adapter)
    bank = load_bank(model, {"one": lora, "two": lora})
    name, module = next(iter(bank.modules.items()))
    x_BTI = torch.randn(64, 8, module.base.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    lora_A, lora_B = (factor.bfloat16().double() for factor in lora.modules[name])
    wanted = 20 / 12 * x_BTI.double() @ lora_A.T @ lora_B.T
    for names in (["one"] * 64, ["one", "two"] * 32):
        bank.route_rows(names, torch.device("cpu"))
        with torch.no_grad():
            update = module(x_BTI).double() - module.base(x_BTI).double()
        gain = float((update * wanted).sum() / (wanted * wanted).sum())
        assert gain == pytest.approx(1, abs=6e-4), names[:2]


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
            module.slots[bank.slot("plain")].lora_A.fill_(float("nan"))
        after = model(ids_BT).logits
    assert after[0].isnan().all()
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=0)


def segments_of(names: list[str | None], bank: AdapterBank, length: int) -> list[Segment]:
    return [Segment(bank.slot(name), i * length, (i + 1) * length) for i, name in enumerate(names)]


def test_each_segment_of_a_packed_batch_equals_its_row_of_a_mixed_batch(base: Path, adapters: dict[str, Path]) -> None:
    ids_BT = torch.randint(4, 300, (len(adapters) + 1, 9), generator=torch.Generator().manual_seed(0))
    model = load(base)
    bank = load_bank(model, {name: read_lora(path) for name, path in adapters.items()})
    names: list[str | None] = [*adapters, None]
    with torch.no_grad():
        bank.route_rows(names, torch.device("cpu"))
        mixed = model(ids_BT).logits
        model.set_attn_implementation(PACKED)
        bank.route_segments(segments_of(names, bank, 9))
        packed = model(ids_BT.reshape(1, -1), **packed_inputs([9] * len(names), torch.device("cpu"))).logits
    torch.testing.assert_close(packed[0], mixed.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_gradients_of_segments_equal_autograd() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out, x, slope = random(1, 9, 4), random(1, 9, 6), random(1, 9, 4)
    slots = [
        Slot(A, B, scaling, torch.ones_like(A), torch.ones_like(B))
        for A, B, scaling in ((random(2, 6), random(4, 2), 0.5), (random(3, 6), random(4, 3), 2.0))
    ]
    parts = [(slice(0, 3), slots[0]), (slice(3, 5), None), (slice(5, 9), slots[1])]
    anchor = torch.zeros((), requires_grad=True)
    leaves = [tensor.clone().requires_grad_() for tensor in (out, x, *slots[0][:2], *slots[1][:2])]
    expected = leaves[0].clone()
    expected[0, :3] += 0.5 * leaves[1][0, :3] @ leaves[2].T @ leaves[3].T
    expected[0, 5:] += 2.0 * leaves[1][0, 5:] @ leaves[4].T @ leaves[5].T
    expected.backward(slope)
    own = [tensor.clone().requires_grad_() for tensor in (out, x)]
    result = SegmentLora.apply(own[0] * 1, own[1], anchor, parts)
    torch.testing.assert_close(result, expected)
    result.backward(slope)
    for mine, theirs in zip(own, leaves[:2], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for grad, theirs in zip((*slots[0][3:5], *slots[1][3:5]), leaves[2:], strict=True):
        torch.testing.assert_close(grad, 1 + theirs.grad)  # added to what is there


def test_a_first_layer_is_trained_although_its_input_is_frozen() -> None:
    slot = Slot(torch.ones(1, 3), torch.ones(2, 1), 1.0, torch.zeros(1, 3), torch.zeros(2, 1))
    anchor = torch.zeros((), requires_grad=True)
    SegmentLora.apply(torch.zeros(1, 2, 2), torch.ones(1, 2, 3), anchor, [(slice(0, 2), slot)]).sum().backward()
    assert slot.grad_A.tolist() == [[4.0] * 3] and slot.grad_B.tolist() == [[6.0]] * 2


def test_trainable_slots_start_as_the_base_and_export_to_peft(base: Path, tmp_path: Path) -> None:
    model = load(base)
    model.set_attn_implementation(PACKED)
    bank = new_bank(model, ["q_proj", "v_proj"])
    assert not any(p.requires_grad for p in model.parameters()) and len(bank.modules) == 4
    weights = initial_weights(bank.shapes, 4, seed=3)
    ids_1T = torch.randint(4, 300, (1, 7), generator=torch.Generator().manual_seed(2))
    inputs = packed_inputs([7], torch.device("cpu"))
    bank.open_slot(5, weights, scaling=2.0)
    bank.route_segments([Segment(5, 0, 7)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids_1T, **inputs).logits, load(base)(ids_1T).logits)
        generator = torch.Generator().manual_seed(4)
        for _, lora_B in weights.values():
            lora_B.copy_(torch.randn(lora_B.shape, generator=generator) * 0.2)
        trained = model(ids_1T, **inputs).logits
    (tmp_path / "adapter").mkdir()
    write_lora(tmp_path / "adapter", weights, alpha=8, base_model="base")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()(ids_1T).logits
        torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
        bank.close_slot(5)
        torch.testing.assert_close(model(ids_1T, **inputs).logits, load(base)(ids_1T).logits)


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
    with pytest.raises(ValueError, match=r"qkv_proj not in the base; it has .*q_proj.* in its place .* q_proj"):
        new_bank(load(base), ["qkv_proj"])
