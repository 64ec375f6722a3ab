"""translora plan: the numbers of 70B bases, what does not fit, and the command line."""

import dataclasses
import json
import math
from pathlib import Path
from typing import cast

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.tiny import make_base, make_bundle
from translora.bundle import Bundle
from translora.cli import FAILED, MIGRATED, UNUSABLE, main
from translora.config import BaseModelConfig, FleetConfig, load_config
from translora.distill.memory import lora_weights
from translora.engine.loading import load_model
from translora.engine.memory import adapter_sizes, num_weights
from translora.engine.vllm_settings import check_engine
from translora.plan.actors import load_seconds
from translora.plan.fleet import FleetPlan, PhasePlan, plan_fleet
from translora.plan.hardware import GPUS, LINK_SHARE, Hardware
from translora.plan.shape import read_shape, read_shapes
from translora.plan.work import bundled_work, given_work
from translora.run.files import sha256_file
from translora.synthesis.pool import Pool

EXAMPLE = Path(__file__).parents[2] / "examples/plan-70b"


@pytest.fixture(scope="module")
def example() -> FleetConfig:
    return load_config(EXAMPLE / "fleet.yaml", FleetConfig)


def plan(config: FleetConfig, num_gpus: int = 8, gpu: str = "h100-80gb", num_adapters: int = 300) -> FleetPlan:
    work = given_work(config, num_adapters, 250, 0.4)
    return plan_fleet(config, read_shapes(config), Hardware(GPUS[gpu], num_gpus), work)


@pytest.fixture(scope="module")
def on_eight(example: FleetConfig) -> FleetPlan:
    return plan(example)


def test_the_shape_of_a_70b_base_comes_from_its_config_alone() -> None:
    shape = read_shape(BaseModelConfig(model=str(EXAMPLE / "llama-3.1-70b")), torch.bfloat16)
    assert shape.weights.total == 70_553_706_496  # as the model card's "70.6B"
    assert shape.num_active == shape.weights.total
    assert shape.cache_bytes == 80 * 2 * 8 * 128 * 2  # layers, keys and values, heads, their size, bfloat16
    assert shape.weights.head == 128256 * 8192
    assert len(shape.adapted(["q_proj", "v_proj"])) == 160
    assert len(shape.adapted("all-linear")) == 80 * 7
    with pytest.raises(ValueError, match=r"query_key_value not in .*in its place there is k_proj, q_proj, v_proj"):
        shape.adapted(["query_key_value"])


def test_of_a_mixture_of_experts_a_token_meets_a_part(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_shape(BaseModelConfig(model=str(tmp_path)), torch.bfloat16)
    experts = 2 * 8 * 3 * 64 * 32
    assert shape.weights.total - shape.num_active == experts * 6 // 8


def test_a_fleet_of_300_on_a_node_gathers_what_zero_3_gathers(on_eight: FleetPlan) -> None:
    assert not on_eight.problems
    training = on_eight.training
    weights = read_shape(BaseModelConfig(model=str(EXAMPLE / "qwen2.5-72b")), torch.bfloat16).num_bytes
    assert training.gathered_bytes == pytest.approx(3 * weights * 7 / 8), "the forward pass once more, recomputed"
    assert training.memory["its part of the base"] == pytest.approx(weights / 8)
    assert training.compute_seconds > 5 * training.gather_seconds, "the gang fills the pass"
    assert all(sum(phase.memory.values()) < 77e9 for phase in on_eight.phases)
    assert on_eight.settings["resources"] == {"num_actors": 2, "gpus_per_actor": 4}


def test_eight_times_the_gpus_take_nearly_an_eighth_of_the_time(example: FleetConfig, on_eight: FleetPlan) -> None:
    more = plan(example, num_gpus=64)
    assert 5 < on_eight.hours / more.hours <= 8.5
    assert more.training.memory["its part of the base"] < on_eight.training.memory["its part of the base"] / 7


def test_on_vllm_the_gpus_of_an_actor_work_together(example: FleetConfig, on_eight: FleetPlan) -> None:
    target = example.target.model_copy(update={"vllm": {}})
    found = plan(example.model_copy(update={"target": target}))
    for phase, other in zip(found.phases, on_eight.phases, strict=True):
        faster = 4 * 0.75 if phase.name in ("generate", "gate") else 1
        for what in ("prompts", "decoding"):
            if what in phase.parts:
                assert phase.parts[what] == pytest.approx(other.parts[what] / faster)
    assert "vllm: an actor's GPUs work together" in found.note and not on_eight.note
    copies = set(found.disk) - set(on_eight.disk)
    students = found.disk["students and discriminators"]
    assert [found.disk[name] for name in copies] == [students / 2 * 2], "of the students alone; by each of two actors"


def on_vllm(config: FleetConfig, **options: object) -> FleetConfig:
    """Both bases with these engine arguments."""
    bases = {name: getattr(config, name).model_copy(update={"vllm": options}) for name in ("source", "target")}
    return config.model_copy(update=bases)


def test_what_vllm_holds_is_what_it_is_told_to(example: FleetConfig) -> None:
    """Not all of a batch, and not all adapters: 512 rows of 300 adapters go through shares of less than a half."""
    wide = example.model_copy(update={"synthesis": example.synthesis.model_copy(update={"batch_size": 512})})
    found = plan(on_vllm(wide, gpu_memory_utilization=0.45, max_model_len=8192))
    assert not found.problems and found.settings["resources"]["gpus_per_actor"] == 8
    shape = read_shape(example.source, torch.bfloat16)
    label = found.phases[1]
    assert label.room == pytest.approx(0.45 * 80e9)
    assert label.memory["keys and values of one row"] == pytest.approx(8192 * shape.cache_bytes / 8)
    weights = lora_weights(shape.adapted(example.distill.lora.target_modules), example.distill.lora.rank)
    assert label.memory["adapters"] == pytest.approx(16 * weights * 2 * (1 + 1 / 8) / 2), "max_loras of 600"
    rows = int(label.step.split()[0])
    free = label.room - sum(label.memory.values()) + label.memory["keys and values of one row"]
    assert 64 < rows <= 256 and rows * 200 * shape.cache_bytes / 8 < free, "no more than there is room for"
    more = plan(on_vllm(wide, gpu_memory_utilization=0.45, max_model_len=8192, max_loras=64))
    assert more.phases[1].memory["adapters"] == pytest.approx(4 * label.memory["adapters"])
    short = plan(on_vllm(wide, gpu_memory_utilization=0.25, max_model_len=131072))
    assert any("GB a GPU, of which h100-80gb has 20 for it" in problem for problem in short.problems)
    assert any("or lower vllm.max_model_len or max_num_batched_tokens" in problem for problem in short.problems)


def test_a_screen_costs_what_it_asks(example: FleetConfig) -> None:
    """Where none is refused every invented input is answered, and more are collected to choose from."""

    def label(screen: str) -> PhasePlan:
        synthesis = example.synthesis.model_copy(update={"screen": screen})
        return plan(example.model_copy(update={"synthesis": synthesis})).phases[1]

    judged, ranked, sure, excess, none = map(label, ("discriminator", "realness", "confidence", "excess", "none"))
    assert none.parts["decoding"] == pytest.approx(judged.parts["decoding"] / 0.4, rel=1e-3)
    assert sure.parts["decoding"] == pytest.approx(1.5 * none.parts["decoding"], rel=1e-3)
    assert ranked.parts == sure.parts and ranked.memory["adapters"] == judged.memory["adapters"]
    assert excess.parts["decoding"] == sure.parts["decoding"] and excess.parts["prompts"] > sure.parts["prompts"]
    adapters = judged.memory["adapters"] * 301 / 601
    assert none.memory["adapters"] == pytest.approx(adapters), "no discriminators, beside a place of zeros"


def test_as_much_is_invented_as_the_screens_usually_let_pass(example: FleetConfig) -> None:
    usual, given = (given_work(example, 3, 250, share) for share in (None, 0.5))
    one = usual.adapters[0]
    judged = dataclasses.replace(usual, adapters=[dataclasses.replace(one, screen="discriminator"), one, one])
    assert [usual.mean_acceptance, given.mean_acceptance] == pytest.approx([0.85, 0.5])
    assert list(map(judged.accepted, judged.adapters)) == [0.3, 0.85, 0.85]
    assert judged.mean_acceptance == pytest.approx(2 / 3)


def test_a_plan_invents_what_the_rounds_would(example: FleetConfig) -> None:
    """The first round's count, a later one's where few are accepted, and never more than the budget."""
    needed = 250 + example.gate.sizes(250)[1]
    for screen, surplus in (("none", 1.0), ("realness", example.synthesis.surplus)):
        synthesis = example.synthesis.model_copy(update={"screen": screen})
        config = example.model_copy(update={"synthesis": synthesis})
        pool = Pool("a", cast(Bundle, None), needed, 10 * needed, surplus=surplus)
        work = given_work(config, 1, 250, None)
        assert work.num_generated(work.adapters[0], config) == pytest.approx(
            pool.next_count(synthesis.oversample), rel=0.01
        )
        for acceptance, expected in ((0.25, 4 * surplus * needed), (0.01, synthesis.max_generated_factor * needed)):
            scarce = given_work(config, 1, 250, acceptance)
            assert scarce.num_generated(scarce.adapters[0], config) == pytest.approx(expected)


def test_no_machine_is_asked_for_more_actors_than_it_has_gpus_for(example: FleetConfig) -> None:
    seven = Hardware(GPUS["h100-80gb"], 14, gpus_per_node=7)
    work = given_work(example, 300, 250, 0.4)
    found = plan_fleet(on_vllm(example), read_shapes(example), seven, work)
    assert found.settings["resources"] == {"num_actors": 2, "gpus_per_actor": 4}
    assert Hardware(GPUS["h100-80gb"], 12).num_nodes == 2 and Hardware(GPUS["h100-80gb"], 12).num_groups(3) == 3
    alone = plan(example, num_gpus=7)
    assert alone.settings["resources"] == {"num_actors": 2, "gpus_per_actor": 3}, "transformers gains no speed by more"


def test_a_round_takes_as_long_as_a_batch_however_many_actors_there_are(example: FleetConfig) -> None:
    few, many = (plan(example, num_gpus=count, num_adapters=1).phases[0].parts["decoding"] for count in (64, 512))
    assert few == many > 3 * 96 * read_shape(example.target, torch.bfloat16).num_bytes / 3.35e12


def test_latent_attention_keeps_what_keys_and_values_are_made_from(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(BaseModelConfig(model=str(tmp_path)), torch.bfloat16).cache_bytes == 2 * (32 + 8) * 2


def test_between_machines_the_base_comes_over_the_network() -> None:
    one, slow = Hardware(GPUS["h100-80gb"], 8), Hardware(GPUS["h100-80gb"], 16, network_rate=50e9)
    assert one.gather_rate == LINK_SHARE * 450e9
    assert slow.gather_rate == LINK_SHARE * 50e9


def test_what_does_not_fit_is_said_with_the_reason_and_the_remedy(example: FleetConfig) -> None:
    small = plan(example, num_gpus=4, gpu="a100-40gb")
    assert any("GB a GPU, of which a100-40gb has 37 for it" in problem for problem in small.problems)
    assert any("take more GPUs, or set distill.ds_config to zero3-offload.json" in p for p in small.problems)
    by_hand = example.distill.model_copy(update={"gang_size": 40})
    crowded = plan(example.model_copy(update={"distill": by_hand}))
    assert any("set distill.gang_size to auto" in problem for problem in crowded.problems)
    train = example.distill.model_copy(
        update={"gradient_checkpointing": False, "micro_batch_size": 64, "batch_size": 64}
    )
    kept = plan(example.model_copy(update={"distill": train}))
    assert any("set distill.gradient_checkpointing to true" in problem for problem in kept.problems)
    synthesis = example.synthesis.model_copy(update={"batch_size": 4096})
    wide = plan(example.model_copy(update={"synthesis": synthesis}))
    assert any("lower synthesis.batch_size" in problem for problem in wide.problems)


def with_config(example: FleetConfig, **distill: object) -> FleetConfig:
    return example.model_copy(update={"distill": example.distill.model_copy(update=distill)})


def test_with_zeropp_all_comes_from_the_gpus_own_machine(example: FleetConfig) -> None:
    """Its copy of a frozen base never expires, so no direction needs the network; one machine has it as well."""
    zeropp = with_config(example, ds_config="zero3-zeropp.json", gradient_checkpointing=False)
    weights = read_shape(BaseModelConfig(model=str(EXAMPLE / "qwen2.5-72b")), torch.bfloat16).num_bytes
    for count in (8, 64):
        training = plan(zeropp, num_gpus=count).training
        assert training.gathered_bytes == pytest.approx(2 * weights / 2 * 7 / 8), "in 8 bits"
        assert training.gather_seconds == pytest.approx(weights * 7 / 8 / (LINK_SHARE * 450e9))
        assert training.memory["the machine's copy"] == pytest.approx(weights / 8)
    assert plan(zeropp, num_gpus=4).training.memory["the machine's copy"] == pytest.approx(weights / 4)
    with pytest.raises(ValueError, match=r"zero_hpz_partition_size 8 does not divide 12 workers; take a multiple"):
        plan(zeropp, num_gpus=12)


def test_a_base_that_stays_on_every_gpu_is_gathered_once_and_needs_the_room(example: FleetConfig) -> None:
    shape = read_shape(BaseModelConfig(model=str(EXAMPLE / "qwen2.5-72b")), torch.bfloat16)
    training = plan(with_config(example, ds_config="zero3-resident.json"), num_gpus=8).training
    assert training.gathered_bytes == training.gather_seconds == 0
    assert training.memory["gathered layers and head"] == pytest.approx(shape.num_bytes)


def test_what_lies_in_the_machines_memory_comes_over_its_bus(example: FleetConfig) -> None:
    weights = read_shape(BaseModelConfig(model=str(EXAMPLE / "qwen2.5-72b")), torch.bfloat16).num_bytes
    found = plan(with_config(example, ds_config="zero3-offload.json", gradient_checkpointing=False), num_gpus=1)
    assert found.training.gather_seconds == pytest.approx(2 * weights / (LINK_SHARE * 64e9))
    assert "offloaded: 145 GB of the base in the memory of each machine" in found.note


def test_both_bases_stay_where_the_run_keeps_both(example: FleetConfig) -> None:
    """By the run's rule: the second base and its batches, twice its weights, beside the first; with vLLM never."""
    hardware, shapes = Hardware(GPUS["h100-80gb"], 8), read_shapes(example)
    once = shapes.generator.num_bytes / hardware.load_rate
    assert load_seconds(example, shapes, hardware, 8)["generate"] == pytest.approx(once), "145 + 2 * 141 of 616 GB"
    in_halves = load_seconds(example, shapes, hardware, 4)["generate"]
    assert in_halves == pytest.approx(3 * 2 * once), "427 of 308 GB: two actors read it in each of three rounds"
    vllm = example.model_copy(update={"source": example.source.model_copy(update={"vllm": {}})})
    assert load_seconds(vllm, shapes, hardware, 8)["generate"] == pytest.approx(3 * once)


def test_vllm_deals_out_a_bases_heads(example: FleetConfig) -> None:
    """64 heads: no actor of three or six GPUs, and none of another size than the fleet file's."""
    source = example.source.model_copy(update={"vllm": {}})
    six = plan(example.model_copy(update={"source": source}), num_gpus=6)
    assert six.settings["resources"]["gpus_per_actor"] == 4
    assert plan(example, num_gpus=3).settings["resources"] == {"num_actors": 1, "gpus_per_actor": 3}
    for settings, message in (
        ({"tensor_parallel_size": 16}, "vllm: no actor of 1 to 8 GPUs can be: tensor_parallel_size has to divide"),
        ({"tensor_parallel_size": 3}, "vllm: no actor of 1 to 8 GPUs can be"),
        ({"pipeline_parallel_size": 16}, "vllm: no actor of 1 to 8 GPUs can be"),
        ({"tensor_parallel_size": 4, "gpu_memory_utilization": 0.3}, ""),
    ):
        own = example.model_copy(update={"source": source.model_copy(update={"vllm": settings})})
        if message:
            with pytest.raises(ValueError, match=message):
                plan(own)
        else:
            assert any("raise vllm.gpu_memory_utilization" in problem for problem in plan(own).problems)
    large = example.distill.lora.model_copy(update={"rank": 1024})
    target = example.target.model_copy(update={"vllm": {}})
    with pytest.raises(ValueError, match=r"distill.lora: rank 1024, the limit of vLLM is 512; leave `vllm` of"):
        plan(with_config(example, lora=large).model_copy(update={"target": target}))
    everything = large.model_copy(update={"target_modules": "all-linear"})
    heavy = plan(with_config(example, lora=everything))
    assert any("lower distill.lora.rank, or name fewer" in problem for problem in heavy.problems)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    settings = BaseModelConfig(model=str(base))
    for use in (check_engine, lambda given: load_model(given, torch.bfloat16, None)):
        with pytest.raises(ValueError, match=r"base: its weights are quantised \(fp8\), which is not supported; give"):
            use(settings)
    with pytest.raises(ValueError, match="its weights are quantised"):
        read_shape(settings, torch.bfloat16)


def test_bundles_at_hand_give_their_sizes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for index in range(2):
        make_bundle(tmp_path / f"bundles/orders-{index}", base, num_samples=10 * (index + 1))
    raw = {
        "run_dir": "run",
        "source": {"model": str(base)},
        "target": {"model": str(base)},
        "adapters": [
            str(tmp_path / "bundles/orders-?"),
            {"bundle": str(tmp_path / "bundles/orders-1"), "num_samples": 7},
        ],
    }
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(raw))
    work = bundled_work(load_config(tmp_path / "fleet.yaml", FleetConfig), 0.5)
    assert [one.num_samples for one in work.adapters] == [10, 7]
    assert {one.num_seeds for one in work.adapters} == {5}
    assert {one.screen for one in work.adapters} == {"realness"}
    weights = load_file(tmp_path / "bundles/orders-0/adapter_model.safetensors").values()
    config = load_config(tmp_path / "fleet.yaml", FleetConfig)
    large = with_config(config, num_workers=1, lora=config.distill.lora.model_copy(update={"rank": 64}))
    gate = plan_fleet(large, read_shapes(large), Hardware(GPUS["h100-80gb"], 1), work).phases[3]
    students = 3 * lora_weights(read_shape(large.target, torch.bfloat16).adapted(["q_proj", "v_proj"]), 64)
    assert gate.memory["adapters"] == 2 * students, "two students in bfloat16 and a place of zeros"
    assert num_weights(work.adapters[0].sizes or {}) == sum(tensor.numel() for tensor in weights)
    assert work.adapters[0].judge_sizes
    assert 5 <= work.adapters[0].input_tokens <= 10, "seeds of some 30 characters"
    (tmp_path / "bundles/orders-0/translora/manifest.json").unlink()
    left = bundled_work(load_config(tmp_path / "fleet.yaml", FleetConfig), 0.5)
    assert [one.num_samples for one in left.adapters] == [7], "as a run would quarantine it"
    (tmp_path / "bundles/orders-1/translora/manifest.json").unlink()
    with pytest.raises(ValueError, match="none of the fleet's bundles can be read"):
        bundled_work(load_config(tmp_path / "fleet.yaml", FleetConfig), 0.5)


def test_a_published_training_of_70b_is_planned_with_the_memory_that_the_docs_set_against_it(tmp_path: Path) -> None:
    """PEFT's guide to DeepSpeed: Llama 2 70B, rank 8 on all linear modules, eight samples of 2048 tokens a GPU."""
    shape = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    shape |= {"intermediate_size": 28672, "vocab_size": 32000, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    base = {"model": str(tmp_path)}
    distill = {"batch_size": 64, "micro_batch_size": 8, "max_length": 2048, "gang_size": 1, "dtype": "bfloat16"}
    distill |= {"lora": {"rank": 8, "target_modules": "all-linear"}, "gradient_checkpointing": True}
    synthesis = {"sampling": {"max_new_tokens": 1980}, "max_answer_tokens": 64, "screen": "none"}
    raw = {"run_dir": "run", "source": base, "target": base, "adapters": [{"bundle": "x"}], "distill": distill}
    config = FleetConfig.model_validate({**raw, "synthesis": synthesis})
    memory = plan(config, num_adapters=1).phases[2].memory
    assert plan(config, num_adapters=1).training.tokens_per_pass == 8 * 2048
    passing = memory["activations"] + memory["logits and gradients"]
    parts = (memory["its part of the base"], memory["gathered layers and head"], memory["students"], passing)
    assert [round(part / 1e9) for part in parts] == [17, 3, 2, 30]
    set_aside = GPUS["h100-80gb"].memory_bytes - Hardware(GPUS["h100-80gb"], 8).room
    assert round((sum(parts) + set_aside) / 1e9) == 55


def test_what_is_merged_before_it_migrates_is_planned_with_the_rest(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    parts = [str(make_bundle(tmp_path / name, base, num_samples=10, seed=seed).path) for seed, name in enumerate("ab")]
    raw = {
        "run_dir": tmp_path / "run",
        "source": {"model": str(base)},
        "target": {"model": str(base)},
        "adapters": [{"bundle": part} for part in parts],
        "merges": [
            {"name": "both", "when": "before", "method": "static_cat", "adapters": parts, "epochs": 3},
            {"name": "later", "when": "after", "method": "static_cat", "adapters": ["a", "b"]},
        ],
    }
    *alone, merged = bundled_work(FleetConfig.model_validate(raw), 0.5).adapters
    assert len(alone) == 2 and (merged.num_samples, merged.num_seeds, merged.epochs) == (20, 10, 3)
    assert num_weights(merged.sizes or {}) == sum(num_weights(one.sizes or {}) for one in alone)
    assert merged.screen == "confidence", "it has no discriminator"


def test_what_vllm_does_not_take_is_left_out_and_a_merge_has_the_rank_that_it_is_cut_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base")
    for seed, name in enumerate("abc"):
        make_bundle(tmp_path / name, base, seed=seed, num_samples=10)
    rank = max(own for own, _ in adapter_sizes(str(tmp_path / "a")).values())
    config = json.loads((tmp_path / "c/adapter_config.json").read_text())
    (tmp_path / "c/adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    manifest = json.loads((tmp_path / "c/translora/manifest.json").read_text())
    manifest["files"]["adapter_config.json"] = sha256_file(tmp_path / "c/adapter_config.json")
    (tmp_path / "c/translora/manifest.json").write_text(json.dumps(manifest))
    parts = [str(tmp_path / name) for name in "ab"]
    merge = {"when": "before", "adapters": parts}
    raw = {
        "run_dir": tmp_path / "run",
        "source": {"model": str(base), "vllm": {}},
        "target": {"model": str(base)},
        "adapters": [{"bundle": str(tmp_path / name)} for name in "abc"],
        "merges": [
            {"name": "sum", "method": "static_cat", **merge},
            {"name": "cut", "method": "static_cat", "rank": rank, **merge},
            {"name": "mean", "method": "linear", **merge},
        ],
    }
    found = [one.sizes or {} for one in bundled_work(FleetConfig.model_validate(raw), 0.5).adapters]
    assert [max(own for own, _ in sizes.values()) for sizes in found] == [rank, rank, 2 * rank, rank, rank]
    assert "c: is no plain LoRA, and vLLM computes no others" in caplog.text


def test_a_base_that_no_gpu_can_keep_whole_is_to_be_gathered_by_layers(example: FleetConfig) -> None:
    (problem,) = plan(with_config(example, ds_config="zero3-resident.json"), num_gpus=64).problems
    assert problem.endswith("set distill.ds_config to zero3.json, with which a GPU gathers a layer at a time")


def test_checkpoints_of_lora_pro_hold_moments_of_whole_matrices(example: FleetConfig) -> None:
    lora = example.distill.lora.model_copy(update={"gradient": "lora-pro"})
    plain, pro = (plan(one, gpu="h200-141gb") for one in (example, with_config(example, lora=lora)))
    shapes = read_shape(example.target, torch.bfloat16).adapted(lora.target_modules)
    whole, weights = sum(map(math.prod, shapes.values())), lora_weights(shapes, lora.rank)
    for found, moments in ((plain, weights), (pro, whole)):
        expected = found.training.checkpointed * (4 * weights + 8 * moments)
        assert found.disk["checkpoints of the gangs"] == expected


def test_the_command_prints_the_tables_and_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", str(EXAMPLE / "fleet.yaml"), "--adapters", "300"]
    assert main([*flags, "--gpus", "8", "64"]) == MIGRATED
    shown = capsys.readouterr().out
    for part in ("300 adapters on 8 x h100-80gb", "300 adapters on 64 x h100-80gb", "per GPU-hour", "tokens_per_pass:"):
        assert part in shown
    assert main([*flags, "--json", "--gpu", "a100-40gb", "--gpus", "4"]) == FAILED
    (found,) = json.loads(capsys.readouterr().out)
    assert found["problems"] and found["phases"][0]["name"] == "generate"
    for huge in ("1000000000000", "9" * 5000):
        with pytest.raises(SystemExit):
            main([*flags, "--gpus", huge])
    assert "1000000000000 is not within 1 and 1,000,000" in capsys.readouterr().err


def test_a_plan_without_bundles_or_bases_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], example: FleetConfig
) -> None:
    assert main(["plan", str(EXAMPLE / "fleet.yaml")]) == UNUSABLE
    assert "give --adapters and --samples instead" in capsys.readouterr().err
    raw = yaml.safe_load((EXAMPLE / "fleet.yaml").read_text())
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(raw | {"source": {"model": str(tmp_path)}}))
    assert main(["plan", str(tmp_path / "fleet.yaml"), "--adapters", "3"]) == UNUSABLE
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["parts", "dynamic"])
def test_a_base_with_parts_and_one_that_fake_tensors_cannot_do_are_planned(
    tmp_path: Path, example: FleetConfig, kind: str
) -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 96, "vocab_size": 100, "head_dim": 16}
    config = {"model_type": "llama", **text, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    if kind == "parts":
        config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **text}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = BaseModelConfig(model=str(tmp_path))
    found = plan(example.model_copy(update={"source": base, "target": base}))
    assert not found.problems
    assert found.training.activations["recomputed"] < found.training.activations["kept"]
    assert len(read_shape(base, torch.bfloat16).adapted(["q_proj"])) >= 3
