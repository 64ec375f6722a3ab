"""How well the planner knows the memory of a training pass: what it says against what a process really took.

    python -m benchmarks.memory

Every shape is a process of its own, because the most that a process ever held (VmHWM) is read. Random weights, on the
CPU, the pass of translora.distill.train.run_pass without DeepSpeed; the planner's number is made without weights.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from translora.config import TrainConfig
from translora.distill.data import Sample, pack
from translora.distill.frozen import keep_no_inputs, recompute
from translora.distill.pass_memory import PassSize, open_zero_students, pass_bytes
from translora.engine.attention import PACKED
from translora.engine.head import Head, cross_entropy
from translora.engine.loading import gains_by_bfloat16
from translora.lora.bank import new_bank

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32000}
SHAPES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama, grouped queries": (LlamaConfig(**SMALL, intermediate_size=1408, num_key_value_heads=2), {}),
    "llama, recomputed": (
        LlamaConfig(**SMALL, intermediate_size=1408, num_key_value_heads=2),
        {"gradient_checkpointing": True},
    ),
    "llama, float32": (LlamaConfig(**SMALL, intermediate_size=1408), {"dtype": "float32"}),
    "qwen2, all linear modules": (
        Qwen2Config(**SMALL, intermediate_size=1408, num_key_value_heads=2),
        {"lora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}},
    ),
    "gemma 3, tied head of 128k": (
        Gemma3TextConfig(
            **(SMALL | {"vocab_size": 128000}), intermediate_size=2048, num_key_value_heads=1, head_dim=64
        ),
        {},
    ),
    "mistral, rank 64": (
        MistralConfig(**SMALL, intermediate_size=1792, num_key_value_heads=4),
        {"lora": {"rank": 64, "alpha": 64}},
    ),
    "qwen3, mixture of experts": (
        Qwen3MoeConfig(
            **SMALL,
            intermediate_size=1024,
            moe_intermediate_size=256,
            num_experts=8,
            num_experts_per_tok=2,
            num_key_value_heads=2,
        ),
        {},
    ),
}
STUDENTS, SAMPLES, TOKENS, ANSWER = 2, 6, 256, 64
DTYPE = "bfloat16" if gains_by_bfloat16() else "float32"
"""Where a CPU has to imitate bfloat16, a pass of these shapes takes ten minutes."""


def planned(name: str) -> int:
    """The planner's bytes."""
    config, changes = SHAPES[name]
    train = TrainConfig.model_validate({"dtype": DTYPE, **changes})
    dtype = getattr(torch, train.dtype)
    return pass_bytes(config, dtype, train, PassSize(STUDENTS, SAMPLES, TOKENS, ANSWER)).peak


def status_bytes(key: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[key].split()[0]) * 1024


def measured(name: str) -> int:
    """Bytes that this process took at most during a pass, beyond what it held before."""
    config, changes = SHAPES[name]
    train = TrainConfig.model_validate({"dtype": DTYPE, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, train.dtype), attn_implementation=PACKED)
    model.eval()
    bank = new_bank(model, train.lora.target_modules)
    keep_no_inputs()
    if train.gradient_checkpointing:
        recompute(model)
    open_zero_students(bank, train, STUDENTS, model.dtype)
    sample = Sample(list(range(TOKENS + 1 - ANSWER)), list(range(ANSWER)))

    def run(num_samples: int) -> None:
        batch = pack([(slot, [sample] * num_samples, 1.0) for slot in range(STUDENTS)], CPU)
        bank.route_segments(batch.segments)
        hidden_TD = model.base_model(**batch.inputs, use_cache=False).last_hidden_state[0]
        losses_L = cross_entropy(hidden_TD[batch.positions_L], Head.of(model), batch.labels_L, batch.weights_L)
        losses_L.sum().backward()

    run(1)  # what libraries set aside at their first use is not the pass's
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    run(SAMPLES)
    return status_bytes("VmHWM") - before


def compare(name: str) -> tuple[int, int]:
    """The planner's bytes and the measured ones."""
    # Memory that is freed goes back at once, or the most that was held is not what was needed.
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory", name]
    output = subprocess.run(command, env=own, check=True, capture_output=True, text=True).stdout
    return planned(name), int(json.loads(output.splitlines()[-1]))


def main() -> None:
    """Print the table, or measure the shape that is named."""
    if len(sys.argv) > 1:
        sys.stdout.write(f"{json.dumps(measured(sys.argv[1]))}\n")
        return
    table = Table(title=f"a pass of {STUDENTS} students with {SAMPLES} samples of {TOKENS} tokens, {DTYPE}, MB")
    for column in ("shape", "planned", "measured", "planned / measured"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for name in SHAPES:
        if DTYPE == "float32" and "experts" in name:  # torch (2.13) multiplies fake experts in bfloat16 alone
            table.add_row(name, "", "", "not in float32")
            continue
        plan, real = compare(name)
        table.add_row(name, f"{plan / 1e6:.0f}", f"{real / 1e6:.0f}", f"{plan / real:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
