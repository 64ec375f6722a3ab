"""Bundles made to harm: to leave their directory, to fill memory or disk, to run code, to write on a terminal."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bad_inputs.bundle_cases import Q_PROJ, config, made_wrong, manifest, seeds, spoiled, tensors
from tests.bad_inputs.workshop import CONFIG, JUDGE, MANIFEST, SEEDS, WEIGHTS, Bench, Case, change_json, rehash
from translora.bundle.manifest import MAX_BUNDLE_BYTES, MAX_FILES

ESCAPE = "\x1b[2J\x1b[31mowned"
HASH = "0" * 64


def header(entries: dict[str, Any], padding: int = 0) -> Callable[[Path], object]:
    """Weights with this header and no more."""

    def spoil(bundle: Path) -> None:
        text = json.dumps(entries).encode() + b" " * padding
        (bundle / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)

    return spoil


def linked(bench: Bench) -> None:
    """A tenant's link to another tenant's bundle."""
    (bench.directory / "theirs").mkdir()
    other = bench.bundle().rename(bench.directory / "theirs" / "orders")
    (bench.directory / "mine").symlink_to(other)
    bench.verify(bench.directory / "mine")


def listed(name: str) -> Callable[[Bench], object]:
    """A manifest that lists one more file."""

    def spoil(bundle: Path) -> None:
        files = json.loads((bundle / MANIFEST).read_text())["files"]
        change_json(bundle / MANIFEST, files=files | {name: HASH})

    return spoiled(spoil)


def twice(path: str, key: str, value: object) -> Callable[[Bench], object]:
    """A JSON file in which a key comes a second time, after the hashes fit the first."""

    def spoil(bundle: Path) -> None:
        text = (bundle / path).read_text().rstrip().removesuffix("}")
        (bundle / path).write_text(f"{text}, {json.dumps(key)}: {json.dumps(value)}}}")
        if path != MANIFEST:
            rehash(bundle)

    return spoiled(spoil)


def sparse(bundle: Path) -> None:
    (bundle / "filler").touch()
    os.truncate(bundle / "filler", MAX_BUNDLE_BYTES)


def many_files(bundle: Path) -> None:
    for number in range(MAX_FILES):
        (bundle / f"{number}.txt").touch()


def three_dimensions(loaded: dict[str, torch.Tensor]) -> None:
    loaded[f"{Q_PROJ}.lora_A.weight"] = torch.ones(4, 32, 1)


def wide(loaded: dict[str, torch.Tensor]) -> None:
    loaded[f"{Q_PROJ}.lora_A.weight"] = torch.ones(4, 100_000)


def renamed(name: str) -> Callable[[Bench], object]:
    """A sound bundle in a directory of this name."""
    return lambda bench: bench.migrate(bench.bundle().rename(bench.directory / name))


CASES = [
    Case("a link to somebody else's bundle", linked, "mine: a symbolic link, which is never followed"),
    Case("a link to a directory outside", spoiled(lambda b: (b / "extra").symlink_to("/etc")), "extra: a symbolic"),
    Case("a link that leads nowhere", spoiled(lambda b: (b / "extra").symlink_to("none")), "extra: a symbolic link"),
    Case("a named pipe, which would never end", spoiled(
        lambda b: os.mkfifo(b / "notes")), "notes: neither a file nor a directory"),
    Case("an absolute path in the manifest", listed("/etc/passwd"), "'/etc/passwd' is not a path inside the bundle"),
    Case("a path with .. in its middle", listed("a/../../secret"), "'a/../../secret' is not a path inside"),
    Case("a path with a backslash", listed("..\\secret"), "is not a path inside the bundle"),
    Case("a path with a zero byte", listed("a\0b"), "'a\\x00b' is not a path inside the bundle"),
    Case("a manifest key that writes on the terminal", manifest(**{ESCAPE: 1}), "\\x1b[2J\\x1b[31mowned: Extra"),
    Case("a file name that writes on the terminal", spoiled(
        lambda b: (b / f"{ESCAPE}.bin").touch()), "orders/\\x1b[2J\\x1b[31mowned.bin: looks like a pickle"),
    Case("a base name that writes on the terminal", made_wrong(
        lambda b: change_json(b / CONFIG, base_model_name_or_path=ESCAPE)), "is '\\x1b[2J\\x1b[31mowned', but"),
    Case("a tensor name that writes on the terminal", made_wrong(
        header({ESCAPE: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})), "unexpected tensor '\\x1b[2J"),
    Case("a module name that writes on the terminal", made_wrong(header(
        {f"base_model.model.{ESCAPE}.lora_A.weight": {"dtype": "F32", "shape": [0, 0], "data_offsets": [0, 0]}})),
        "adapts \\x1b[2J\\x1b[31mowned, which"),
    Case("a manifest that says two things", twice(MANIFEST, "num_samples", 9), "the key 'num_samples' comes twice"),
    Case("an adapter_config.json that says two things", twice(CONFIG, "r", 4), "the key 'r' comes twice"),
    Case("a header that says two things", made_wrong(lambda b: (b / WEIGHTS).write_bytes(
        struct.pack("<Q", 14) + b'{"a":1,"a":2} ')), "the key 'a' comes twice"),
    Case("more bytes than fit on a disk", spoiled(sparse), "the limit is 34,359,738,368"),
    Case("a thousand files", spoiled(many_files), "more than 1000 files"),
    Case("a manifest of megabytes", manifest(provenance={"note": "x" * 1_100_000}), "the limit is 1,000,000"),
    Case("an adapter_config.json of megabytes", config(note="x" * 1_100_000), "the limit is 1,000,000"),
    Case("a tensor header of megabytes", made_wrong(header({}, 10_000_001)), "the limit is 10,000,000"),
    Case("a tensor of a thousand dimensions", made_wrong(header(
        {"t": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}})), "1,000 dimensions"),
    Case("a tensor of negative size", made_wrong(header(
        {"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}})), "-1 is no size"),
    Case("tensors that overlap", made_wrong(header(
        {name: {"dtype": "F32", "shape": [0], "data_offsets": [at, at]} for name, at in (("a", 0), ("b", 4))})),
        "its tensors overlap or leave gaps"),
    Case("a factor wider than the base", tensors(wide), "adapts a [32, 100000] matrix, in 'old-base' it is [32, 32]"),
    Case("a factor of three dimensions", tensors(three_dimensions), "has A [4, 32, 1] and B [32, 4]"),
    Case("a rank of zero", config(r=0), "r is 0, expected a positive number"),
    Case("a rank that is true", config(r=True), "r is True, expected a positive number"),
    Case("three hundred seeds", seeds("".join(
        f'{{"input": "seed {number}"}}\n' for number in range(300))), "300 seeds, the limit is 200"),
    Case("a seed of a number", seeds('{"input": 1}\n{"input": 2}\n'), '"input" must be a non-empty string'),
    Case("|D| without limit", manifest(num_samples=10**12), "num_samples: Input should be less than or equal to"),
    Case("|D| below the least", manifest(num_samples=1), "num_samples: Input should be greater than or equal to 2"),
    Case("a prompt template of a book's length", manifest(
        prompt_template="{input}" + "x" * 20_000), "prompt_template: String should have at most 20000 characters"),
    Case("a base name of a page's length", manifest(base_name="x" * 300), "base_name: String should have at most 256"),
    Case("a fingerprint that is none", manifest(base_fingerprint="../secret"), "base_fingerprint: String should match"),
    Case("a discriminator of another rank than it says", made_wrong(
        lambda b: change_json(b / JUDGE / CONFIG, r=8)), "discriminator/adapter_model.safetensors"),
    Case("seeds that are a directory", spoiled(
        lambda b: ((b / SEEDS).unlink(), (b / SEEDS).mkdir())), "seeds.jsonl: missing"),
]  # fmt: skip

FLEET_CASES = [
    Case("seeds that are longer than what is trained on", lambda bench: bench.migrate(
        bench.bundle(), distill={"max_length": 9}), "distill.max_length is 9; raise it"),
    Case("a |D| that would occupy the whole fleet", lambda bench: bench.migrate(
        _resized(bench, 9_000_000)), "its |D| is 9,000,000, max_num_samples is 20,000; set num_samples"),
    Case("a rank that would make the bank large for all", lambda bench: bench.migrate(
        bench.bundle(), max_rank=2), "its rank is 4, max_rank is 2; raise max_rank"),
    Case("seeds longer than what is invented", lambda bench: bench.migrate(
        bench.bundle(), synthesis={"sampling": {"max_new_tokens": 2}}), "are cut off and dropped; raise synthesis."),
    Case("a prompt template longer than the base's context", lambda bench: bench.migrate(
        _changed(bench, prompt_template="{input}" + " order" * 3000)), "ship a shorter template"),
    Case("seeds longer than the generator's context", lambda bench: bench.migrate(
        _with_seeds(bench, "parcel " * 3000, "order")), "ship fewer or shorter seeds"),
    Case("a bundle below a name of 300 characters", lambda bench: bench.migrate(
        bench.directory / ("b" * 300) / "orders"), "File name too long"),
    Case("a directory name that writes on the terminal", renamed(ESCAPE), "name cannot be an adapter's"),
    Case("a hidden directory", renamed(".orders"), "the directory's name cannot be an adapter's"),
    Case("a directory name of two lines", renamed("orders\nowned"), "the directory's name cannot be an adapter's"),
    Case("a directory that is its own parent", lambda bench: bench.migrate(
        bench.bundle() / "translora" / ".."), "the directory's name cannot be an adapter's"),
    Case("a chat bundle of a base without chat template", lambda bench: bench.migrate(
        bench.materials.root / "bundles" / "other", source={"model": str(bench.materials.root / "new-base")},
        target=bench.materials.base.path), "other: prompt template is 'chat', but the tokenizer has no"),
    Case("a new adapter's prompt template without {input}", lambda bench: bench.migrate(
        bench.bundle(), {"prompt_template": "Answer:"}), "'Answer:' lacks {input}"),
    Case("the source adapter's chat template for a base that has none", lambda bench: bench.migrate(
        bench.bundle(), {"prompt_template": "source"}), "is 'chat', but the tokenizer has no chat template"),
    Case("no discriminator where the fleet asks for one", lambda bench: bench.migrate(
        _without_judge(bench), synthesis={"screen": "discriminator"}), "has no discriminator; set synthesis.screen"),
    Case("eval_data that is not there", lambda bench: bench.migrate(
        bench.bundle(), {"eval_data": str(bench.directory / "none.jsonl")}), "none.jsonl: cannot be read"),
    Case("eval_data without targets", lambda bench: bench.migrate(
        bench.bundle(), {"eval_data": str(bench.file("held-out.jsonl", '{"input": "a"}\n'))}), '"target" must be'),
]  # fmt: skip


def _changed(bench: Bench, **values: Any) -> Path:
    bundle = bench.bundle()
    change_json(bundle / MANIFEST, **values)
    return bundle


def _resized(bench: Bench, num_samples: int) -> Path:
    return _changed(bench, num_samples=num_samples)


def _with_seeds(bench: Bench, *texts: str) -> Path:
    bundle = bench.bundle()
    (bundle / SEEDS).write_text("".join(json.dumps({"input": text}) + "\n" for text in texts))
    rehash(bundle)
    return bundle


def _without_judge(bench: Bench) -> Path:
    bundle = bench.bundle()
    for path in (bundle / JUDGE).iterdir():
        path.unlink()
    rehash(bundle, discriminator=False)
    return bundle
