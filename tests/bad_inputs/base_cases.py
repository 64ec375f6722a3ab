"""Bad bases, and bundles that cannot be written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from huggingface_hub import constants

from tests.bad_inputs.workshop import Bench, Case, change_json
from tests.tiny import SEEDS
from translora.bundle import inspect_base, write_bundle
from translora.bundle.modules import linear_modules
from translora.config import BaseModelConfig
from translora.engine.loading import load_tokenizer

CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
"""A base's own code, which leaves a trace when it is run."""
INDEX = "model.safetensors.index.json"


def spoiled(spoil: Callable[[Path], object], kind: str = "old-base") -> Callable[[Bench], object]:
    """Copy a base, spoil it, inspect it."""

    def act(bench: Bench) -> None:
        base = bench.base(kind)
        spoil(base)
        inspect_base(str(base))

    return act


def tokenizer(spoil: Callable[[Path], object], kind: str = "old-base") -> Callable[[Bench], object]:
    """Copy a base, spoil it, load its tokenizer."""

    def act(bench: Bench) -> None:
        base = bench.base(kind)
        spoil(base)
        load_tokenizer(BaseModelConfig(model=str(base)))

    return act


def without_architecture(bench: Bench) -> None:
    """A base that only its own code could build."""
    base = bench.base()
    change_json(base / "config.json", model_type="our-own-model")
    linear_modules(inspect_base(str(base)))


def to_an_unknown_architecture(bench: Bench) -> object:
    """A fleet whose target is newer than this machine's transformers."""
    base = bench.base("new-base")
    change_json(base / "config.json", model_type="our-own-model")
    return bench.migrate(bench.materials.root / "bundles" / "good", target=base)


def unreachable(bench: Bench) -> None:
    """A hub id without a hub."""
    with patch.object(constants, "HF_HUB_OFFLINE", True), patch.object(constants, "HF_HUB_CACHE", str(bench.directory)):
        inspect_base("nobody/no-such-model")


def give_code(base: Path, marker: Path) -> None:
    """Make a base one that only its own code can build."""
    (base / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change_json(base / "config.json", model_type="own", architectures=["OwnModel"], auto_map=names)


def own_code(bench: Bench) -> None:
    base = bench.base()
    give_code(base, bench.directory / "ran")
    try:
        linear_modules(inspect_base(str(base)))
    finally:
        assert not (bench.directory / "ran").exists(), "the base's code was run"


def own_tokenizer(base: Path) -> None:
    (base / "tokenization_own.py").write_text("raise SystemExit('ran')\n")
    names = {"AutoTokenizer": ["tokenization_own.Own", None]}
    change_json(base / "tokenizer_config.json", tokenizer_class="Own", auto_map=names)
    (base / "tokenizer.json").write_text("{}")


def code_elsewhere(bench: Bench) -> None:
    base = bench.base()
    give_code(base, bench.directory / "ran")
    change_json(base / "config.json", auto_map={"AutoConfig": "somebody/else--modeling_own.OwnConfig"})
    inspect_base(str(base), trust_remote_code=True)


def chat_template(text: str) -> Callable[[Bench], object]:
    """A base with this chat template."""
    return tokenizer(lambda base: (base / "chat_template.jinja").write_text(text))


def first_shard(base: Path) -> Path:
    return sorted(base.glob("model-*.safetensors"))[0]


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def promise(base: Path, tensor: str, shard: str) -> None:
    index = json.loads((base / INDEX).read_text())
    change_json(base / INDEX, weight_map=index["weight_map"] | {tensor: shard})


def written(adapter: str = "good", to: str = "new", **values: Any) -> Callable[[Bench], object]:
    """Write a bundle with these values."""

    def act(bench: Bench) -> None:
        adapters = bench.materials.root / "bundles"
        arguments = {
            "adapter_dir": adapters / adapter,
            "discriminator_dir": None,
            "seeds": list(SEEDS),
            "task_name": "orders",
            "base": bench.materials.base,
            "num_samples": 16,
            "prompt_template": "chat",
            "provenance": {},
        }
        write_bundle(bench.directory / to, **(arguments | values))

    return act


def over_something_else(bench: Bench) -> None:
    bench.file("notes.txt", "keep me")
    written(to=".")(bench)


CASES = [
    Case("a revision of a directory", lambda bench: inspect_base(
        str(bench.base()), revision="v2"), "a directory, and `revision` is of a model on the hub; leave v2 out"),
    Case("no such directory", lambda bench: inspect_base(str(bench.directory / "llama")), "no such directory"),
    Case("neither a directory nor reachable on a hub", unreachable, "the hub cannot be reached"),
    Case("a single file", lambda bench: inspect_base(str(bench.file("model.gguf", ""))), "a file; give a model"),
    Case("no config.json", spoiled(lambda b: (b / "config.json").unlink()), "config.json: missing"),
    Case("config.json not JSON", spoiled(lambda b: cut_in_half(b / "config.json")), "config.json: not JSON"),
    Case("an adapter instead of a base", lambda bench: inspect_base(str(bench.bundle())), "an adapter, not a base"),
    Case("no tokenizer", spoiled(lambda b: (b / "tokenizer.json").unlink()), "has no tokenizer"),
    Case("a truncated tokenizer", tokenizer(lambda b: cut_in_half(b / "tokenizer.json")), "tokenizer cannot be loaded"),
    Case("a tokenizer without its config", tokenizer(
        lambda b: (b / "tokenizer_config.json").unlink(), "new-base"), "tokenizer cannot be loaded"),
    Case("a tokenizer without special tokens", tokenizer(
        lambda b: (b / "tokenizer_config.json").unlink()), "neither a padding nor an end-of-text token"),
    Case("an architecture that transformers lacks", without_architecture, "makes no causal language model"),
    Case("a fleet's target that transformers lacks", to_an_unknown_architecture, "transformers cannot read it"),
    Case("a base that wants its own code run", own_code, "is not run; read that code, then set trust_remote_code"),
    Case("a tokenizer that wants its own code run", tokenizer(own_tokenizer), "its own (auto_map), which is not run"),
    Case("trusted code that lies elsewhere", code_elsewhere, "code of another repository, which is never fetched"),
    Case("an adapter hidden in a base", spoiled(
        lambda b: (b / "adapter_config.json").write_text("{}")), "an adapter that transformers would put on the base"),
    Case("a chat template that reaches for Python", chat_template(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"), "access to attribute '__class__' of 'str' object is unsafe"),
    Case("a chat template that is no template", chat_template("{% for %}"), "its tokenizer cannot be loaded"),
    Case("a chat template that refuses users", chat_template(
        "{{ raise_exception('no users here') }}"), "its tokenizer cannot be loaded (no users here)"),
    Case("a config of a JSON bomb", spoiled(
        lambda b: (b / "config.json").write_text("[" * 100_000)), "config.json: not JSON"),
    Case("a config of megabytes", spoiled(
        lambda b: change_json(b / "config.json", note="x" * 10_000_000)), "the limit is 10,000,000"),
    Case("no weights", spoiled(lambda b: (b / "model.safetensors").unlink()), "model.safetensors: missing"),
    Case("pickled weights only", spoiled(
        lambda b: (b / "model.safetensors").rename(b / "pytorch_model.bin")), "only pickled weights"),
    Case("truncated weights", spoiled(lambda b: cut_in_half(b / "model.safetensors")), "truncated"),
    Case("weights with a tail", spoiled(
        lambda b: (b / "model.safetensors").open("ab").write(b"0")), "extra bytes at its end"),
    Case("a truncated shard", spoiled(lambda b: cut_in_half(first_shard(b)), "sharded-base"), "truncated"),
    Case("a missing shard", spoiled(lambda b: first_shard(b).unlink(), "sharded-base"), "safetensors: missing"),
    Case("an index that promises too much", spoiled(
        lambda b: promise(b, "model.extra.weight", first_shard(b).name), "sharded-base"), "lacks the tensor"),
    Case("an index that leaves the directory", spoiled(
        lambda b: promise(b, "model.extra.weight", "../secret.safetensors"), "sharded-base"), "is not the name of"),
    Case("an index without weight_map", spoiled(
        lambda b: change_json(b / INDEX, weight_map=None), "sharded-base"), "has no weight_map"),
]  # fmt: skip

WRITE_CASES = [
    Case("writing over something that is not a bundle", over_something_else, "exists and is not a bundle"),
    Case("a task name with a space", written(task_name="my orders"), "task_name: String should match"),
    Case("a prompt template without {input}", written(prompt_template="Answer:"), "contains {input}"),
    Case("a prompt template with {input} twice", written(prompt_template="{input}{input}"), "contains {input} 2 times"),
    Case("no seeds to ship", written(seeds=[]), "no seeds"),
    Case("one seed to ship", written(seeds=["one"]), "1 different seed(s)"),
    Case("an adapter of another base to ship", written(adapter="other"), "if both are one model, write 'old-base'"),
    Case("an adapter of a deeper base to ship", written(adapter="deeper"), "does not have"),
    Case("a PiSSA adapter to ship", written(adapter="pissa"), "path_initial_model_for_weight_conversion"),
    Case("an adapter that is not there", written(adapter="none"), "adapter_config.json: missing"),
]
