"""IterIS: the closed form against a dense solution of its own, the schedule on an encoder-decoder, RegMean."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from tests.ranks import run_ranks
from tests.tiny import make_adapter, make_base
from translora.config.merge import IterisSettings
from translora.lora.bank import load_bank
from translora.lora.peft_io import LoraWeights, read_lora
from translora.merge.features import run_iteris
from translora.merge.grams import collect, shared_inputs
from translora.merge.iteris import Grams, adaptive_weights, gram_update, solve_module

NUM_IN, NUM_OUT = 12, 7


def problem(num: int, seed: int = 0, num_tokens: int = 40) -> dict[str, list]:
    g = torch.Generator().manual_seed(seed)
    ranks = [2, 5, 1, 3][:num]
    return {
        "A": [torch.randn(r, NUM_IN, generator=g, dtype=torch.float64) for r in ranks],
        "B": [torch.randn(NUM_OUT, r, generator=g, dtype=torch.float64) for r in ranks],
        "s": [0.5 + index for index in range(num)],
        "X": [torch.randn(num_tokens + r, NUM_IN, generator=g, dtype=torch.float64) for r in ranks],
        "Y": [torch.randn(num_tokens + r, NUM_IN, generator=g, dtype=torch.float64) for r in ranks],
        "W0": [torch.randn(NUM_OUT, NUM_IN, generator=g, dtype=torch.float64)],
    }


def grams_of(p: dict[str, list], rho: float) -> list[Grams]:
    """Streamed in uneven pieces."""
    found = []
    for x, y in zip(p["X"], p["Y"], strict=True):
        grams = Grams.paired(NUM_IN)
        for piece in (slice(0, 3), slice(3, 20), slice(20, None)):
            gram_update(grams, x[piece], y[piece], rho)
        found.append(grams)
    return found


def dense_weights(p: dict[str, list], norm: str) -> list[float]:
    found = []
    for A, B, s, x in zip(p["A"], p["B"], p["s"], p["X"], strict=True):
        W = s * B.numpy() @ A.numpy() + (p["W0"][0].numpy() if norm == "base+delta" else 0)
        found.append(np.sum(W**2) / np.sum((x.numpy() @ W.T) ** 2))
    return found


def dense_solution(p: dict[str, list], rho: float, norm: str, a1: float, a2: float) -> np.ndarray:
    """W* by solving the normal equations of vec(W) as one Kronecker system."""
    left = np.zeros((NUM_OUT * NUM_IN, NUM_OUT * NUM_IN))
    right = np.zeros((NUM_OUT, NUM_IN))
    for lam, A, B, s, x, y in zip(dense_weights(p, norm), p["A"], p["B"], p["s"], p["X"], p["Y"], strict=True):
        x, y = x.numpy(), y.numpy()
        y = (1 - rho) * y + rho * x
        G, H = x.T @ y, y.T @ y
        G = G + a1 * np.sqrt((G**2).sum()) * np.eye(NUM_IN)
        H = H + a2 * np.sqrt((H**2).sum()) * np.eye(NUM_IN)
        right += lam * (s * B.numpy() @ A.numpy()) @ G
        left += lam * np.kron(np.eye(NUM_OUT), H.T)
    return np.linalg.solve(left, right.reshape(-1)).reshape(NUM_OUT, NUM_IN)


@pytest.mark.parametrize("norm", ["delta", "base+delta"])
@pytest.mark.parametrize(("rho", "a1", "a2"), [(0.0, 0.0, 0.0), (0.3, 0.0, 0.0), (0.0, 1e-2, 3e-2), (0.3, 1e-7, 1e-4)])
@pytest.mark.parametrize("num", [2, 3, 4])
def test_the_closed_form_is_the_dense_solution(num: int, rho: float, a1: float, a2: float, norm: str) -> None:
    p = problem(num)
    grams = grams_of(p, rho)
    weights = adaptive_weights(p["A"], p["B"], p["s"], grams, norm=norm, base_weight=p["W0"][0])
    assert weights == pytest.approx(dense_weights(p, norm), rel=1e-12)
    lora_A, lora_B = solve_module(p["A"], p["B"], p["s"], weights, grams, a1=a1, a2=a2)
    assert lora_A.shape == (sum(map(len, p["A"])), NUM_IN) and lora_B.shape == (NUM_OUT, len(lora_A))
    dense = dense_solution(p, rho, norm, a1, a2)
    assert np.abs((lora_B @ lora_A).numpy() - dense).max() < 1e-10 * max(1, np.abs(dense).max())


def test_without_regularisation_it_is_the_least_squares_solution() -> None:
    p = problem(3)
    grams = grams_of(p, 0.0)
    weights = [0.3, 2.0, 1.0]
    lora_A, lora_B = solve_module(p["A"], p["B"], p["s"], weights, grams)
    rows = np.concatenate([np.sqrt(w) * y.numpy() for w, y in zip(weights, p["Y"], strict=True)])
    wanted = [
        np.sqrt(w) * x.numpy() @ (s * B @ A).numpy().T
        for w, x, s, A, B in zip(weights, p["X"], p["s"], p["A"], p["B"], strict=True)
    ]
    solution = np.linalg.lstsq(rows, np.concatenate(wanted), rcond=None)[0].T
    assert np.abs((lora_B @ lora_A).numpy() - solution).max() < 1e-10


def test_fewer_tokens_than_inputs_give_the_solution_of_least_norm() -> None:
    p = problem(2, num_tokens=1)
    grams = []
    for x in p["X"]:
        grams.append(Grams.first(NUM_IN))
        gram_update(grams[-1], x)
    lora_A, lora_B = solve_module(p["A"], p["B"], p["s"], [1.0, 1.0], grams)
    rows = torch.cat(p["X"]).numpy()
    assert len(rows) < NUM_IN, "rank-deficient"
    wanted = torch.cat([x @ (s * B @ A).T for x, s, A, B in zip(p["X"], p["s"], p["A"], p["B"], strict=True)]).numpy()
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    assert np.abs((lora_B @ lora_A).numpy() - solution).max() < 1e-8


def test_a_task_without_the_module_pulls_it_to_zero() -> None:
    p = problem(2)
    p["A"][1], p["B"][1] = p["A"][1][:0], p["B"][1][:, :0]
    grams = grams_of(p, 0.0)
    weights = adaptive_weights(p["A"], p["B"], p["s"], grams)
    assert weights[1] == pytest.approx(NUM_IN / float(p["X"][1].square().sum()))
    lora_A, lora_B = solve_module(p["A"], p["B"], p["s"], weights, grams)
    alone = torch.linalg.norm(p["Y"][1] @ (p["s"][0] * p["B"][0] @ p["A"][0]).T)
    assert len(lora_A) == 2 and torch.linalg.norm(p["Y"][1] @ (lora_B @ lora_A).T) < alone


def test_wrong_use_is_one_error() -> None:
    x = torch.randn(3, NUM_IN)
    with pytest.raises(ValueError, match="not the same tokens"):
        gram_update(Grams.paired(NUM_IN), x, x[:2])
    with pytest.raises(ValueError, match=r"Grams\.paired"):
        gram_update(Grams.first(NUM_IN), x, x)
    p = problem(2)
    with pytest.raises(ValueError, match="needs base_weight"):
        adaptive_weights(p["A"], p["B"], p["s"], grams_of(p, 0), norm="base+delta")
    with pytest.raises(ValueError, match="with_inputs"):
        adaptive_weights(p["A"], p["B"], p["s"], [Grams.paired(NUM_IN, with_inputs=False)] * 2)


def random_loras(model: torch.nn.Module, lasts: tuple[str, ...], ranks: tuple[int, ...]) -> list[LoraWeights]:
    g = torch.Generator().manual_seed(3)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in lasts
    }
    return [
        LoraWeights(
            modules={
                name: (
                    torch.randn(rank, module.in_features, generator=g, dtype=torch.float64) * 0.3,
                    torch.randn(module.out_features, rank, generator=g, dtype=torch.float64) * 0.3,
                )
                for name, module in linears.items()
            },
            scaling=dict.fromkeys(linears, 0.5 + rank),
            config={},
        )
        for rank in ranks
    ]


def seq2seq_batches(seed: int) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for rows in (3, 2):
        mask, decoder_mask = torch.ones(rows, 9, dtype=torch.long), torch.ones(rows, 5, dtype=torch.long)
        mask[-1, 6:] = 0
        decoder_mask[0, 4:] = 0
        found.append(
            {
                "input_ids": torch.randint(3, 60, (rows, 9), generator=g),
                "attention_mask": mask,
                "decoder_input_ids": torch.randint(3, 60, (rows, 5), generator=g),
                "decoder_attention_mask": decoder_mask,
            }
        )
    return found


def test_an_encoder_block_does_not_change_after_the_solve_behind_its_own() -> None:
    """Block j (from 0) has its final inputs once blocks 0..j-1 are final: from solve j + 1 (from 1) on."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=4, num_decoder_layers=2, num_heads=4, dropout_rate=0.0
    )
    model = T5ForConditionalGeneration(config).double().eval()
    loras = random_loras(model, ("q", "v"), (2, 3, 1))
    history: list[dict[str, torch.Tensor]] = []
    settings = IterisSettings(max_iter=6, a1=1e-6, a2=1e-6)
    run_iteris(
        model,
        loras,
        [seq2seq_batches(seed) for seed in range(3)],
        settings,
        lambda _, merged: history.append({name: B @ A for name, (A, B) in merged.items()}),
    )
    assert len(history) == 6 and any("EncDecAttention" in name for name in history[0])
    for block in range(4):
        for name in [name for name in history[0] if name.startswith(f"encoder.block.{block}.")]:
            steps = [float((after[name] - before[name]).abs().max()) for before, after in itertools.pairwise(history)]
            assert max(steps[block:], default=0.0) < 1e-9, (name, steps)
            assert all(step > 1e-6 for step in steps[:block]), (name, steps)
    assert type(model.encoder.block[0].layer[0].SelfAttention.q) is torch.nn.Linear, "the model is left as it was"


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("llama")
    base = make_base(root / "base")
    return base, [make_adapter(root / "a", base, 1, 2, use_rslora=True), make_adapter(root / "b", base, 2, 4)]


@pytest.fixture(scope="module")
def llama(llama_files):
    base, dirs = llama_files
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval(), [read_lora(path) for path in dirs]


def causal_batches(seed: int, pad: int = 0) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (3, 8), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return [{"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}]


def inputs_with_peft(model: torch.nn.Module, lora: LoraWeights, batch: dict[str, torch.Tensor]):
    """Inputs of every adapted module, by plain arithmetic on the weights instead of the bank."""
    seen: dict[str, torch.Tensor] = {}
    handles, olds = [], {}
    for name, (A, B) in lora.modules.items():
        module = model.get_submodule(name)
        olds[name] = module.weight.data.clone()
        module.weight.data += lora.scaling[name] * B.double() @ A.double()
        handles.append(
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        )
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    for name, old in olds.items():
        model.get_submodule(name).weight.data = old
    return {name: x[batch["attention_mask"].bool()] for name, x in seen.items()}


def test_one_solve_with_equal_weights_is_regmean(llama) -> None:
    model, loras = llama
    data = [causal_batches(0), causal_batches(1)]
    settings = IterisSettings(max_iter=1, a1=0, a2=0, norm="equal")
    merged = run_iteris(model, loras, data, settings)
    features = [inputs_with_peft(model, lora, batches[0]) for lora, batches in zip(loras, data, strict=True)]
    for name, (A, B) in merged.items():
        rows = torch.cat([x[name] for x in features]).numpy()
        targets = torch.cat(
            [
                x[name] @ (lora.scaling[name] * lora.modules[name][1].double() @ lora.modules[name][0].double()).T
                for x, lora in zip(features, loras, strict=True)
            ]
        ).numpy()
        regmean = np.linalg.lstsq(rows, targets, rcond=None)[0].T
        # The bank keeps scalings in float32, and 8 / sqrt(2) is none: the features differ in the eighth digit.
        assert np.abs((B @ A).numpy() - regmean).max() < 1e-6, name


@pytest.mark.parametrize("norm", ["delta", "base+delta"])
def test_the_second_solve_takes_the_inputs_of_the_model_merged_so_far(llama, norm) -> None:
    """Reference: numpy, on inputs by plain arithmetic on the weights; every ingredient at a value of its own."""
    model, loras = llama
    data = [causal_batches(0), causal_batches(1)]
    a1, a2, rho = 1e-3, 1e-2, 0.3
    solves = []
    settings = IterisSettings(max_iter=2, reg_coef=rho, norm=norm, a1=a1, a2=a2)
    run_iteris(model, loras, data, settings, lambda _, merged: solves.append(merged))
    so_far = LoraWeights(modules=solves[0], scaling=dict.fromkeys(solves[0], 1.0), config={})
    own = [inputs_with_peft(model, lora, batches[0]) for lora, batches in zip(loras, data, strict=True)]
    merged = [inputs_with_peft(model, so_far, batches[0]) for batches in data]
    for name in solves[1]:
        left = right = 0
        for lora, x_of, y_of in zip(loras, own, merged, strict=True):
            A, B = (factor.double().numpy() for factor in lora.modules[name])
            W, x = lora.scaling[name] * B @ A, x_of[name].numpy()
            y = (1 - rho) * y_of[name].numpy() + rho * x
            V = W + (model.get_submodule(name).weight.detach().numpy() if norm == "base+delta" else 0)
            weight = (V**2).sum() / ((x @ V.T) ** 2).sum()
            G, H = x.T @ y, y.T @ y
            right = right + weight * W @ (G + a1 * np.linalg.norm(G) * np.eye(len(G)))
            left = left + weight * (H + a2 * np.linalg.norm(H) * np.eye(len(H)))
        expected = right @ np.linalg.inv(left)
        A, B = solves[1][name]
        # The bank keeps scalings in float32: the inputs differ in the eighth digit.
        assert np.abs((B @ A).numpy() - expected).max() < 1e-5 * np.abs(expected).max(), name
        change = np.abs((solves[0][name][1] @ solves[0][name][0]).numpy() - expected).max()
        assert bool(change > 1e-3 * np.abs(expected).max()) == (".layers.0." not in name), "behind the first layer"


def test_a_task_without_inputs_is_refused(llama) -> None:
    model, loras = llama
    for data in ([[], causal_batches(0)], [causal_batches(0), []]):
        with pytest.raises(ValueError, match=f"adapter {1 + data.index([])}: there are no inputs for it"):
            run_iteris(model, loras, data, IterisSettings(max_iter=1))


def merge_share(rank: int, root: str, base: str, dirs: list[str]) -> None:
    """One of two ranks: half of each task's batches."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    data = [[*causal_batches(task), *causal_batches(task + 5)][rank : rank + 1] for task in range(2)]
    merged = run_iteris(model, [read_lora(path) for path in dirs], data, IterisSettings(max_iter=3))
    torch.save(merged, f"{root}/merged-{rank}.pt")


def test_ranks_with_a_share_of_the_samples_each_get_the_same_adapter(llama_files, llama, tmp_path) -> None:
    base, dirs = llama_files
    run_ranks(merge_share, tmp_path, str(tmp_path), str(base), [str(path) for path in dirs])
    model, loras = llama
    data = [[*causal_batches(task), *causal_batches(task + 5)] for task in range(2)]
    whole = run_iteris(model, loras, data, IterisSettings(max_iter=3))
    shares = [torch.load(tmp_path / f"merged-{rank}.pt") for rank in range(2)]
    for name, (A, B) in whole.items():
        assert torch.equal(shares[0][name][0], shares[1][name][0])
        assert torch.allclose(B @ A, shares[0][name][1] @ shares[0][name][0], atol=1e-8), name


def test_no_more_grams_are_there_than_the_bound_lets(llama, monkeypatch) -> None:
    """Of every block that is collected, the last block's are gone."""
    model, loras = llama
    there, most = weakref.WeakSet(), []

    def counted(make):
        def made(*arguments, **options):
            grams = make(*arguments, **options)
            there.add(grams)
            most.append(len(there))
            return grams

        return made

    monkeypatch.setattr(Grams, "__hash__", object.__hash__)
    for name in ("first", "paired"):
        monkeypatch.setattr(Grams, name, counted(getattr(Grams, name)))
    settings = IterisSettings(max_iter=2, max_gram_gigabytes=1e-9)
    run_iteris(model, loras, [causal_batches(0), causal_batches(1)], settings)
    assert len(most) > 4 and max(most) == 2, "one leader's, of two tasks"


def test_inputs_without_rows_are_refused() -> None:
    """OPT's fc1 is given rows and tokens in one."""
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "vocab_size": 300}
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=1, num_attention_heads=2, dropout=0.0, **sizes)).eval()
    name = "model.decoder.layers.0.fc1"
    loras = [LoraWeights({name: (torch.randn(2, 16), torch.randn(32, 2))}, {name: 1.0}, {}) for _ in range(2)]
    with pytest.raises(ValueError, match=f"{name}: is given its inputs as .*; merge by cat or by a method without"):
        run_iteris(model, loras, [causal_batches(0), causal_batches(1)], IterisSettings(max_iter=1))


def test_padding_does_not_count_and_modules_share_inputs(llama) -> None:
    model, loras = llama
    settings = IterisSettings(max_iter=2, max_gram_gigabytes=1e-9)
    one, other = (
        run_iteris(model, loras, [causal_batches(0, pad), causal_batches(1, pad)], settings) for pad in (0, 17)
    )
    whole = run_iteris(model, loras, [causal_batches(0), causal_batches(1)], IterisSettings(max_iter=2))
    for name, (A, B) in one.items():
        assert torch.allclose(B @ A, other[name][1] @ other[name][0], atol=1e-12)
        assert torch.allclose(B @ A, whole[name][1] @ whole[name][0], atol=1e-9), "the memory limit changes nothing"
    bank = load_bank(model, {"0": loras[0], "merged": loras[1]})
    leaders = shared_inputs(model, bank, causal_batches(0)[0])
    assert {leaders[name] for name in leaders if name.endswith("v_proj")} == {
        name for name in leaders if name.endswith("q_proj")
    }
    grams = collect(model, bank, causal_batches(0), "0", leaders, with_merged=True)
    assert set(grams) == set(leaders.values())
    bank.detach(model)
