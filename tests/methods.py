"""Adapters of PEFT's other methods for tests, and one's training as a reader would write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from translora.config import TrainConfig
from translora.distill.data import Sample, batch_indices, num_steps
from translora.lora.method_settings import parse_method

LINEARS = ["q_proj", "v_proj"]
TEXT = "Answer the following question correctly:"
METHODS: dict[str, dict[str, Any]] = {
    "dora": {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 8, "target_modules": LINEARS},
    "lora-bias": {"peft_type": "LORA", "lora_bias": True, "r": 2, "target_modules": LINEARS},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5},
    "prompt-text": {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 6,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": TEXT,
    },
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
    "ia3": {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "loha": {"peft_type": "LOHA", "r": 2, "target_modules": LINEARS},
    "lokr": {"peft_type": "LOKR", "r": 2, "target_modules": LINEARS},
    "vera": {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 8, "target_modules": LINEARS},
    "hra": {"peft_type": "HRA", "r": 4, "target_modules": LINEARS},
    "miss": {"peft_type": "MISS", "r": 4, "target_modules": LINEARS},
    "fourierft": {"peft_type": "FOURIERFT", "n_frequency": 20, "target_modules": LINEARS},
    "randlora": {"peft_type": "RANDLORA", "r": 4, "target_modules": LINEARS},
    "c3a": {"peft_type": "C3A", "block_size": 8, "target_modules": LINEARS},
}


def load(base: Path) -> Any:
    """The base in float32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def make_method(directory: Path, base: Path, settings: dict[str, Any], seed: int = 0, scale: float = 0.2) -> Path:
    """Write an adapter through PEFT, its weights moved by random numbers of std `scale`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(load(base), parse_method(settings, "peft", base))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(directory)
    return directory


def answer_logits(model: Any, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> torch.Tensor:
    """Logits [A, V] that predict the answer; virtual tokens have logits too, before all others."""
    logits_TV = model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0]
    return logits_TV[-len(answer_ids) - 1 : -1]


def plain_losses(
    base: Path, samples: Sequence[Sample], settings: dict[str, Any], config: TrainConfig, seed: int, epochs: float
) -> list[float]:
    """Losses of one of PEFT's methods, begun as PEFT begins it and trained by `train_plainly`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(load(base), parse_method(settings, "peft", base))
    return train_plainly(model.eval(), samples, config, seed, epochs)


def train_plainly(model: Any, samples: Sequence[Sample], config: TrainConfig, seed: int, epochs: float) -> list[float]:
    """Train what PEFT left trainable with torch's AdamW, one sample at a time, no padding; returns the losses [S]."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    total = num_steps(len(samples), epochs, config.batch_size)
    losses = []
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / total)
        batch = [samples[index] for index in batch_indices(len(samples), config.batch_size, step, seed)]
        loss = torch.zeros(())
        for sample in batch:
            logits = answer_logits(model, sample.prompt_ids, sample.answer_ids)
            loss = loss + F.cross_entropy(logits, torch.tensor(sample.answer_ids), reduction="sum")
        loss = loss / sum(len(sample.answer_ids) for sample in batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
