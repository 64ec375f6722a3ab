"""A student that begins as its source adapter."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.whole import WholeBase
from tests.tiny import make_base
from translora.bundle import inspect_base
from translora.config import PrepareConfig, TrainConfig
from translora.distill.gang import Gang
from translora.distill.job import TrainJob, make_job
from translora.distill.train import train
from translora.lora.bank import initial_weights
from translora.lora.peft_io import LoraWeights, read_lora, write_lora
from translora.lora.warm_start import check_warm_start, copy_adapter
from translora.run.files import write_jsonl

SHAPES = {"model.layers.0.q_proj": (12, 8), "model.layers.1.q_proj": (6, 8)}


def make_source(rank: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(rank)
    modules = {
        name: (torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator))
        for name, (num_out, num_in) in SHAPES.items()
    }
    return LoraWeights(modules, dict.fromkeys(SHAPES, 0.75), {})


@pytest.mark.parametrize("rank", [2, 4])
def test_a_student_of_no_smaller_rank_is_its_source(rank: int) -> None:
    source, weights = make_source(rank), initial_weights(SHAPES, 4, seed=0)
    random = {name: factors[0].clone() for name, factors in weights.items()}
    copy_adapter(source, weights, scaling=2.0)
    for name, (lora_A, lora_B) in weights.items():
        own_A, own_B = source.modules[name]
        torch.testing.assert_close(2.0 * lora_B @ lora_A, 0.75 * own_B @ own_A)
        assert torch.equal(lora_A[rank:], random[name][rank:]) and lora_B[:, rank:].abs().sum() == 0


def test_a_student_of_a_smaller_rank_is_the_best_approximation() -> None:
    source, weights = make_source(6), initial_weights(SHAPES, 4, seed=0)
    copy_adapter(source, weights, scaling=2.0)
    for name, (lora_A, lora_B) in weights.items():
        own_A, own_B = source.modules[name]
        whole = 0.75 * own_B @ own_A
        left = torch.linalg.svdvals(whole)[4:].norm()
        torch.testing.assert_close((whole - 2.0 * lora_B @ lora_A).norm(), left, rtol=1e-4, atol=1e-5)


def test_modules_that_the_source_does_not_adapt_begin_as_without() -> None:
    source, weights = make_source(4), initial_weights({**SHAPES, "model.layers.2.q_proj": (6, 8)}, 4, seed=0)
    untouched = weights["model.layers.2.q_proj"][0].clone()
    copy_adapter(source, weights, scaling=2.0)
    assert torch.equal(weights["model.layers.2.q_proj"][0], untouched)
    assert weights["model.layers.2.q_proj"][1].abs().sum() == 0


@pytest.mark.usefixtures("process_group")
def test_a_student_in_a_gang_begins_as_the_adapter_on_disk(tmp_path: Path) -> None:
    base = WholeBase(make_base(tmp_path / "base", std=0.1), torch.float32, ("q_proj", "v_proj"))
    source = initial_weights(base.bank.shapes, 4, seed=1)
    for _, lora_B in source.values():
        lora_B.normal_()
    (tmp_path / "source").mkdir()
    write_lora(tmp_path / "source", source, alpha=4, base_model="base")
    write_jsonl(tmp_path / "data.jsonl", [{"input": "Please send 1", "answer": "1"}])
    job = TrainJob("a", str(tmp_path / "data.jsonl"), str(tmp_path / "out"), str(tmp_path), 7, 2, 1e-3)
    warm = dataclasses.replace(job, start=str(tmp_path / "source"))
    config = TrainConfig.model_validate({"lora": {"rank": 4, "alpha": 8}, "warm_start": True})
    gang = Gang(base, [warm], config, 1, base_name="base", group=None)
    gang.fill()
    known = read_lora(tmp_path / "source")
    for name, (lora_A, lora_B) in gang.students[0].factors.items():
        own_A, own_B = known.modules[name]
        torch.testing.assert_close(2.0 * lora_B @ lora_A, known.scaling[name] * own_B @ own_A)
    before = warm.recipe(config, "f")
    assert before != job.recipe(config, "f")
    write_lora(tmp_path / "source", source, alpha=8, base_model="base")
    assert warm.recipe(config, "f") != before, "a student is made anew when its source is another"


@pytest.mark.usefixtures("process_group")
def test_of_no_epochs_a_student_is_a_copy(tmp_path: Path) -> None:
    path = make_base(tmp_path / "base", std=0.1)
    base = WholeBase(path, torch.float32, ("q_proj", "v_proj"))
    source = initial_weights(base.bank.shapes, 4, seed=1)
    for _, lora_B in source.values():
        lora_B.normal_()
    (tmp_path / "source").mkdir()
    write_lora(tmp_path / "source", source, alpha=8, base_model="base")
    config = TrainConfig.model_validate({"lora": {"rank": 4, "alpha": 8}, "warm_start": True, "epochs": 0})
    rows = [{"input": f"Please send {index}", "answer": str(index)} for index in range(12)]
    places = {"output": tmp_path / "out", "work_dir": tmp_path / "work", "start": tmp_path / "source"}
    job = make_job("a", "student", rows, config, root_seed=0, with_end=True, **places)
    gang = Gang(base, [job], config, 1, base_name="base", group=None)
    train(base, gang, tmp_path / "gang-0000.safetensors", every_steps=100)
    made, known = read_lora(tmp_path / "out"), read_lora(tmp_path / "source")
    for name, pair in made.modules.items():
        for factor, own in zip(pair, known.modules[name], strict=True):
            assert torch.equal(factor, own)
    with pytest.raises(ValueError, match="epochs: 0 trains nothing"):
        TrainConfig.model_validate({"epochs": 0})


def test_bases_of_two_shapes_are_refused(tmp_path: Path) -> None:
    small = inspect_base(make_base(tmp_path / "small", "llama", 1))
    wide = inspect_base(make_base(tmp_path / "wide", "llama", 1, hidden_size=64))
    check_warm_start(small, small, ["q_proj"])
    with pytest.raises(ValueError, match=r"distill.warm_start: model.layers.0.self_attn.q_proj is .* set warm_start"):
        check_warm_start(small, wide, ["q_proj"])
    deep = inspect_base(make_base(tmp_path / "deep", "llama", 1, num_layers=3))
    for source, target in ((deep, small), (small, deep)):
        with pytest.raises(ValueError, match=r"model.layers.2.self_attn.q_proj is .* set warm_start"):
            check_warm_start(source, target, ["q_proj"])


@pytest.mark.parametrize(
    "beside", [{"lora": {"init": "eva"}}, {"lora": {"chain": {"links": 2}}}, {"peft": {"peft_type": "IA3"}}]
)
def test_a_student_begins_in_one_way(beside: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"warm_start: copies a LoRA as a whole; leave peft, lora.chain and lora.init"):
        TrainConfig.model_validate({"warm_start": True, **beside})


def test_training_on_real_data_has_no_source_to_begin_with() -> None:
    with pytest.raises(ValueError, match=r"train.warm_start: training on real data has no source adapter"):
        PrepareConfig.model_validate(
            {
                "output_dir": "out",
                "run_dir": "run",
                "source": {"model": "base"},
                "tasks": [{"name": "a", "data": "a.jsonl"}],
                "train": {"warm_start": True},
            }
        )
