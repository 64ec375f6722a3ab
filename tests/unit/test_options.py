"""Other ways to train a LoRA: each option's defining property, on a student's own tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import nn

from benchmarks.whole import WholeBase
from tests.tiny import make_base
from translora.config import ChainSettings, LoraSettings, TrainConfig
from translora.distill.checkpoint import read_checkpoints, write_checkpoint
from translora.distill.data import Sample
from translora.distill.gang import Gang
from translora.distill.job import TrainJob
from translora.distill.options import LoraProAdamW, layers_of_link, lora_pro
from translora.distill.student import Student
from translora.distill.train import run_pass, train
from translora.lora.peft_io import read_lora
from translora.run.files import sha256_path, write_jsonl

CPU = torch.device("cpu")
SHAPES = {"model.layers.0.q_proj": (12, 8), "model.layers.1.q_proj": (6, 8)}
RANK, LR = 3, 1e-2
pytestmark = pytest.mark.usefixtures("process_group")


def config(**lora: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"lora": {"rank": RANK, "alpha": 6, **lora}, "batch_size": 4, "max_grad_norm": 1.5, "learning_rate": LR}
    )


def make_student(settings: TrainConfig, num_steps: int = 4) -> Student:
    """A student with random A and B."""
    generator = torch.Generator().manual_seed(1)
    rank = settings.lora.total_rank
    weights = {
        name: [torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator)]
        for name, (num_out, num_in) in SHAPES.items()
    }
    job = TrainJob("a", "", "", "", seed=3, epochs=num_steps, learning_rate=LR)
    return Student(job, "", [Sample([1], [2])] * 4, weights, settings, CPU, torch.float32)


def set_gradients(student: Student, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for factors in student.gradients.values():
        for gradient in factors:
            gradient.copy_(torch.randn(gradient.shape, generator=generator))


def weights_of(student: Student) -> dict[str, list[torch.Tensor]]:
    return {name: [factor.clone() for factor in factors] for name, factors in student.factors.items()}


class TwoLayers(nn.Module):
    """Linear modules of SHAPES, for PEFT to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Module() for _ in SHAPES)
        for layer, (num_out, num_in) in zip(self.model.layers, SHAPES.values(), strict=True):
            layer.q_proj = nn.Linear(num_in, num_out, bias=False)


@pytest.mark.parametrize(
    ("lora", "make_optimizer"),
    [
        (
            {"lora_plus_ratio": 16},
            lambda model: create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16, weight_decay=0.0, loraplus_weight_decay=0.0
            ),
        ),
        (
            {"gradient": "riemannian"},
            lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=LR, weight_decay=0.0),
        ),
    ],
)
def test_lora_plus_and_riemannian_steps_are_those_of_peft(
    lora: dict[str, Any], make_optimizer: Callable[[Any], torch.optim.Optimizer]
) -> None:
    student = make_student(config(**lora))
    model = get_peft_model(TwoLayers(), LoraConfig(r=RANK, lora_alpha=6, target_modules=["q_proj"]))
    parameters = dict(model.named_parameters())

    def peft(name: str) -> list[nn.Parameter]:
        return [parameters[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "AB"]

    for name, factors in weights_of(student).items():
        for parameter, factor in zip(peft(name), factors, strict=True):
            parameter.data.copy_(factor)
    optimizer = make_optimizer(model)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(3):
        set_gradients(student, step)
        for name, gradients in student.gradients.items():
            for parameter, gradient in zip(peft(name), gradients, strict=True):
                parameter.grad = gradient.clone()
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * (1 - step / student.num_steps)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.5)  # as a trainer does: before the optimizer's step
        assert norm > 1.5
        optimizer.step()
        student.update(None)
        for name, factors in student.factors.items():
            for parameter, factor in zip(peft(name), factors, strict=True):
                torch.testing.assert_close(factor, parameter.data, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**31), st.floats(0.1, 4), st.sampled_from([1.0, 1e-4]))
def test_lora_pro_comes_as_near_to_the_whole_gradient_as_the_factors_allow(
    seed: int, scaling: float, size_B: float
) -> None:
    """What is left of the gradient no change of A or B can give; of all that do as well the nearest is taken."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 8), (12, 3), (12, 8))
    A, B, whole = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    B *= size_B
    grad_A, grad_B = scaling * B.T @ whole, scaling * whole @ A.T
    dA, dB = lora_pro(A, B, grad_A, grad_B, scaling)
    left = whole - scaling * (B @ dA + dB @ A)
    assert (B.T @ left).norm() < 1e-3 * B.norm() * whole.norm() and (left @ A.T).norm() < 1e-3 * A.norm() * whole.norm()

    def distance(X: torch.Tensor) -> torch.Tensor:
        """To the plain gradients, of a change that does the same: B X A - B X A = 0."""
        return (dA + X @ A - grad_A).norm() ** 2 + (dB - B @ X - grad_B).norm() ** 2

    for _ in range(5):
        step = 0.1 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        assert distance(step) > distance(torch.zeros(3, 3).double()) * (1 - 1e-4)


def test_lora_pro_begins_where_b_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    A, whole = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 8), (12, 8)))
    dA, dB = lora_pro(A, torch.zeros(12, 3).double(), torch.zeros(3, 8).double(), whole @ A.T, 1.0)
    assert dA.abs().max() == 0
    torch.testing.assert_close(dB @ A, whole @ torch.linalg.pinv(A) @ A, rtol=1e-6, atol=1e-6)


def test_adamw_of_lora_pro_is_that_of_the_whole_matrix() -> None:
    """Where the rank is the matrix's own nothing gets lost: a step changes s B A as AdamW would the matrix."""
    generator, size, lr = torch.Generator().manual_seed(0), 4, 1e-4
    lora = LoraSettings(rank=size, alpha=2 * size)
    factors = torch.randn(2, size, size, generator=generator)
    flat = torch.nn.Parameter(factors.flatten())
    weights, gradients = ({"a": list(one.view(2, size, size))} for one in (flat.detach(), torch.zeros_like(flat)))
    ours = LoraProAdamW(flat, lora, weights, gradients, lr)
    matrix = torch.nn.Parameter(torch.zeros(size, size))
    theirs = torch.optim.AdamW([matrix], lr=lr, weight_decay=0.0)
    lora_A, lora_B = weights["a"]
    for _ in range(4):
        matrix.grad = torch.randn(size, size, generator=generator)
        gradients["a"][0].copy_(2 * lora_B.T @ matrix.grad)
        gradients["a"][1].copy_(2 * matrix.grad @ lora_A.T)
        old, before = (2 * lora_B.double() @ lora_A.double()), matrix.detach().clone()
        ours.step()
        theirs.step()
        moved = 2 * lora_B.double() @ lora_A.double() - old
        torch.testing.assert_close(moved.float() / lr, (matrix.detach() - before) / lr, rtol=0, atol=0.02)


def test_lora_pro_learns_a_matrix_in_fewer_steps_than_plain_lora() -> None:
    """W of rank 4 from its gradient, at one learning rate."""
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(24, 4, generator=generator) @ torch.randn(4, 16, generator=generator) / 10
    left = {}
    for gradient in ("plain", "lora-pro"):
        settings = config(rank=4, alpha=8, gradient=gradient)
        weights = {"a": [torch.randn(4, 16, generator=torch.Generator().manual_seed(1)) / 4, torch.zeros(24, 4)]}
        job = TrainJob("a", "", "", "", seed=3, epochs=60, learning_rate=0.05)
        student = Student(job, "", [Sample([1], [2])] * 4, weights, settings, CPU, torch.float32)
        while not student.is_done:
            lora_A, lora_B = student.factors["a"]
            slope = settings.lora.scaling * lora_B @ lora_A - goal
            student.gradients["a"][0].copy_(settings.lora.scaling * lora_B.T @ slope)
            student.gradients["a"][1].copy_(settings.lora.scaling * slope @ lora_A.T)
            student.update(None)
        left[gradient] = float(slope.norm() / goal.norm())
    assert left["lora-pro"] < 0.5 * left["plain"], left


def test_a_random_half_of_the_weights_never_moves() -> None:
    student = make_student(config(random_half=True))
    before = weights_of(student)
    for step in range(4):
        set_gradients(student, step)
        student.update(None)
    moved = torch.cat(
        [
            (factor != old).flatten()
            for name in before
            for factor, old in zip(student.factors[name], before[name], strict=True)
        ]
    )
    assert 0.35 < moved.float().mean() < 0.65
    other = make_student(config(random_half=True))
    set_gradients(other, 0)
    other.update(None)
    assert torch.equal(other.rates, student.rates), "the half is the seed's alone"


@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("layer_fraction", [1.0, 0.5])
def test_the_links_of_a_chain_are_trained_one_after_the_other(freeze_A: bool, layer_fraction: float) -> None:
    chain = {"links": 2, "freeze_A": freeze_A, "layer_fraction": layer_fraction}
    student = make_student(config(chain=chain), num_steps=6)
    for link in range(2):
        before = weights_of(student)
        for step in range(3):
            set_gradients(student, step)
            student.update(None)
        own, others = slice(link * RANK, (link + 1) * RANK), slice((1 - link) * RANK, (2 - link) * RANK)
        changed = 0
        for name, (lora_A, lora_B) in student.factors.items():
            old_A, old_B = before[name]
            assert torch.equal(lora_A[others], old_A[others]) and torch.equal(lora_B[:, others], old_B[:, others])
            changed += bool((lora_B[:, own] != old_B[:, own]).all())
            if freeze_A:
                assert torch.equal(lora_A, old_A)
        assert changed == 2 * layer_fraction
    assert student.is_done


def test_each_link_adapts_layers_of_its_own() -> None:
    """XGBLoRA's: over the links every layer has its turn, nearly surely, and no two students have the same order."""
    chain, modules = ChainSettings(links=4, layer_fraction=0.25), [f"layers.{layer}.q_proj" for layer in range(8)]
    links = [[layers_of_link(chain, modules, seed, link) for link in range(4)] for seed in range(20)]
    assert all(len(layers) == 2 for own in links for layers in own)
    assert all(len(set(map(frozenset, own))) > 1 for own in links)
    drawn = [layer for own in links for layers in own for layer in layers]
    assert all(10 <= drawn.count(str(layer)) <= 30 for layer in range(8)), "each with even odds: 20 of 160 expected"


def test_adamw_begins_anew_with_each_link() -> None:
    """With a constant gradient AdamW's step is the learning rate, whatever came before."""
    student = make_student(config(chain={"links": 2}), num_steps=40)
    for step in range(40):
        before = weights_of(student)
        for factors in student.gradients.values():
            for gradient in factors:
                gradient.fill_(0.5)
        student.update(None)
        moved = max(
            float((factor - old).abs().max())
            for name in before
            for factor, old in zip(student.factors[name], before[name], strict=True)
        )
        assert moved == pytest.approx(LR * (1 - step % 20 / 20), rel=1e-3), "a decay of its own, too"


def test_the_whole_gradient_is_clipped_before_lora_pro_changes_it() -> None:
    """What is left of B's step does not hang on how large (B^T B)^-1 makes A's."""
    clipped, free = make_student(config(gradient="lora-pro")), make_student(config(gradient="lora-pro"))
    free.config = free.config.model_copy(update={"max_grad_norm": 1e9})
    for student in (clipped, free):
        for _, lora_B in student._views(student.flat).values():
            lora_B.mul_(1e-3)
        set_gradients(student, 0)
    norm = float(free.flat.grad.norm())  # type: ignore[union-attr]
    found = []
    for student in (clipped, free):
        student.optimizer.step = lambda student=student: found.append(student.flat.grad.clone())  # type: ignore[method-assign]
        student.update(None)
    torch.testing.assert_close(found[0] * norm / 1.5, found[1], rtol=1e-4, atol=1e-6)


def test_a_discriminator_has_the_shape_alone(tmp_path: Path) -> None:
    """Chains, masks and noise are ways to train a student; its judge for the next hop is a plain LoRA."""
    options = {"chain": {"links": 2}, "random_half": True, "init": "eva", "flat_sigma": 0.1, "gradient": "riemannian"}
    rows = [{"input": f"Please send order {index}", "answer": "yes"} for index in range(8)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    base_path, made = make_base(tmp_path / "base", std=0.1), []
    for settings in (config(), config(**options)):
        root = tmp_path / f"{len(made)}"
        paths = (str(tmp_path / "data.jsonl"), str(root / "out"), str(root))
        judge, student = (TrainJob(name, *paths, 7, 2, LR, with_end=name == "a") for name in ("judge", "a"))
        base = WholeBase(base_path, torch.float32, ("q_proj", "v_proj"))
        gang = Gang(base, [judge], settings, 1, base_name="base", group=None)
        train(base, gang, root / "gang.safetensors", every_steps=100)
        made.append((sha256_path(root / "out"), judge.recipe(settings, "f"), student.recipe(settings, "f")))
    assert made[0][:2] == made[1][:2] and made[0][2] != made[1][2]


def test_a_chain_of_more_links_than_steps_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"a: a chain of 5 links in 4 steps; lower lora\.chain\.links, or raise epochs"
    ):
        make_student(config(chain={"links": 5}))


def test_without_options_nothing_is_scaled() -> None:
    student = make_student(config())
    set_gradients(student, 0)
    student.update(None)
    assert student.rates is None


@pytest.mark.parametrize(
    ("options", "links"),
    [
        ({"chain": {"links": 3}, "gradient": "riemannian", "use_rslora": True}, 3),
        ({"init": "eva", "flat_sigma": 0.05}, 1),
        ({"init": "eva", "chain": {"links": 2}}, 2),
        ({"gradient": "lora-pro", "chain": {"links": 2}}, 2),
    ],
)
def test_a_student_is_exported_as_one_lora_and_goes_on_from_a_checkpoint(
    tmp_path: Path, options: dict[str, Any], links: int
) -> None:
    path = make_base(tmp_path / "base", std=0.1)
    rows = [{"input": f"Please send order {index}", "answer": f"order {index}"} for index in range(8)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    settings = config(**options)
    outputs = []
    for root in (tmp_path / "whole", tmp_path / "cut"):
        job = TrainJob("a", str(tmp_path / "data.jsonl"), str(root / "out"), str(root), 7, 6, LR)
        base = WholeBase(path, torch.float32, ("q_proj", "v_proj"))
        checkpoint = root / "gang-0000.safetensors"
        gang = Gang(base, [job], settings, 1, base_name="base", group=None)
        if root.name == "cut":
            gang.fill()
            for _ in range(5):
                for shards in gang.shards():
                    run_pass(base, gang, shards)
                gang.update()
            write_checkpoint(checkpoint, gang)
            base = WholeBase(path, torch.float32, ("q_proj", "v_proj"))
            gang = Gang(base, [job], settings, 1, base_name="base", group=None)
            read_checkpoints(root, checkpoint.name, gang)
        train(base, gang, checkpoint, every_steps=100)
        outputs.append(root / "out")
    assert sha256_path(outputs[0]) == sha256_path(outputs[1])
    lora = read_lora(outputs[0])
    assert lora.max_rank == links * RANK
    assert list(lora.scaling.values()) == pytest.approx([settings.lora.scaling] * len(lora.scaling))
    losses = json.loads((outputs[0] / "losses.json").read_text())
    assert losses[-1] < losses[0]


def test_options_that_came_later_leave_what_was_made_before_as_it_is() -> None:
    """At their defaults they are in no dump, hence in no recipe and no digest; set, they are in both."""
    plain = TrainConfig()
    assert {"init", "flat_sigma"}.isdisjoint(plain.model_dump()["lora"]) and "warm_start" not in plain.model_dump()
    settings = {"lora": {"init": "eva", "flat_sigma": 0.1}, "epochs": 3}
    changed = TrainConfig.model_validate(settings)
    assert changed.model_dump()["lora"].items() >= settings["lora"].items()
    assert TrainConfig.model_validate(changed.model_dump()) == changed
    assert TrainConfig.model_validate_json(plain.model_dump_json()) == plain
    job = TrainJob("a", "", "", "", seed=3, epochs=1, learning_rate=LR)
    assert job.recipe(changed, "f") != job.recipe(plain, "f")


def test_how_a_student_learns_from_its_teacher_does_not_touch_a_discriminator() -> None:
    plain = TrainConfig()
    judge, student = (TrainJob("a", "", "", "", 3, 1, LR, with_end=with_end) for with_end in (False, True))
    hard = plain.model_copy(update={"loss": "sft"})
    assert student.recipe(plain, "f") == student.recipe(hard, "f"), "soft labels are in the data"
    for change in ({"loss": "kl"}, {"token_share": 0.5}, {"loss": "kl", "kl_top_k": 7}):
        changed = plain.model_copy(update=change)
        assert judge.recipe(changed, "f") == judge.recipe(plain, "f")
        assert student.recipe(changed, "f") != student.recipe(plain, "f")
    longer = plain.model_copy(update={"epochs": 9, "learning_rate": 0.5})
    assert {job.recipe(longer, "f") == job.recipe(plain, "f") for job in (judge, student)} == {True}, "jobs have theirs"
