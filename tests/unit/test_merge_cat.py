"""CAT: gradients against autograd through an explicit sum, export against the trained forward, learning."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tests.tiny import make_adapter, make_base
from translora.config.merge import CatSettings
from translora.distill.data import Sample
from translora.lora.peft_io import read_lora, write_lora
from translora.merge.cat import answer_loss, cat_modules, export, train_coefficients
from translora.merge.data import pad_batch
from translora.merge.run import pad_rank

SAMPLES = [Sample([5 + i, 7, 9 + i, 30], [40 + 2 * i, 41, 3]) for i in range(8)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("cat")
    base = make_base(root / "base")
    paths = [
        make_adapter(root / "a", base, 1, 2, use_rslora=True),
        make_adapter(root / "b", base, 2, 4),
        make_adapter(root / "c", base, 3, 3, target_modules=["v_proj", "o_proj"]),
    ]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return root, base, model, [read_lora(path) for path in paths]


@pytest.mark.parametrize("softmax", [True, False])
def test_gradients_are_those_of_an_explicit_sum(world, softmax: bool) -> None:
    *_, model, loras = world
    model = model.double()
    batch = pad_batch(SAMPLES[:3], 0, with_labels=True)
    with cat_modules(model, loras, softmax) as modules:
        for index, module in enumerate(modules.values()):
            module.values_N.data = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64) + 0.1 * index
        answer_loss(model, batch).backward()
        found = {name: module.values_N.grad.clone() for name, module in modules.items()}
        starts = {name: module.values_N.detach().clone().requires_grad_() for name, module in modules.items()}
    weights = {}
    for name, values in starts.items():
        alpha = values.exp() / values.exp().sum() if softmax else values
        total = model.get_submodule(name).weight
        for index, lora in enumerate(loras):
            if name in lora.modules:
                A, B = (factor.double() for factor in lora.modules[name])
                total = total + alpha[index] * lora.scaling[name] * (B @ A)
        weights[f"{name}.weight"] = total
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = functional_call(model, weights, args=(), kwargs=inputs).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:].flatten())
    for name, gradient in zip(starts, torch.autograd.grad(loss, list(starts.values())), strict=True):
        assert gradient.abs().max() > 1e-6
        assert torch.allclose(gradient, found[name], rtol=1e-5, atol=1e-8), name
    model.float()


@pytest.mark.parametrize("kind", ["softmax", "unconstrained"])
def test_the_exported_adapter_is_the_trained_forward(world, kind: str) -> None:
    root, base, model, loras = world
    settings = CatSettings(coefficients=kind, epochs=4, batch_size=4, learning_rate=0.1)
    learnt = train_coefficients(model, loras, SAMPLES, settings)
    assert len(learnt.losses) == 8 and min(learnt.losses[4:]) < learnt.losses[0]
    batch = pad_batch(SAMPLES, 0)
    with cat_modules(model, loras, softmax=False) as modules, torch.no_grad():
        for name, module in modules.items():
            module.values_N.copy_(torch.tensor(learnt.by_module[name]))
        trained = model(**batch).logits
        plain = {name: torch.tensor(values) for name, values in learnt.by_module.items()}
    if kind == "softmax":
        assert all(abs(float(values.sum()) - 1) < 1e-6 for values in plain.values())
    assert max(float((values - 1 / 3).abs().max()) for values in plain.values()) > 0.05, "they moved"
    merged = export(loras, learnt.by_module)
    rank = max(len(A) for A, _ in merged.values())
    assert rank == 2 + 4 + 3
    out = root / f"out-{kind}"
    out.mkdir()
    write_lora(
        out,
        {name: pad_rank(pair, rank) for name, pair in merged.items()},
        alpha=float(rank),
        base_model=str(base),
        target_modules=sorted(merged),
    )
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out).eval()
    with torch.no_grad():
        assert (loaded(**batch).logits - trained).abs().max() < 1e-6 * max(1.0, float(trained.abs().max()))


def test_the_start_is_uniform_and_the_base_stays(world) -> None:
    *_, model, loras = world
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learnt = train_coefficients(model, loras, SAMPLES, CatSettings(learning_rate=1e-12, epochs=0.5))
    assert all(value == pytest.approx(1 / 3, abs=1e-6) for values in learnt.by_module.values() for value in values)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_without_answers_there_is_nothing_to_learn_from(world) -> None:
    *_, model, loras = world
    with pytest.raises(ValueError, match="no row has an answer"):
        train_coefficients(model, loras, [Sample([1, 2], [])], CatSettings())


def test_rows_without_an_answer_are_left_out(world) -> None:
    *_, model, loras = world
    settings = CatSettings(learning_rate=0.05, epochs=1, batch_size=2)
    silent = [Sample([5, 7, 9], []) for _ in range(6)]
    found = train_coefficients(model.float(), loras, [*silent, *SAMPLES], settings, seed=3)
    alone = train_coefficients(model, loras, SAMPLES, settings, seed=3)
    assert found == alone and len(found.losses) == len(SAMPLES) // 2
