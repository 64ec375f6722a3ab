"""A base that is read part by part: on two real ranks under ZeRO-3."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.memory import status_bytes
from tests.ranks import run_ranks
from tests.tiny import make_base, make_tokenizer
from translora.config import BaseModelConfig
from translora.distill.ds_config import read_ds_config
from translora.engine.loading import load_model

LARGE = LlamaConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=32, num_attention_heads=16, vocab_size=32000
)
SMALL_CHANGE_BYTES = 100_000_000
"""Beside the weights: module objects, one tensor that is built whole before it is partitioned, buffers for reading."""


def make_large_base(path: Path) -> int:
    """Write a bfloat16 base in two shards whose weights tell their own place; returns the weights' bytes."""
    with torch.device("meta"):
        names = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(LARGE).named_parameters()}
    path.mkdir()
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for index, (name, shape) in enumerate(names.items()):
        numel = torch.Size(shape).numel()
        weights = (torch.arange(numel, dtype=torch.int32) % 251 + index).to(torch.bfloat16)
        shards[index % 2][name] = weights.view(shape)
    files = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    LARGE.save_pretrained(path)
    make_tokenizer(vocab_size=320).save_pretrained(path)
    return sum(weights.nbytes for shard in shards for weights in shard.values())


def load_on_rank(rank: int, root: str, base: str, dtype: torch.dtype, ds_config: dict[str, Any]) -> None:
    """Load, and write down what this rank took and what a gathered tensor holds."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from translora.distill.loading import load_partitioned

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    resident = HfDeepSpeedConfig(ds_config)  # noqa: F841 (transformers holds it by weak reference)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    model = load_partitioned(BaseModelConfig(model=base), dtype, ds_config)
    taken = status_bytes("VmHWM") - before
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "no rank keeps a whole tensor"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    whole = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().flatten()[-1000:].clone()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    buffers = dict(model.named_buffers())
    torch.save({"taken": taken, "ends": whole, "tied": tied, "buffers": buffers}, f"{root}/rank-{rank}.pt")


def load_on_both(root: Path, base: Path, dtype: torch.dtype) -> list[dict[str, Any]]:
    ds_config = read_ds_config("zero3.json", dtype)
    run_ranks(load_on_rank, root, str(root), str(base), dtype, ds_config)
    return [torch.load(root / f"rank-{rank}.pt") for rank in range(2)]


def test_no_rank_ever_holds_the_whole_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once
    num_bytes = make_large_base(tmp_path / "base")
    assert num_bytes > 1e9
    for found in load_on_both(tmp_path, tmp_path / "base", torch.bfloat16):
        assert found["taken"] < 0.7 * num_bytes + SMALL_CHANGE_BYTES
        for index, (name, end) in enumerate(found["ends"].items()):
            numel = torch.Size(dict_of_shapes(tmp_path / "base")[name]).numel()
            last = (torch.arange(max(0, numel - 1000), numel, dtype=torch.int32) % 251 + index).to(torch.bfloat16)
            assert torch.equal(end, last), name


def dict_of_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    from translora.bundle.base import inspect_base

    return inspect_base(str(base)).shapes


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.013, 1.117, 1.231, 1.371, 1.507],
    "long_factor": [1.113, 1.317, 1.531, 1.771, 2.107],
    "original_max_position_embeddings": 512,
}
"""Factors that bfloat16 would round."""


@pytest.mark.parametrize(
    ("family", "rope", "head"), [("llama", None, None), ("llama", LONG, "equal"), ("gemma3", None, "other")]
)
def test_every_rank_gets_the_base_that_one_process_loads(tmp_path: Path, family: Any, rope: Any, head: Any) -> None:
    """A head that the config ties may lie in the files as well: where it is another one, it is the base's."""
    base = make_base(tmp_path / "base", family, hidden_size=40)
    if head is not None:
        tensors = load_file(base / "model.safetensors")
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if head == "equal" else embedding + 1
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    if rope is not None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    stored = load_file(base / "model.safetensors")
    alone = load_model(BaseModelConfig(model=str(base)), torch.bfloat16, torch.device("cpu"))
    for found in load_on_both(tmp_path, base, torch.bfloat16):
        assert found["tied"] == (head != "other") and ("lm_head.weight" in found["ends"]) == (head == "other")
        for name, end in found["ends"].items():
            assert torch.equal(end, stored[name].flatten()[-1000:].to(torch.bfloat16)), name
        expected = dict(alone.named_buffers())
        assert found["buffers"].keys() == expected.keys() and expected
        for name, buffer in expected.items():
            assert torch.equal(found["buffers"][name], buffer), name
