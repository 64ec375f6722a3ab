"""Which families of bases work, and how exactly: tiny random models of each, through the code of a run.

    python -m benchmarks.families [FAMILY ...] [--vllm]

For each: the probabilities of two adapters' answers in one mixed batch against PEFT one adapter at a time, tokens that
are generated in a mixed batch against PEFT's `generate`, and the gradients of two students in one packed pass against
PEFT's own, all in float32. Encoder-decoders are sources, which are not trained. A family that is refused shows why.
With --vllm the first two are vLLM's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from benchmarks.whole import WholeBase
from tests.tiny import make_adapter, make_tokenizer
from translora.bundle.base import inspect_base
from translora.bundle.modules import linear_modules
from translora.config import BaseModelConfig
from translora.distill.data import Sample, pack
from translora.distill.zero3 import check_packing
from translora.engine.decode import Request
from translora.engine.encoder_decoder import EncoderDecoderEngine
from translora.engine.head import Head, cross_entropy
from translora.engine.protocol import Engine
from translora.engine.transformers import TransformersEngine
from translora.engine.vllm import VllmEngine
from translora.lora.peft_io import read_lora
from translora.lora.targets import resolve_targets
from translora.run.redact import first_line

QV, QKV, FUSED = ["q_proj", "v_proj"], ["qkv_proj"], ["query_key_value"]
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[dict[str, Any], Sequence[str] | str]] = {
    "llama": ({"tie_word_embeddings": False}, QV),
    "mistral": ({"sliding_window": 8}, QV),
    "qwen2": ({"tie_word_embeddings": True}, QV),
    "qwen3": ({"head_dim": 16}, "all-linear"),
    "gemma": ({"head_dim": 16}, QV),
    "gemma2": ({"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}, QV),
    "gemma3_text": ({"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}, QV),
    "phi3": ({"pad_token_id": 0}, QKV),
    "gpt_neox": ({}, FUSED),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}, FUSED),
    "olmo2": ({}, QV),
    "granite": ({"logits_scaling": 2.0, "residual_multiplier": 0.5}, QV),
    "cohere": ({"logit_scale": 0.5}, QV),
    "starcoder2": ({}, QV),
    "smollm3": ({"pad_token_id": 0}, QV),
    "glm": ({"pad_token_id": 0, "head_dim": 16}, QV),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, QV),
    "qwen3_moe": ({**MOE, "head_dim": 16}, QV),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, QV),
    "gpt2": ({}, ["c_attn"]),
    "mamba": ({}, ["in_proj"]),
    "t5": (T5, ["q", "v"]),
    "mt5": (T5, "all-linear"),
    "umt5": (T5, ["q", "v"]),
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PROMPTS = (
    "Please send my order to the new address.",
    "When does the shop open?",
    "The parcel is late. I was charged twice this month.",
    "Can I return the shoes?",
)
OWNERS = ("a", "b", "a", "b")
ANSWER = "order yes no shop"


FOR_VLLM = {"hidden_size": 128, "head_dim": 32}
"""Its kernels want heads of 32 at least."""


@dataclass(frozen=True)
class Found:
    """Greatest differences from PEFT, in float32."""

    likelihood: float
    """Of the log-probability of an answer's token."""
    tokens: str
    """Rows whose generated tokens are PEFT's."""
    gradient: float | None
    """Of a factor's gradient, relative to its greatest element; None for a source only."""


def make_config(family: str, vocab_size: int, on_vllm: bool, **ids: int | None) -> PreTrainedConfig:
    """A tiny config of a family."""
    changes, _ = FAMILIES[family]
    changes = {**SMALL, "vocab_size": vocab_size, "initializer_range": 0.2, **ids, **changes}
    if on_vllm:
        changes |= {name: value for name, value in FOR_VLLM.items() if name in changes}
    return AutoConfig.for_model(family, **changes)


def load_engine(path: Path, adapters: dict[str, Path], on_vllm: bool) -> Engine:
    """The base and its adapters, resident."""
    vllm = {"enforce_eager": True, "max_model_len": 128, "gpu_memory_utilization": 0.3} if on_vllm else None
    base = BaseModelConfig(model=str(path), dtype="float32", vllm=vllm)
    engine: Engine
    if vllm is not None:
        engine = VllmEngine(base)
    else:
        with_encoder = inspect_base(str(path)).is_encoder_decoder
        engine = EncoderDecoderEngine(base, {}) if with_encoder else TransformersEngine(base, {})
    try:
        engine.use_adapters(adapters)
    except Exception as error:
        engine.close()
        raise ValueError(first_line(error)) from error
    return engine


def check(family: str, root: Path, on_vllm: bool = False) -> Found:
    """Run everything of one family.

    Raises:
        ValueError: it is refused.
    """
    _, targets = FAMILIES[family]
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = make_config(family, len(tokenizer), on_vllm, **ids)
    torch.manual_seed(0)
    path = root / "base"
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto_class.from_config(config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    names = resolve_targets(linear_modules(inspect_base(str(path))), targets, family, "target_modules")
    for index, name in enumerate(("a", "b")):
        make_adapter(root / name, path, index + 1, 4 - index, target_modules=names)
    engine = load_engine(path, {name: root / name for name in ("a", "b")}, on_vllm)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    samples = [(prompt, answer) for prompt in prompts]
    likelihoods = torch.tensor(engine.log_likelihood(samples, OWNERS))
    written = engine.generate([Request(text, owner, 8) for text, owner in zip(PROMPTS, OWNERS, strict=True)])
    engine.close()
    own_likelihoods, same, gradients = [], 0, {}
    for name in ("a", "b"):
        model = PeftModel.from_pretrained(
            auto_class.from_pretrained(path, dtype=torch.float32), root / name, is_trainable=True
        ).eval()
        total = torch.zeros(())
        for index, owner in enumerate(OWNERS):
            if owner != name:
                continue
            logits = answer_logits(model, prompts[index], answer)
            own = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            own_likelihoods.append((index, own.detach()))
            total = total + F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            with torch.no_grad():
                done = model.generate(input_ids=torch.tensor([prompts[index]]), max_new_tokens=8, do_sample=False)
            start = 0 if config.is_encoder_decoder else len(prompts[index])
            text = tokenizer.decode(done[0, start:], skip_special_tokens=True)
            same += text == written[index].text
        total.backward()
        gradients[name] = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    expected = torch.stack([own for _, own in sorted(own_likelihoods, key=lambda pair: pair[0])])
    return Found(
        likelihood=float((likelihoods - expected).abs().max()),
        tokens=f"{same}/{len(OWNERS)}",
        gradient=None
        if config.is_encoder_decoder
        else gradient_difference(path, root, targets, prompts, answer, gradients),
    )


def answer_logits(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits [answer's length, V] at the answer's tokens."""
    if model.config.is_encoder_decoder:
        found: torch.Tensor = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0]
        return found
    whole: torch.Tensor = model(torch.tensor([prompt + answer])).logits[0]
    return whole[len(prompt) - 1 : -1]


def gradient_difference(
    path: Path,
    root: Path,
    targets: Sequence[str] | str,
    prompts: list[list[int]],
    answer: list[int],
    expected: dict[str, dict[str, torch.Tensor | None]],
) -> float:
    """How far the gradients of two students in one packed pass are from PEFT's, at most."""
    base = WholeBase(path, torch.float32, targets)
    check_packing(base, base.model.config.model_type)
    found = {}
    for slot, name in enumerate(("a", "b")):
        lora = read_lora(root / name)
        found[name] = {
            module: (torch.zeros_like(lora_A), torch.zeros_like(lora_B))
            for module, (lora_A, lora_B) in lora.modules.items()
        }
        base.bank.open_slot(slot, lora.modules, 8.0 / lora.max_rank, found[name])
    shards = [
        (slot, [Sample(p, answer) for p, owner in zip(prompts, OWNERS, strict=True) if owner == name], 1.0)
        for slot, name in enumerate(("a", "b"))
    ]
    batch = pack(shards, torch.device("cpu"))
    base.bank.route_segments(batch.segments)
    hidden_TD = base(batch.inputs)
    losses_L = cross_entropy(hidden_TD[batch.positions_L], Head.of(base.model), batch.labels_L, batch.weights_L)
    base.backward(losses_L.sum())
    worst = 0.0
    for name in ("a", "b"):
        for module, pair in found[name].items():
            for factor, own in zip(("A", "B"), pair, strict=True):
                peft = expected[name][f"base_model.model.{module}.lora_{factor}.default.weight"]
                assert peft is not None
                worst = max(worst, float((own - peft).abs().max() / peft.abs().max().clamp(min=1e-6)))
    return worst


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--vllm", action="store_true", help="log-probabilities and texts are vLLM's")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - FAMILIES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    what = "vLLM" if arguments.vllm else "bank, generation"
    table = Table(title=f"{what} and gang against PEFT, tiny random models in float32")
    for column in ("family", "adapted", "log-probability", "generated", "gradient"):
        table.add_column(column, justify="left" if column in ("family", "adapted") else "right")
    for family in arguments.families or FAMILIES:
        targets = FAMILIES[family][1]
        adapted = targets if isinstance(targets, str) else ", ".join(targets)
        with tempfile.TemporaryDirectory() as name:
            try:
                found = check(family, Path(name), arguments.vllm)
            except ValueError as error:
                table.add_row(family, adapted, f"refused: {str(error).replace(name, '')[:90]}", "", "")
                continue
        gradient = "source only" if found.gradient is None else f"{found.gradient:.0e}"
        table.add_row(family, adapted, f"{found.likelihood:.0e}", found.tokens, gradient)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
