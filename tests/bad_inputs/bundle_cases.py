"""Bad bundles."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bad_inputs.workshop import (
    CONFIG,
    JUDGE,
    MANIFEST,
    SEEDS,
    WEIGHTS,
    Bench,
    Case,
    change_json,
    change_tensors,
    rehash,
)
from translora.bundle import inspect_base, read_bundle, verify_bundle

HUGE = json.dumps({"t": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 4]}}).encode()
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def spoiled(spoil: Callable[[Path], object], kind: str = "good") -> Callable[[Bench], object]:
    """Copy a bundle, spoil it, verify it."""

    def act(bench: Bench) -> None:
        bundle = bench.bundle(kind)
        spoil(bundle)
        bench.verify(bundle)

    return act


def made_wrong(spoil: Callable[[Path], object]) -> Callable[[Bench], object]:
    """Spoil a bundle before its hashes are taken."""
    return spoiled(lambda bundle: (spoil(bundle), rehash(bundle)))


def manifest(**values: Any) -> Callable[[Bench], object]:
    """A bundle whose manifest has these values."""
    return spoiled(lambda bundle: change_json(bundle / MANIFEST, **values))


def seeds(content: str) -> Callable[[Bench], object]:
    """A bundle with these seeds, hashed as they are."""
    return made_wrong(lambda bundle: (bundle / SEEDS).write_text(content))


def config(**values: Any) -> Callable[[Bench], object]:
    """A bundle whose adapter_config.json has these values, hashed as they are."""
    return made_wrong(lambda bundle: change_json(bundle / CONFIG, **values))


def tensors(change: Callable[[dict[str, torch.Tensor]], object], folder: str = "") -> Callable[[Bench], object]:
    """A bundle whose adapter weights were changed before hashing."""
    return made_wrong(lambda bundle: change_tensors(bundle / folder / WEIGHTS, change))


def foreign(kind: str, bench: Bench) -> None:
    """A bundle of another base that claims to be of this one."""
    bundle = bench.bundle(kind)
    rehash(bundle, base_fingerprint=bench.materials.base.fingerprint)
    bench.verify(bundle)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def replace_by_link(path: Path) -> None:
    aside = path.rename(path.parent.parent.parent / "elsewhere.jsonl")
    path.symlink_to(aside)


def fill_nan(loaded: dict[str, torch.Tensor]) -> None:
    loaded[f"{Q_PROJ}.lora_B.weight"][0, 0] = float("nan")


def widen_rank(loaded: dict[str, torch.Tensor]) -> None:
    loaded[f"{Q_PROJ}.lora_A.weight"] = torch.zeros(2000, 32)


def adapt(module: str, num_out: int, num_in: int) -> Callable[[dict[str, torch.Tensor]], object]:
    """Add a pair of rank 4 for one more module."""
    name = f"base_model.model.{module}"
    pair = {f"{name}.lora_A.weight": torch.ones(4, num_in), f"{name}.lora_B.weight": torch.ones(num_out, 4)}
    return lambda loaded: loaded.update(pair)


def adapt_head(bench: Bench) -> None:
    """LoRA on the head of a base whose head is not tied to the embedding."""
    bundle = bench.bundle("untied")
    change_tensors(bundle / WEIGHTS, adapt("lm_head", 320, 32))
    rehash(bundle)
    verify_bundle(read_bundle(bundle), inspect_base(str(bench.materials.root / "untied" / "old-base")))


CASES = [
    Case("no such bundle", lambda bench: bench.verify(bench.directory / "orders"), "no such directory"),
    Case("a file instead of a bundle", lambda bench: bench.verify(bench.file("orders.zip", "")), "not a directory"),
    Case("an empty directory", lambda bench: bench.verify(bench.directory), "not a bundle"),
    Case("a plain PEFT adapter", spoiled(lambda b: (b / MANIFEST).unlink()), "make one with `translora prepare`"),
    Case("manifest not JSON", spoiled(lambda b: cut(b / MANIFEST, 40)), "manifest.json: not JSON"),
    Case("manifest a JSON list", spoiled(lambda b: (b / MANIFEST).write_text("[]")), "expected a JSON object"),
    Case("manifest of a newer translora", manifest(schema_version=2), "upgrade translora"),
    Case("manifest without version", manifest(schema_version=None), "schema_version is None"),
    Case("manifest with an unknown key", manifest(owner="billing"), "owner: Extra inputs"),
    Case("manifest without |D|", manifest(num_samples=None), "num_samples: Field required"),
    Case("|D| as text", manifest(num_samples="250"), "num_samples: Input should be a valid integer"),
    Case("task name with a slash", manifest(task_name="../orders"), "task_name: String should match"),
    Case("prompt template without {input}", manifest(prompt_template="Route: {text}"), "contains {input}"),
    Case("prompt template with {input} twice", manifest(
        prompt_template="{input}{input}"), "contains {input} 2 times"),
    Case("manifest path that leaves the bundle", manifest(files={"../secret": "0" * 64}), "not a path inside"),
    Case("a symbolic link", spoiled(lambda b: replace_by_link(b / SEEDS)), "ask the owner for a bundle of plain files"),
    Case("a pickle beside the weights", spoiled(lambda b: (b / "training_args.bin").write_bytes(b"")), "a pickle"),
    Case("pickled weights only", spoiled(lambda b: (b / WEIGHTS).rename(b / "adapter_model.bin")), "adapter_model.bin"),
    Case("a pickle in the discriminator", spoiled(lambda b: (b / JUDGE / "opt.pt").write_bytes(b"")), "opt.pt"),
    Case("an unlisted file in translora/", spoiled(lambda b: (b / "translora/x.json").write_text("")), "not listed"),
    Case("unlisted safetensors", spoiled(lambda b: (b / "extra.safetensors").write_text("")), "not listed"),
    Case("weights missing", spoiled(lambda b: (b / WEIGHTS).unlink()), "adapter_model.safetensors: missing"),
    Case("seeds changed after the fact", spoiled(lambda b: (b / SEEDS).write_text(
        '{"input": "one"}\n{"input": "two"}\n')), "changed or damaged"),
    Case("weights truncated on the way", spoiled(lambda b: cut(b / WEIGHTS, 3000)), "changed or damaged"),
    Case("weights truncated when made", made_wrong(lambda b: cut(b / WEIGHTS, 3000)), "truncated"),
    Case("weights of a few bytes", made_wrong(lambda b: cut(b / WEIGHTS, 5)), "truncated"),
    Case("weights not safetensors", made_wrong(lambda b: (b / WEIGHTS).write_bytes(b"x" * 900)), "not safetensors"),
    Case("a header of many gigabytes", made_wrong(lambda b: (b / WEIGHTS).write_bytes(
        struct.pack("<Q", 1 << 40) + b"{}")), "cannot hold its header"),
    Case("a tensor larger than its bytes", made_wrong(lambda b: (b / WEIGHTS).write_bytes(
        struct.pack("<Q", len(HUGE)) + HUGE + b"0000")), "do not hold"),
    Case("no seeds file", spoiled(lambda b: (b / SEEDS).unlink()), "seeds.jsonl: missing"),
    Case("an empty seeds file", seeds(""), "no seeds"),
    Case("one seed", seeds('{"input": "one"}\n'), "1 different seed(s); give 2"),
    Case("the same seed twice", seeds('{"input": "one"}\n' * 2), "1 different seed(s)"),
    Case("seeds with answers", seeds('{"input": "one", "target": "x"}\n' * 2), "seeds are inputs only"),
    Case("seeds not JSON", seeds("one\ntwo\n"), "line 1: not JSON"),
    Case("seeds of 11 MB", seeds('{"input": "one"}\n' * 650_000), "the limit is 1,000,000"),
    Case("an adapter of another base", spoiled(lambda b: None, "other"), "made for the base 'new-base', not for"),
    Case("an adapter of other weights of that name", spoiled(lambda b: None, "retrained"), "made for other weights"),
    Case("adapter_config.json names another base", config(base_model_name_or_path="hub/else"), "is 'hub/else', but"),
    Case("a module that the base lacks", lambda bench: foreign("deeper", bench), "which 'old-base' does not have"),
    Case("LoRA on the embedding", tensors(adapt("model.embed_tokens", 320, 32)), "is no linear module of 'old-base'"),
    Case("LoRA on the output head", adapt_head, "LoRA on the output head is not supported"),
    Case("LoRA on an output head tied to the embedding", tensors(adapt("lm_head", 320, 32)), "the output head of"),
    Case("a module of another shape", lambda bench: foreign("wider", bench), "matrix, in 'old-base' it is [32, 32]"),
    Case("a rank that does not fit", config(r=8), "but the config says rank 8"),
    Case("a rank over the limit", tensors(widen_rank), "the limit is 1024"),
    Case("a rank that is no number", config(r="8"), "r is '8'"),
    Case("an alpha that is not finite", config(lora_alpha=float("nan")), "lora_alpha is nan"),
    Case("a rank pattern that never ends", config(rank_pattern={"(a+)+b": 4}), "use plain module names"),
    Case("a rank pattern of many options", config(rank_pattern={"a?" * 20 + "a" * 20: 4}), "use plain module names"),
    Case("NaN in the weights", tensors(fill_nan), "holds NaN or infinity"),
    Case("A without B", tensors(lambda t: t.pop(f"{Q_PROJ}.lora_B.weight")), "has only lora_A"),
    Case("no tensors at all", tensors(lambda t: t.clear()), "holds no tensors"),
    Case("a full matrix in the adapter", tensors(lambda t: t.update(
        {"base_model.model.lm_head.weight": torch.zeros(2, 2)})), "unexpected tensor"),
    Case("integer weights", tensors(lambda t: t.update(
        {name: tensor.to(torch.int8) for name, tensor in t.items()})), "floating-point dtype"),
    Case("a DoRA without its magnitudes", config(use_dora=True), "lora_magnitude_vector, going by its config"),
    Case("a module that PEFT would import", config(
        use_dora=True, megatron_config={"x": 1}, megatron_core="os"), "megatron_config is set"),
    Case("target modules that never end", config(use_dora=True, target_modules="(a+)+b"), "use plain module names"),
    Case("thousands of target modules", config(
        use_dora=True, target_modules=[f"m{number}" for number in range(3000)]), "3000 entries, the limit is 2000"),
    Case("a target module of ten thousand parts", config(
        use_dora=True, target_modules=["q_proj", "a." * 10_000]), "has 20000 characters; use plain module names"),
    Case("thousands of ranks", config(
        rank_pattern={f"m{number}": 4 for number in range(3000)}), "rank_pattern: 3000 entries, the limit is 2000"),
    Case("PiSSA, not converted", config(init_lora_weights="pissa"), "path_initial_model_for_weight_conversion"),
    Case("LoftQ", config(init_lora_weights="loftq"), "train the adapter again with init_lora_weights: true"),
    Case("a LoRA that calls itself prompt tuning", config(peft_type="PROMPT_TUNING"), "num_virtual_tokens is None"),
    Case("a method that loads other adapters", config(peft_type="XLORA"), "peft_type is 'XLORA'; supported are"),
    Case("trained biases", config(bias="lora_only"), "only bias='none'"),
    Case("adapter_config.json not JSON", made_wrong(lambda b: cut(b / CONFIG, 30)), "adapter_config.json: not JSON"),
    Case("a promised discriminator that is not there", manifest(
        files={CONFIG: "0" * 64, WEIGHTS: "0" * 64, SEEDS: "0" * 64}), "has no hash for translora/discriminator"),
    Case("a discriminator better than perfect", manifest(discriminator_quality={
        "num_real": 20, "num_invented": 20, "auc": 1.5, "accepts_real": 1.0, "accepts_invented": 0.0,
    }), "discriminator_quality.auc: Input should be less than or equal to 1"),
    Case("a discriminator that the manifest denies", manifest(discriminator=False), "says that there is none"),
    Case("NaN in the discriminator", tensors(fill_nan, JUDGE), "discriminator/adapter_model.safetensors"),
]  # fmt: skip
