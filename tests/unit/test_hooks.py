"""Weight noise (Flat-LoRA) and the sketch of inputs (EVA): their defining properties, in the bank and in a gang."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.whole import WholeBase
from tests.tiny import make_base
from translora.config import LoraSettings, TrainConfig
from translora.distill.gang import Gang
from translora.distill.hooks import InputSketch, ModuleHook, WeightNoise, row_norms, sketch_bytes, student_hooks
from translora.distill.job import TrainJob
from translora.distill.memory import student_bytes
from translora.distill.train import run_pass
from translora.lora.banked import BankedLinear, Route, Segment, Slot
from translora.run.files import write_jsonl

CPU = torch.device("cpu")
NUM_OUT, NUM_IN, RANK = 6, 10, 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_noise_is_that_of_perturbed_weights_in_both_passes() -> None:
    """A module with the noise in its weights, by autograd, has the same outputs and the same gradients."""
    linear = torch.nn.Linear(NUM_IN, NUM_OUT, bias=False).requires_grad_(False)
    noise = WeightNoise(linear.weight.norm(dim=1), NUM_IN, 0.3, seed=5)
    noise.step, noise.sigma = 4, 0.3
    lora_A, lora_B, x_1TI = random(RANK, NUM_IN), random(NUM_OUT, RANK, seed=1), random(1, 7, NUM_IN, seed=2)
    route, own = Route(), slice(2, 6)
    module = BankedLinear(linear, route)
    route.segments = (Segment(-1, 0, 2), Segment(0, 2, 6), Segment(-1, 6, 7))
    grad_A, grad_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    module.slots[0] = Slot(lora_A, lora_B, 2.0, grad_A, grad_B, ModuleHook(noise, None))
    seen_1TI = x_1TI.clone().requires_grad_()
    out_1TO = module(seen_1TI)
    target_1TO = random(*out_1TO.shape, seed=3)
    (out_1TO * target_1TO).sum().backward()

    factors = [factor.clone().requires_grad_() for factor in (lora_A, lora_B)]
    known_1TI = x_1TI.clone().requires_grad_()
    weights = linear.weight + noise.matrix(x_1TI) + 2.0 * factors[1] @ factors[0]
    plain_1TO = known_1TI @ linear.weight.T
    expected_1TO = torch.cat([plain_1TO[:, :2], known_1TI[:, own] @ weights.T, plain_1TO[:, 6:]], dim=1)
    (expected_1TO * target_1TO).sum().backward()
    torch.testing.assert_close(out_1TO, expected_1TO)
    for found, expected in ((seen_1TI, known_1TI), (grad_A, factors[0]), (grad_B, factors[1])):
        gradient = found.grad if found.requires_grad else found
        torch.testing.assert_close(gradient, expected.grad)


def test_noise_is_relative_to_the_rows_of_the_weights_and_new_in_each_step() -> None:
    norms_O = torch.tensor([1.0, 4.0, 0.5])
    noise = WeightNoise(norms_O, 4000, 0.2, seed=1)
    noise.sigma = 0.2
    drawn = []
    for step in range(3):
        noise.step = step
        matrix_OI = noise.matrix(torch.zeros(1))
        torch.testing.assert_close(matrix_OI.norm(dim=1), 0.2 * norms_O, rtol=0.05, atol=0)
        assert (matrix_OI.mean(dim=1) / norms_O).abs().max() < 5 * 0.2 / 4000, "five standard deviations of the mean"
        assert torch.equal(matrix_OI, noise.matrix(torch.zeros(1))), "both passes of a step see the same"
        drawn.append(matrix_OI)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_noise_rises_along_half_a_cosine() -> None:
    lora = TrainConfig.model_validate({"lora": {"flat_sigma": 0.1}}).lora
    hooks = student_hooks(lora, {"a": (NUM_OUT, NUM_IN)}, {"a": torch.ones(NUM_OUT)}, 3, CPU)
    noise = hooks.by_module["a"].noise
    assert noise is not None and hooks.by_module["a"].sketch is None
    found = []
    for step in range(5):
        hooks.begin(step, 4)
        found.append(noise.sigma)
    assert found == pytest.approx([0, 0.05 * (1 - math.sqrt(0.5)), 0.05, 0.05 * (1 + math.sqrt(0.5)), 0.1])


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_a_sketch_finds_the_principal_components(seed: int, num_batches: int) -> None:
    """Inputs with a few strong directions among noise around a far mean, in any number of batches."""
    X = random(120, 4, seed=seed) * torch.tensor([40.0, 20.0, 10.0, 5.0]) @ random(4, 64, seed=seed + 1)
    X += 0.05 * random(120, 64, seed=seed + 2) + 30 * random(64, seed=seed + 3)
    sketch = InputSketch(64, RANK, seed, CPU)
    for batch in X.chunk(num_batches):
        sketch.update(batch)
    expected = torch.linalg.svd(X - X.mean(dim=0), full_matrices=False)[2][:RANK]
    found = sketch.principal_components()
    assert found.shape == (RANK, 64)
    torch.testing.assert_close((found * expected).sum(dim=1).abs(), torch.ones(RANK), rtol=1e-3, atol=0)


def test_the_bytes_of_a_sketch_are_what_it_holds() -> None:
    for num_in in (10, 64):
        sketch = InputSketch(num_in, RANK, 0, CPU)
        assert sketch_bytes(num_in, RANK) == sum(one.nbytes for one in ModuleHook(None, sketch).tensors())
    shapes = {"a": (NUM_OUT, NUM_IN)}
    plain, eva = (
        student_bytes(shapes, LoraSettings(rank=RANK, init=init), torch.float32) for init in ("kaiming", "eva")
    )
    assert eva - plain == sketch_bytes(NUM_IN, RANK)


def test_a_few_massive_tokens_hide_nothing() -> None:
    X = random(512, 4, seed=0) * torch.tensor([8.0, 6.0, 5.0, 0.01]) @ random(4, 64, seed=1)
    X[:8, 5] += 1e4 * X.norm(dim=1).mean()
    sketch = InputSketch(64, RANK, 0, CPU)
    sketch.update(X)
    found = sketch.principal_components()
    expected = torch.linalg.svd((X - X.mean(dim=0)).double(), full_matrices=False)[2][:RANK].float()
    torch.testing.assert_close((found * expected).sum(dim=1).abs(), torch.ones(RANK), rtol=1e-3, atol=0)


def test_a_sketch_finds_no_more_directions_than_there_are() -> None:
    sketch = InputSketch(64, RANK, 0, CPU)
    assert len(sketch.principal_components()) == 0
    direction = torch.nn.functional.normalize(random(64), dim=0)
    sketch.update(random(9, 1, seed=1) * direction)
    (found,) = sketch.principal_components()
    assert float((found @ direction).abs()) == pytest.approx(1, abs=1e-4)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_student_begins_with_the_directions_of_its_first_batch(tmp_path: Path, gradient_checkpointing: bool) -> None:
    path = make_base(tmp_path / "base", std=0.1)
    jobs = []
    for name in "ab":
        rows = [{"input": f"Please send {name} {index}", "answer": f"{name} {index}"} for index in range(8)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        data, out = str(tmp_path / f"{name}.jsonl"), str(tmp_path / name)
        jobs.append(TrainJob(name, data, out, out, seed=7, epochs=4, learning_rate=1e-2))
    lora = {"rank": RANK, "init": "eva", "target_modules": ["q_proj", "down_proj"]}
    config = TrainConfig.model_validate(
        {"lora": lora, "batch_size": 4, "micro_batch_size": 2, "gradient_checkpointing": gradient_checkpointing}
    )
    base = WholeBase(path, torch.float32, lora["target_modules"])
    gang = Gang(base, jobs, config, 2, base_name="base", group=None)
    gang.fill()
    (first, other) = gang.students.values()
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.base.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
        for name, module in base.bank.modules.items()
    ]
    random_A = {name: factors[0].clone() for name, factors in first.factors.items()}
    for shards in gang.shards():
        run_pass(base, gang, [shard for shard in shards if shard[0] == 0])
    for handle in handles:
        handle.remove()
    gang.update()
    for name, (lora_A, lora_B) in first.factors.items():
        X = torch.cat(seen[name]).detach()
        X = X - X.mean(dim=0)
        spectrum = torch.linalg.svd(X, full_matrices=False)
        most = (spectrum[1][:RANK] ** 2).sum()
        assert (X @ lora_A.T).norm() ** 2 > 0.95 * most, name
        assert (X @ torch.linalg.qr(random_A[name].T)[0]).norm() ** 2 < 0.5 * most, name
        assert not torch.equal(lora_A, random_A[name]) and lora_B.abs().max() == 0
        torch.testing.assert_close(lora_A @ lora_A.T, torch.eye(RANK), rtol=1e-4, atol=1e-4)
    begun = {name: factors[0].clone() for name, factors in first.factors.items()}
    for shards in gang.shards():
        run_pass(base, gang, shards)
    gang.update()
    assert all(factors[1].abs().max() > 0 for factors in first.factors.values()), "then it is trained"
    assert all(torch.equal(factors[0], begun[name]) for name, factors in first.factors.items()), "B was zero"
    assert first.link_steps == 1 and other.link_steps == 1


@pytest.mark.usefixtures("process_group")
def test_the_noise_of_a_step_is_in_the_passes_of_a_gang(tmp_path: Path) -> None:
    """Flat-LoRA alone: the second step's gradients are those on a base whose weights have the step's noise."""
    path = make_base(tmp_path / "base", std=0.1)
    write_jsonl(tmp_path / "a.jsonl", [{"input": f"Please send {index}", "answer": f"{index}"} for index in range(8)])
    targets = ["q_proj", "down_proj"]
    gradients = []
    for noisy_base in (False, True):
        out = str(tmp_path / f"out-{noisy_base}")
        job = TrainJob("a", str(tmp_path / "a.jsonl"), out, out, seed=7, epochs=4, learning_rate=1e-2)
        sigma = 0.0 if noisy_base else 0.5
        settings = {"rank": RANK, "flat_sigma": sigma, "target_modules": targets}
        config = TrainConfig.model_validate({"lora": settings, "batch_size": 8, "micro_batch_size": 8})
        base = WholeBase(path, torch.float32, targets)
        gang = Gang(base, [job], config, 1, base_name="base", group=None)
        gang.fill()
        (student,) = gang.students.values()
        for step in range(2):
            shards = gang.shards()
            if step == 1 and noisy_base:
                shapes = {name: tuple(one.base.weight.shape) for name, one in base.bank.modules.items()}
                lora = LoraSettings.model_validate({**settings, "flat_sigma": 0.5})
                hooks = student_hooks(lora, shapes, row_norms(base.bank), job.seed, CPU)
                hooks.begin(1, student.num_steps)
                for name, module in base.bank.modules.items():
                    noise = hooks.by_module[name].noise
                    assert noise is not None and noise.sigma > 0.05
                    module.base.weight.data += noise.matrix(module.base.weight)
            for shard in shards:
                run_pass(base, gang, shard)
            if step == 0:
                gang.update()
        gradients.append(torch.cat([part.flatten() for own in student.gradients.values() for part in own]).clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_row_norms_are_those_of_the_base(tmp_path: Path) -> None:
    base = WholeBase(make_base(tmp_path / "base", std=0.1), torch.float32, ("q_proj",))
    norms = row_norms(base.bank)
    assert norms.keys() == base.bank.modules.keys()
    for name, norms_O in norms.items():
        torch.testing.assert_close(norms_O, base.bank.modules[name].base.weight.norm(dim=1))
