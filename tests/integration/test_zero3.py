"""Real Ray Train, real DeepSpeed ZeRO-3 on two CPU workers, against one plain process with PEFT and AdamW."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ray.train import TrainingFailedError
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.bytes import NUM_STEPS, Traffic, measure
from tests.methods import METHODS, plain_losses, train_plainly
from tests.ranks import run_ranks
from tests.tiny import make_adapter, make_base
from translora.bundle import inspect_base
from translora.bundle.adapter import check_adapter
from translora.bundle.base import UnusableBaseError
from translora.config import BaseModelConfig, ResourceConfig, TrainConfig
from translora.config.merge import IterisSettings
from translora.distill.build_lock import leave_out_unused_op
from translora.distill.data import encode_samples
from translora.distill.ds_config import DS_CONFIGS, read_ds_config
from translora.distill.job import FAILURE, TrainJob
from translora.distill.launch import train_adapters
from translora.distill.memory import gang_bytes
from translora.engine.loading import load_model, load_tokenizer
from translora.engine.prompts import prompt_format
from translora.lora.bank import initial_weights
from translora.lora.kinds import SOURCES_ONLY
from translora.lora.peft_io import read_lora
from translora.merge.features import run_iteris
from translora.run.files import sha256_path, write_jsonl

GOLDEN = Path(__file__).with_name("golden_losses.json")
CONFIG = TrainConfig.model_validate(
    {
        "lora": {"rank": 4, "alpha": 8},
        "learning_rate": 2e-2,
        "batch_size": 5,
        "micro_batch_size": 2,
        "max_length": 64,
        "checkpoint_every_steps": 3,
        "dtype": "float32",
    }
)
ROWS = [{"input": f"Please send order {index} to the new address.", "answer": f"order {index}"} for index in range(11)]


def job(root: Path, name: str, rows: list[dict[str, str]], seed: int, epochs: float = 4) -> TrainJob:
    work_dir = root / name / "work"
    write_jsonl(work_dir / "data.jsonl", rows)
    return TrainJob(
        name=name,
        data=str(work_dir / "data.jsonl"),
        output=str(root / name / "adapter"),
        work_dir=str(work_dir),
        seed=seed,
        epochs=epochs,
        learning_rate=CONFIG.learning_rate,
    )


def train(base: Path, jobs: list[TrainJob], root: Path, config: TrainConfig = CONFIG, on_gpu: bool = False) -> None:
    resources = ResourceConfig(gpus_per_actor=float(on_gpu))
    train_adapters(BaseModelConfig(model=str(base)), base.name, jobs, config, resources, root, label="train")


def train_until_the_disk_fails(base: Path, jobs: list[TrainJob], root: Path, config: TrainConfig) -> None:
    """The last job's adapter cannot be written the first time: the run ends there."""
    obstacle = Path(jobs[-1].output)
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("a file where the adapter's directory should be")
    with pytest.raises(TrainingFailedError, match="NotADirectoryError"):
        train(base, jobs, root, config)
    obstacle.unlink(missing_ok=True)


def plain_training(
    base: Path, rows: list[dict[str, str]], seed: int, epochs: float
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same run as a reader would write it: PEFT, torch's AdamW, the bank's own first weights."""
    prompts = prompt_format(load_tokenizer(BaseModelConfig(model=str(base))))
    samples = encode_samples(rows, prompts, CONFIG.max_length, "plain")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {
        name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight"): (p.shape[0], 32)
        for name, p in weights.items()
        if "lora_B" in name
    }
    with torch.no_grad():
        for module, (lora_A, lora_B) in initial_weights(
            dict(sorted(shapes.items(), key=_model_order(model))), 4, seed
        ).items():
            weights[f"base_model.model.{module}.lora_A.default.weight"].copy_(lora_A)
            weights[f"base_model.model.{module}.lora_B.default.weight"].copy_(lora_B)
    losses = train_plainly(model, samples, CONFIG, seed, epochs)
    return {name: p.detach() for name, p in weights.items()}, losses


def _model_order(model: torch.nn.Module):  # type: ignore[no-untyped-def]
    order = {name.removeprefix("base_model.model."): index for index, (name, _) in enumerate(model.named_modules())}
    return lambda item: order[item[0]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("zero3") / "base", std=0.1)


@pytest.fixture(scope="module")
def trained(base: Path, ray_cluster: None) -> Path:
    """Four jobs on one worker group: `one` and its twin behind it, one that cannot be trained, and a neighbour."""
    root = base.parent / "run"
    jobs = [
        job(root, "one", ROWS, seed=1),
        job(root, "broken", [{"input": "far too long " * 40, "answer": "x"}], seed=2),
        job(root, "neighbour", ROWS[:4], seed=3, epochs=5),
        job(root, "twin", ROWS, seed=1),
    ]
    train(base, jobs, root)
    return root


def losses(root: Path, name: str) -> list[float]:
    return json.loads((root / name / "adapter" / "losses.json").read_text())


def test_zero3_on_two_workers_gives_the_adapter_of_one_plain_process(trained: Path, base: Path) -> None:
    expected, expected_losses = plain_training(base, ROWS, seed=1, epochs=4)
    adapter = read_lora(trained / "one" / "adapter")
    torch.testing.assert_close(losses(trained, "one"), expected_losses, rtol=1e-4, atol=1e-4)
    assert len(adapter.modules) == 4
    for module, (lora_A, lora_B) in adapter.modules.items():
        for factor, tensor in (("A", lora_A), ("B", lora_B)):
            wanted = expected[f"base_model.model.{module}.lora_{factor}.default.weight"]
            torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-4)
        assert lora_B.abs().max() > 1e-3, "it was trained"


def test_losses_equal_the_golden_file(trained: Path) -> None:
    if os.environ.get("TRANSLORA_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses(trained, "one"), indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    torch.testing.assert_close(losses(trained, "one"), golden, rtol=1e-4, atol=1e-5)
    assert golden[-1] < golden[0] - 0.5


def test_an_adapter_does_not_depend_on_those_trained_before_it_on_the_same_engine(trained: Path) -> None:
    assert sha256_path(trained / "one" / "adapter") == sha256_path(trained / "twin" / "adapter")
    assert losses(trained, "neighbour") != losses(trained, "one")[: len(losses(trained, "neighbour"))]


def test_a_job_that_cannot_be_trained_is_given_up_alone(trained: Path) -> None:
    reason = json.loads((trained / "broken" / "work" / FAILURE).read_text())["reason"]
    assert "no training sample of at most 64 tokens; raise max_length" in reason
    assert not (trained / "broken" / "adapter").exists()
    assert (trained / "neighbour" / "adapter" / "adapter_config.json").is_file()


def steps_of(root: Path, name: str) -> list[int]:
    """The steps that were done, those twice that a start after the last checkpoint did again."""
    return [json.loads(line)["step"] for line in (root / name / "work" / "train.jsonl").read_text().splitlines()]


def test_a_gang_that_failed_goes_on_from_its_checkpoints_to_the_same_bytes(trained: Path, base: Path) -> None:
    """A disk that cannot be written ends the run when the short job is done; the long one has a checkpoint by then."""
    once = CONFIG.model_copy(update={"max_failures": 0, "checkpoint_every_steps": 2})
    cut = base.parent / "cut"
    jobs = [job(cut, "long", ROWS, seed=1), job(cut, "short", ROWS[:4], seed=3, epochs=5)]
    train_until_the_disk_fails(base, jobs, cut, once)
    assert list(cut.glob("gangs/*/gang-*.safetensors"))
    train(base, jobs, cut, once)
    for root in (cut, trained):
        assert not list(root.glob("gangs/*")), "what only a resume needs is removed"
    for name, undisturbed in (("long", "one"), ("short", "neighbour")):
        assert sha256_path(trained / undisturbed / "adapter") == sha256_path(cut / name / "adapter")
    steps = steps_of(cut, "long")
    assert steps[-1] == 12 and len(steps) <= 12 + 2, "steps before the checkpoint are not done again"


SIX_LAYERS = 6


@pytest.fixture(scope="module")
def traffic() -> list[Traffic]:
    """Of gangs of one, four and eight adapters."""
    return measure([(1, True), (4, False), (8, False)], num_layers=SIX_LAYERS)


def test_a_gang_of_k_gathers_a_kth_of_the_bytes_per_adapter_and_step(traffic: list[Traffic]) -> None:
    alone, *gangs = traffic
    assert alone.num_bytes > NUM_STEPS * 1_000_000, "every step gathers the base, forward and backward"
    for gang in gangs:
        share = gang.bytes_per_adapter_step / alone.bytes_per_adapter_step
        assert share == pytest.approx(1 / gang.num_adapters, rel=0.1)
        assert gang.gathers_per_adapter_step == pytest.approx(
            alone.gathers_per_adapter_step / gang.num_adapters, rel=0.1
        )


def test_what_is_computed_again_is_gathered_a_third_time(traffic: list[Traffic]) -> None:
    """As the plan counts it; but for the last layer, which is there from the forward pass to the backward pass."""
    (again,), plain = measure([(4, False)], num_layers=SIX_LAYERS, recompute=True), traffic[1]
    expected = (3 * SIX_LAYERS - 2) / (2 * SIX_LAYERS - 1)
    assert again.num_bytes / plain.num_bytes == pytest.approx(expected, rel=0.07)


def test_a_base_that_stays_on_every_worker_is_gathered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (resident,) = measure([(4, False)], resident=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is compiled"
    assert (resident.num_gathers, resident.num_bytes) == (0, 0), "the first gang, which is not counted, gathered it"
    assert resident.awaited_bytes == 0, "it takes its memory before a gang is given what is left"


def test_peft_trains_what_the_bank_does_not_have_on_the_same_partitioned_base(base: Path, ray_cluster: None) -> None:
    """Each method as one plain process with PEFT, beside a LoRA; then again from checkpoints, to the same bytes.

    All weights are partitioned here: those of this base are below the usual threshold.
    """
    names = [name for name, settings in METHODS.items() if settings["peft_type"] not in SOURCES_ONLY]
    ds_config = json.loads((DS_CONFIGS / "zero3.json").read_text())
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (base.parent / "partitioned.json").write_text(json.dumps(ds_config))
    once = CONFIG.model_copy(
        update={"max_failures": 0, "checkpoint_every_steps": 2, "ds_config": str(base.parent / "partitioned.json")}
    )
    whole, cut = base.parent / "methods", base.parent / "methods-cut"
    for root in (whole, cut):
        own = names if root == whole else ["dora", "prompt-text", "prefix"]
        jobs = [job(root, "lora", ROWS, seed=1, epochs=1)]
        jobs += [replace(job(root, name, ROWS, seed=5, epochs=2), peft=METHODS[name]) for name in own]
        if root == cut:
            train_until_the_disk_fails(base, jobs, root, once)
            assert list(root.glob("gangs/*/peft-2-*.safetensors"))
        train(base, jobs, root, once)
    samples = encode_samples(ROWS, prompt_format(load_tokenizer(BaseModelConfig(model=str(base)))), 64, "plain")
    for name in names:
        expected = plain_losses(base, samples, METHODS[name], CONFIG, 5, 2)
        torch.testing.assert_close(losses(whole, name), expected, rtol=1e-3, atol=1e-4)
        check_adapter(whole / name / "adapter", inspect_base(str(base)))
    for name in own:
        assert sha256_path(whole / name / "adapter") == sha256_path(cut / name / "adapter")
    steps = steps_of(cut, own[-1])
    assert len(steps) <= steps[-1] + 2, "it goes on from its checkpoint"
    assert read_lora(whole / "lora" / "adapter").max_rank == 4


def test_three_workers_that_share_the_batches_and_recompute_activations_give_the_same_adapter(
    trained: Path, base: Path
) -> None:
    root = base.parent / "three"
    short = job(root, "one", ROWS, seed=1, epochs=1)
    train(base, [short], root, CONFIG.model_copy(update={"num_workers": 3, "gradient_checkpointing": True}))
    expected, expected_losses = plain_training(base, ROWS, seed=1, epochs=1)
    torch.testing.assert_close(losses(root, "one"), expected_losses, rtol=1e-4, atol=1e-4)
    for module, (_, lora_B) in read_lora(Path(short.output)).modules.items():
        wanted = expected[f"base_model.model.{module}.lora_B.default.weight"]
        torch.testing.assert_close(lora_B, wanted, rtol=1e-3, atol=1e-4)


def test_weight_noise_and_first_components_are_the_same_on_two_workers_that_share_a_batch(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    """The rows' norms are of partitioned weights, the components of both workers' inputs."""
    lora = CONFIG.lora.model_copy(update={"init": "eva", "flat_sigma": 0.2})
    for num_workers in (1, 2):
        root = tmp_path / str(num_workers)
        config = CONFIG.model_copy(update={"num_workers": num_workers, "lora": lora})
        train(base, [job(root, "one", ROWS, seed=1)], root, config)
    alone, shared = (read_lora(tmp_path / str(num_workers) / "one" / "adapter") for num_workers in (1, 2))
    torch.testing.assert_close(losses(tmp_path / "1", "one"), losses(tmp_path / "2", "one"), rtol=1e-4, atol=1e-4)
    plain, noisy = losses(trained, "one"), losses(tmp_path / "1", "one")
    assert noisy[0] == pytest.approx(plain[0], rel=1e-5), "the first step has no noise"
    assert noisy[-1] != pytest.approx(plain[-1], rel=1e-3)
    for module, (lora_A, lora_B) in alone.modules.items():
        torch.testing.assert_close(lora_B @ lora_A, torch.matmul(*shared.modules[module][::-1]), rtol=1e-2, atol=1e-3)


def test_a_base_that_fake_tensors_cannot_do_is_trained_with_an_estimate(ray_cluster: None, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", std=0.1)
    config = json.loads((base / "config.json").read_text())
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps({**config, "rope_parameters": dynamic}))
    read = AutoConfig.from_pretrained(base)
    with pytest.raises(DataDependentOutputException):
        gang_bytes(read, torch.float32, CONFIG, {}, 2, 20)
    short = job(tmp_path, "one", ROWS, seed=1, epochs=1)
    train(base, [short], tmp_path)
    assert losses(tmp_path, "one")[-1] < losses(tmp_path, "one")[0]


QUANTISED = ("zero_quantized_weights",)
"""DeepSpeed's kernels for these are for CUDA."""
NEEDS_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs: DeepSpeed quantises on CUDA only")


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("zero3-resident.json", ()),
        ("zero3-offload.json", ()),
        ("zero3-zeropp.json", QUANTISED),
        pytest.param("zero3-zeropp.json", (), marks=[pytest.mark.gpu, NEEDS_TWO_GPUS]),
    ],
)
def test_every_ds_config_trains_the_same_adapter(
    trained: Path, base: Path, tmp_path: Path, name: str, without: tuple[str, ...]
) -> None:
    config = json.loads((DS_CONFIGS / name).read_text())
    for key in without:
        del config["zero_optimization"][key]
    (tmp_path / name).write_text(json.dumps(config))
    short = job(tmp_path, "one", ROWS, seed=1, epochs=1)
    on_gpu = not without and "zeropp" in name
    train(base, [short], tmp_path, CONFIG.model_copy(update={"ds_config": str(tmp_path / name)}), on_gpu)
    _, expected = plain_training(base, ROWS, seed=1, epochs=1)
    tolerance = 2e-2 if on_gpu else 1e-4
    torch.testing.assert_close(losses(tmp_path, "one"), expected, rtol=tolerance, atol=tolerance)


def random_batches(task: int) -> list[dict[str, torch.Tensor]]:
    """Two batches of a task, one for each rank."""
    generator = torch.Generator().manual_seed(task)
    ids = [torch.randint(5, 60, (3, length), generator=generator) for length in (7, 11)]
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]


def merge_on_rank(rank: int, root: str, base: str, dirs: list[str]) -> None:
    """IterIS under ZeRO-3 on one of two ranks, with half of the batches; the weights are gathered module by module."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    leave_out_unused_op()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = read_ds_config("zero3.json", torch.float32)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    resident = HfDeepSpeedConfig(config)  # noqa: F841 (transformers holds it by weak reference)
    model = load_model(BaseModelConfig(model=base), torch.float32, place=None)
    deepspeed.initialize(model=model.base_model, config=config, dist_init_required=False)
    layers = [module.weight for name, module in model.named_modules() if name.endswith("_proj")]
    assert all(weight.numel() == 0 and weight.ds_tensor.numel() == weight.ds_numel // 2 for weight in layers)
    shares = [random_batches(task)[rank : rank + 1] for task in range(2)]
    merged = run_iteris(model, [read_lora(path) for path in dirs], shares, IterisSettings(max_iter=2))
    assert all(weight.numel() == 0 for weight in layers), "no rank keeps the whole base"
    torch.save(merged, f"{root}/merged-{rank}.pt")


def test_iteris_under_zero3_gives_the_adapter_of_one_process(base: Path, tmp_path: Path) -> None:
    dirs = [str(make_adapter(tmp_path / name, base, seed, 2 + seed)) for seed, name in enumerate("ab")]
    run_ranks(merge_on_rank, tmp_path, str(tmp_path), str(base), dirs)
    model = load_model(BaseModelConfig(model=str(base)), torch.float32, torch.device("cpu"))
    data = [random_batches(task) for task in range(2)]
    expected = run_iteris(model, [read_lora(path) for path in dirs], data, IterisSettings(max_iter=2))
    first, second = (torch.load(tmp_path / f"merged-{rank}.pt") for rank in range(2))
    for name, (lora_A, lora_B) in expected.items():
        torch.testing.assert_close(first[name][1] @ first[name][0], lora_B @ lora_A, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[name][0], second[name][0])


def load_another(rank: int, directory: str, base: str) -> None:
    """Load a base whose weights are not those of its files, as a loader does that leaves some as they were made."""
    os.environ |= {"MASTER_ADDR": "localhost", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    from translora.distill import zero3

    load = zero3.load_partitioned

    def reinitialised(*arguments: object) -> torch.nn.Module:
        model = load(*arguments)  # type: ignore[arg-type]
        own = dict(model.named_parameters())
        with deepspeed.zero.GatheredParameters([own[min(own)]], modifier_rank=0):
            if rank == 0:
                own[min(own)].data.normal_()
        return model

    zero3.load_partitioned = reinitialised  # type: ignore[assignment]
    with pytest.raises(UnusableBaseError) as refusal:
        zero3.ShardedBase(BaseModelConfig(model=base), CONFIG)
    Path(directory, f"refusal-{rank}").write_text(str(refusal.value))


def test_a_base_that_was_not_loaded_as_it_is_never_trains(base: Path, tmp_path: Path) -> None:
    run_ranks(load_another, tmp_path, str(tmp_path), str(base))
    for rank in range(2):
        text = (tmp_path / f"refusal-{rank}").read_text()
        assert f"{base}: " in text and "differs from its file after loading under ZeRO-3" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object whose zero_optimization.stage is 3"),
        ('{"zero_optimization": null}', "expected an object whose zero_optimization.stage is 3"),
        ('{"zero_optimization": {"stage": 2}}', "zero_optimization.stage is 3"),
        ('{"zero_optimization": {"stage": 3, "offload_param": null}}', "offload_param must be an object"),
        (
            '{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "1e9"}}',
            "stage3_max_live_parameters is '1e9', expected a number",
        ),
        ('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}', "remove it; set distill.max_grad_norm"),
        (
            '{"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}',
            '"auto" is resolved by HF Trainer only',
        ),
    ],
)
def test_deepspeed_configs_that_cannot_work_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ValueError, match=rf"ds\.json: .*{message}"):
        read_ds_config(str(tmp_path / "ds.json"), torch.float32)
    with pytest.raises(ValueError, match="is no file and not in ds_configs/"):
        read_ds_config("zero4.json", torch.float32)
