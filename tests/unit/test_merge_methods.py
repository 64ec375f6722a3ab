"""Every method through the command: rsLoRA, the adapters' order, unequal ranks, truncation, the card, bad input."""

from __future__ import annotations

import itertools
import json
import time
import typing
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraModel, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import SEEDS, make_adapter, make_base, make_bundle
from translora.cli import main
from translora.config.merge import COMBINATIONS, METHODS, merge_config
from translora.engine.prompts import prompt_format
from translora.lora.peft_io import LoraWeights, read_lora
from translora.merge.aggregate import component_mean, fedex
from translora.merge.data import read_samples
from translora.merge.peft_methods import ELEMENTWISE, combine, truncate
from translora.run.files import write_jsonl

SETTINGS = {"iteris": ["iteris.max_iter=2"], "cat": ["cat.learning_rate=0.1", "cat.batch_size=4"]}
"""Quick ones, by method."""
WITH_DATA = ("cat", "iteris", "regmean")
PLAIN = "Q: {input}\nA:"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merge")
    base = make_base(root / "base")
    for index, name in enumerate("abc"):
        make_adapter(root / name, base, index, 2)
    make_adapter(root / "wide", base, 7, 3, target_modules=["v_proj", "o_proj"])
    make_adapter(root / "a-rs", base, 0, 2, use_rslora=True)
    make_adapter(root / "four", base, 4, 4, alpha=16)
    make_adapter(root / "four-rs", base, 4, 4, alpha=8, use_rslora=True)
    make_adapter(root / "four-b", base, 5, 4)
    for index, name in enumerate("abcf"):
        rows = [{"input": f"{index} {text}", "answer": f"yes {name}"} for text in SEEDS]
        write_jsonl(root / f"{name}.jsonl", rows)
    return root


def run(root: Path, method: str, names: list[str], out: str, *flags: str) -> dict[str, torch.Tensor]:
    """The merged adapter's updates by module."""
    arguments = ["merge", method, "--base", str(root / "base"), "--out", str(root / out), *flags]
    arguments += ["--adapters", *(str(root / name) for name in names)]
    if method in WITH_DATA:  # the adapters of one first letter are those of one task
        arguments += ["--data", *(str(root / f"{name[0]}.jsonl") for name in names)]
    assert main([*arguments, "--set", "dtype=float32", *SETTINGS.get(method, [])]) == 0
    return updates(read_lora(root / out))


def updates(lora: LoraWeights) -> dict[str, torch.Tensor]:
    return {name: lora.scaling[name] * B @ A for name, (A, B) in lora.modules.items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_adapters_changes_not_a_bit(world: Path, method: str) -> None:
    names = ["a", "b", "c"]
    run(world, method, names, f"{method}-abc")
    run(world, method, names[::-1], f"{method}-cba")
    files = [world / f"{method}-{order}/adapter_model.safetensors" for order in ("abc", "cba")]
    assert files[0].read_bytes() == files[1].read_bytes()
    one, other = (json.loads((world / f"{method}-{order}/merge.json").read_text()) for order in ("abc", "cba"))
    assert one == other
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "base"), files[0].parent)
    assert any(parameter.abs().max() > 0 for name, parameter in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("method", METHODS)
def test_rslora_is_merged_by_its_scaling(world: Path, method: str) -> None:
    """8 / sqrt(4) by rsLoRA is 16 / 4 without; PEFT alone makes cat and svd of the former sqrt(r) too large."""
    plain, rs = (read_lora(world / name) for name in ("four", "four-rs"))
    assert largest_difference(updates(plain), updates(rs)) == 0 and rs.config["use_rslora"]
    run(world, method, ["four", "four-b"], f"{method}-plain")
    run(world, method, ["four-rs", "four-b"], f"{method}-rs")
    files = [world / f"{method}-{kind}/adapter_model.safetensors" for kind in ("plain", "rs")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_lora(files[0].parent).config["use_rslora"] is False


def test_linear_has_cross_terms_as_in_peft(world: Path) -> None:
    """A and B are each scaled by sqrt(w) and summed: of two equal adapters comes twice their mean."""
    lora = read_lora(world / "a")
    merged = combine([lora, lora], [0.5, 0.5], "linear")
    twice = {name: 2 * update for name, update in updates(lora).items()}
    assert largest_difference({name: B @ A for name, (A, B) in merged.items()}, twice) < 1e-5


def test_static_cat_and_svd_are_the_weighted_sum_whatever_the_ranks(world: Path) -> None:
    names, weights = ["a-rs", "b", "wide"], [0.2, 0.5, -0.7]
    loras = [updates(read_lora(world / name)) for name in names]
    expected = {
        name: sum(weight * lora[name] for weight, lora in zip(weights, loras, strict=True) if name in lora)
        for name in {name for lora in loras for name in lora}
    }
    for method, flags in (("static_cat", ()), ("svd", ("--rank", "7"))):
        found = run(world, method, names, f"exact-{method}", "--weights", *map(str, weights), *flags)
        assert largest_difference(found, expected) < 1e-4, method
        lora = read_lora(world / f"exact-{method}")
        assert lora.max_rank == 7 and len({len(A) for A, _ in lora.modules.values()}) == 1


CARDS = ("cut", "whole", "svd-card", "linear-card")


def test_truncation_is_the_best_of_its_rank(world: Path) -> None:
    whole = run(world, "iteris", ["a", "b"], "whole")
    cut = run(world, "iteris", ["a", "b"], "cut", "--rank", "3")
    assert read_lora(world / "cut").max_rank == 3
    for name, update in whole.items():
        U, S, Vh = torch.linalg.svd(update)
        assert torch.allclose(cut[name], U[:, :3] * S[:3] @ Vh[:3], atol=1e-4 * float(S[0])), name
    run(world, "svd", ["a", "b"], "svd-card")  # rank 2 of 4
    run(world, "linear", ["a", "b"], "linear-card", "--rank", "2")  # which it has anyway
    truncated = {name: "truncated" in (world / name / "README.md").read_text() for name in CARDS}
    assert truncated == {"cut": True, "whole": False, "svd-card": True, "linear-card": False}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ELEMENTWISE])
def test_different_ranks_and_modules_are_merged(world: Path, method: str) -> None:
    (world / "w.jsonl").write_bytes((world / "c.jsonl").read_bytes())
    found = run(world, method, ["a", "b", "wide"], f"mixed-{method}")
    assert {name.rsplit(".", 1)[-1] for name in found} == {"q_proj", "v_proj", "o_proj"}
    assert all(torch.isfinite(update).all() for update in found.values())


@pytest.mark.parametrize("method", ["static_cat", "cat", "iteris", "regmean"])
def test_what_adapts_other_modules_adds_nothing_to_the_rank(world: Path, method: str) -> None:
    make_adapter(world / "aside", world / "base", 8, 3, target_modules=["o_proj"])
    run(world, method, ["a", "b", "aside"], f"aside-{method}")
    assert read_lora(world / f"aside-{method}").max_rank == 4


@pytest.mark.parametrize("method", ["svd", "cat", "iteris"])
def test_bundles_are_verified_and_bring_their_prompt_template(
    world: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {
        name: make_bundle(world / f"{name}-{method}", world / "base", seed=place, rank=2, prompt_template=template).path
        for place, (name, template) in enumerate((("chat", "chat"), ("a-plain", PLAIN), ("b-plain", PLAIN)))
    }
    run(world, method, [made["a-plain"].name, made["b-plain"].name], f"{method}-of-bundles")
    record = json.loads((world / f"{method}-of-bundles/merge.json").read_text())
    assert record["settings"]["prompt_template"] == PLAIN
    arguments = ["merge", method, "--base", str(world / "base"), "--out", str(world / f"{method}-never")]
    arguments += ["--data", str(world / "a.jsonl"), str(world / "b.jsonl")] if method in WITH_DATA else []
    assert main([*arguments, "--adapters", str(made["chat"]), str(made["a-plain"])]) == 2
    assert "the adapters have different prompt templates (Q: {input}" in capsys.readouterr().err
    weights = made["a-plain"] / "adapter_model.safetensors"
    weights.write_bytes((made["b-plain"] / "adapter_model.safetensors").read_bytes())
    assert main([*arguments, "--adapters", str(made["a-plain"]), str(made["b-plain"])]) == 2
    assert f"{weights}: changed or damaged" in capsys.readouterr().err and not (world / f"{method}-never").exists()


def test_where_the_result_cannot_lie_is_said_first_and_a_link_is_followed(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", "svd", "--base", str(world / "base"), "--adapters", str(world / "a"), str(world / "b")]
    for out in (world / "a.jsonl/x", Path("/proc/x/y")):
        assert main([*arguments, "--out", str(out)]) == 2
        assert f"{out}: cannot be written (" in capsys.readouterr().err
    earlier, link = world / "earlier", world / "link"
    link.symlink_to(earlier)
    for _ in range(2):
        assert main([*arguments, "--out", str(link)]) == 0
    assert link.is_symlink() and (earlier / "merge.json").is_file() and not list(world.glob(".tmp*"))


def test_an_answer_is_text_or_a_number_and_nothing_is_none(world: Path) -> None:
    prompts = prompt_format(AutoTokenizer.from_pretrained(world / "base"))
    rows = [{"input": "a", "answer": 0}, {"input": "b", "target": "1"}, {"input": "c", "answer": ""}, {"input": "d"}]
    write_jsonl(world / "labels.jsonl", rows)
    samples = read_samples(world / "labels.jsonl", prompts, 512, 16, 0)
    answers = [prompts.encode_pair("a", "0")[1], prompts.encode_pair("b", "1")[1], [], []]
    assert [sample.answer_ids for sample in samples] == answers
    for wrong in (["a", "b"], True, {"text": "a"}):
        write_jsonl(world / "labels.jsonl", [*rows, {"input": "e", "answer": wrong}])
        with pytest.raises(ValueError, match=f"labels.jsonl, row 5: its answer is {type(wrong).__name__}; give text"):
            read_samples(world / "labels.jsonl", prompts, 512, 16, 0)


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_elementwise_methods_refuse_different_ranks(
    world: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", method, "--base", str(world / "base"), "--out", str(world / "none"), "--adapters"]
    assert main([*arguments, str(world / "a"), str(world / "wide")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has the ranks 2, 3" in error and "svd" in error
    assert not (world / "none").exists()


def random_loras(ranks: list[int], seed: int = 0) -> list[LoraWeights]:
    g = torch.Generator().manual_seed(seed)
    return [
        LoraWeights(
            {"m": (torch.randn(r, 9, generator=g).double(), torch.randn(6, r, generator=g).double())},
            {"m": 0.3 + r},
            {},
        )
        for r in ranks
    ]


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("ranks", [[2, 2, 2], [1, 4, 2]])
def test_fedex_mean_and_residual_are_the_exact_mean(ranks: list[int], weights: list[float]) -> None:
    loras = random_loras(ranks)
    mean, residual = fedex(loras, weights)
    exact = sum(w * updates(lora)["m"] for w, lora in zip(weights, loras, strict=True))
    (A, B), (rest_A, rest_B) = mean["m"], residual["m"]
    assert torch.allclose(B @ A + rest_B @ rest_A, exact, atol=1e-12)
    assert len(A) == max(ranks) and len(rest_A) == 2 * max(ranks)
    assert not torch.allclose(B @ A, exact, atol=0.1), "the mean of the factors alone is not"


def test_fedex_of_bfloat16_adapters_is_exact_too() -> None:
    loras = random_loras([3, 2, 3])
    for lora in loras:
        lora.modules["m"] = tuple(factor.bfloat16() for factor in lora.modules["m"])  # type: ignore[assignment]
    (A, B), (rest_A, rest_B) = (part["m"] for part in fedex(loras, [1 / 3] * 3))
    exact = sum(lora.scaling["m"] * lora.modules["m"][1].double() @ lora.modules["m"][0].double() for lora in loras) / 3
    assert torch.allclose((B @ A + rest_B @ rest_A).double(), exact, atol=1e-5)


def test_a_data_file_that_is_not_there_is_one_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = [str(world / name) for name in sorted(path.name for path in world.iterdir() if path.is_dir())[:2]]
    missing = str(world / "typo.jsonl")
    code = main(["merge", "cat", "--adapters", *adapters, "--data", missing, "--out", str(world / "never")])
    assert code == 2 and f"--data {missing}: no such file" in capsys.readouterr().err


def test_components_are_averaged_over_those_that_have_them() -> None:
    loras, weights = random_loras([1, 3]), [0.25, 0.75]
    A, B = component_mean(loras, weights)["m"]
    (A0, B0), (A1, B1) = (lora.modules["m"] for lora in loras)
    assert torch.allclose(A, torch.cat([0.25 * A0 + 0.75 * A1[:1], A1[1:]]))
    assert torch.allclose(B, torch.cat([0.25 * 1.3 * B0 + 0.75 * 3.3 * B1[:, :1], 3.3 * B1[:, 1:]], dim=1))


def test_dare_depends_on_the_seed_alone() -> None:
    loras = random_loras([2, 2])
    one, same, other = (combine(loras, [0.5, 0.5], "dare_linear", density=0.5, seed=seed)["m"][0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_single_adapter_is_really_truncated() -> None:
    (lora,) = random_loras([4])
    cut = truncate({"m": lora.modules["m"]}, 2)["m"]
    assert len(cut[0]) == 2 and torch.linalg.matrix_rank(cut[1] @ cut[0]) == 2


def test_the_card_says_what_it_was_made_of(world: Path) -> None:
    run(world, "iteris", ["a", "b"], "carded")
    text = (world / "carded/README.md").read_text()
    assert ModelCard(text).data.to_dict() == {
        "base_model": "base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["translora", "lora", "merge"],
    }
    record = json.loads((world / "carded/merge.json").read_text())
    assert sorted(one["name"] for one in record["adapters"]) == ["a", "b"]
    assert all(one["sha256"] in text and one["data_sha256"] in text for one in record["adapters"])
    assert record["settings"]["iteris"]["max_iter"] == 2 and "2411.15231" in text


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"adapters": ["a"]}, "adapters: List should have at least 2"),
        ({"adapters": ["a", "a"]}, "named twice"),
        ({"out": "./b"}, "out: b is one of the adapters"),
        ({"weights": [1.0]}, "1 for 2 adapters"),
        ({"method": "iteris", "data": ["x"]}, "1 files for 2 adapters"),
        ({"method": "iteris", "data": ["x", "y"], "weights": [1.0, 1.0]}, "finds its own"),
        ({"method": "cat"}, "data: missing"),
        ({"data": ["x", "y"]}, "linear uses none"),
        ({"method": "fedex", "weights": [0.5, 0.6]}, "sum to 1"),
        ({"density": 0.2}, "density: linear does not follow it, which is of ties, dare and"),
        ({"method": "cat", "data": ["x"], "batch_size": 1}, r"\(for cat see cat.batch_size\); leave it out"),
        ({"cat": {"epochs": 3}}, "cat: linear does not follow it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        merge_config({"method": "linear", "adapters": ["a", "b"], "out": "o"} | changes)


def test_assignments_reach_their_sections(world: Path) -> None:
    settings = {"method": "iteris", "adapters": ["a", "b"], "out": "o", "data": ["x", "y"]}
    config = merge_config(settings, ["iteris.max_iter=5", "max_samples=20", "prompt_template={input}"])
    assert (config.iteris.max_iter, config.max_samples, config.prompt_template) == (5, 20, "{input}")
    with pytest.raises(ValueError, match="did you mean max_iter"):
        merge_config(settings, ["iteris.max_itr=5"])
    with pytest.raises(ValueError, match="not of the form"):
        merge_config(settings, ["density"])
    with pytest.raises(ValueError, match="--set method=cat: method is given already; give it once"):
        merge_config(settings, ["method=cat"])


def test_what_is_no_merged_adapter_is_not_replaced(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", "static_cat", "--base", str(world / "base"), "--adapters", str(world / "a"), str(world / "b")]
    assert main([*arguments, "--out", str(world / "c")]) == 2
    assert "is no merged adapter" in capsys.readouterr().err
    assert (world / "c/adapter_config.json").exists()
    (world / "empty").mkdir()
    assert main([*arguments, "--out", str(world / "empty")]) == 0
    assert (world / "empty/adapter_config.json").exists()


def test_nothing_that_a_merge_is_made_of_is_replaced_or_written_into(world: Path) -> None:
    make_adapter(world / "nest/a", world / "base", 1, 2)
    (world / "nest/merge.json").write_text("{}")  # as an earlier result has it
    settings = {"method": "static_cat", "adapters": [world / "nest/a", world / "b"]}
    for changes, fault in (
        ({"out": world / "nest"}, "out: .*nest would replace .*nest/a; give another directory"),
        ({"out": world / "b"}, "out: .*b is one of the adapters"),
        ({"out": world / "b/merged"}, "out: .*merged would lie in .*b; give another directory"),
        ({"out": world, "base": str(world / "base")}, "would replace"),
        (
            {
                "method": "cat",
                "adapters": [world / "b", world / "c"],
                "data": [world / "nest/x"],
                "out": world / "nest",
            },
            "out: .*nest would replace .*nest/x",
        ),
    ):
        with pytest.raises(ValueError, match=fault):
            merge_config(settings | changes)
    assert (world / "nest/a/adapter_model.safetensors").is_file()


def test_the_base_is_found_in_any_order(world: Path) -> None:
    """A bundle and a merged adapter tell its name, an adapter of PEFT its directory."""
    run(world, "static_cat", ["a", "b"], "named")
    found = []
    for number, names in enumerate((["named", "c"], ["c", "named"])):
        out = world / f"unnamed-{number}"
        assert main(["merge", "svd", "--out", str(out), "--adapters", *(str(world / name) for name in names)]) == 0
        found.append((out / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_regmean_is_iteris_with_its_settings(world: Path) -> None:
    own = ["--set", "iteris.max_iter=1", "iteris.a1=0", "iteris.a2=0", "iteris.norm=equal"]
    files = [world / f"same-{method}/adapter_model.safetensors" for method in ("regmean", "iteris")]
    for file, method in zip(files, ("regmean", "iteris"), strict=True):
        data = [str(world / f"{name}.jsonl") for name in "ab"]
        flags = ["--base", str(world / "base"), "--adapters", str(world / "a"), str(world / "b"), "--data", *data]
        assert main(["merge", method, "--out", str(file.parent), *flags, *(own if method == "iteris" else [])]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_combination_of_peft_is_offered() -> None:
    hints = typing.get_type_hints(LoraModel.add_weighted_adapter)
    assert {"cat" if name == "static_cat" else name for name in COMBINATIONS} == set(
        typing.get_args(hints["combination_type"])
    )
    assert set(itertools.chain(COMBINATIONS, WITH_DATA, ("fedex", "component_mean"))) == set(METHODS)


@pytest.mark.parametrize("method", ["iteris", "cat"])
def test_what_is_not_finite_is_not_written(world: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Factors that are finite by themselves, and whose outputs are not."""
    make_adapter(world / "huge", world / "base", 1, 2, scale=1e38)
    write_jsonl(world / "h.jsonl", [{"input": text, "answer": "yes"} for text in SEEDS])
    arguments = ["merge", method, "--base", str(world / "base"), "--out", str(world / "never"), "--adapters"]
    arguments += [str(world / "a"), str(world / "huge")]
    arguments += ["--data", str(world / "a.jsonl"), str(world / "h.jsonl")]
    assert main([*arguments, "--set", "dtype=float32"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("translora: ") and ("/huge: the inputs of" in last or "loss is nan" in last), last
    assert not (world / "never").exists()


def test_too_great_a_rank_is_refused_before_the_base_runs(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"rank-{index}" for index in range(3)]
    for index, name in enumerate(names):
        make_adapter(world / name, world / "base", index, 400)
        write_jsonl(world / f"{name}.jsonl", [{"input": text, "answer": "yes"} for text in SEEDS])
    arguments = ["merge", "iteris", "--base", str(world / "base"), "--out", str(world / "never"), "--adapters"]
    data = ["--data", *(str(world / f"{name}.jsonl") for name in names)]
    started = time.monotonic()
    assert main([*arguments, *(str(world / name) for name in names), *data]) == 2
    error = capsys.readouterr().err
    assert "would have rank 1200, the limit is 1024; give --rank" in error and "solve" not in error
    assert time.monotonic() - started < 60


def test_of_many_rows_a_few_are_drawn_whatever_the_files_are_called(world: Path) -> None:
    rows = [{"input": f"{number} {text}", "answer": "yes"} for number in range(40) for text in SEEDS]
    for name in ("a", "b"):
        write_jsonl(world / f"many-{name}.jsonl", rows)
    prompts = prompt_format(AutoTokenizer.from_pretrained(world / "base"))
    first, second, other = (
        read_samples(world / f"many-{name}.jsonl", prompts, 512, 16, seed)
        for name, seed in (("a", 0), ("b", 0), ("a", 1))
    )
    assert len(first) == 16 and first == second != other
    assert len(read_samples(world / "many-a.jsonl", prompts, 512, 512, 0)) == len(rows)


def test_regmean_takes_no_setting_that_it_would_not_follow() -> None:
    settings = {"method": "regmean", "adapters": ["a", "b"], "out": "o", "data": ["x", "y"]}
    for assignment in ("iteris.a2=0.01", "iteris.max_iter=3", "iteris.norm=base+delta", "iteris.reg_coef=0.5"):
        with pytest.raises(ValueError, match=r"regmean is iteris with one solve, equal weights"):
            merge_config(settings, [assignment])
    config = merge_config(settings, ["iteris.num_threads=2"])
    assert (config.solving.max_iter, config.solving.a2, config.solving.norm) == (1, 0, "equal")
    assert config.solving.num_threads == 2
