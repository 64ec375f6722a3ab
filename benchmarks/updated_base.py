"""A later version of a base, to migrate to: `python -m benchmarks.updated_base --data train.jsonl --out DIRECTORY`.

Vendors often retire a base for one of the same shape and vocabulary that was trained further. Here a LoRA on all linear
modules is trained on GSM8K and merged into SmolLM2-135M-Instruct. A finished directory is not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.bases import base_path, default_cache
from translora.bundle import inspect_base
from translora.config import BaseModelConfig, ResourceConfig, TrainConfig
from translora.distill.job import make_job, refuse_failures
from translora.distill.launch import train_adapters
from translora.run.cluster import start_ray
from translora.run.files import read_jsonl, replace_directory


def train_update(base: Path, rows: list[dict[str, str]], config: TrainConfig, work: Path) -> Path:
    """Train the LoRA; a killed training goes on."""
    answers = [{"input": row["question"], "answer": row["answer"]} for row in rows]
    job = make_job(
        "update", "lora", answers, config, output=work / "lora", work_dir=work / "train", root_seed=0, with_end=True
    )
    start_ray()
    resources, info = ResourceConfig(), inspect_base(str(base))
    train_adapters(BaseModelConfig(model=str(base)), info.name, [job], config, resources, work, label="update")
    refuse_failures([job])
    return work / "lora"


def merge_into(base: Path, adapter: Path, output: Path) -> None:
    """Write the base with the adapter merged in, and the base's tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with replace_directory(output) as directory:
        merged.save_pretrained(directory)
        AutoTokenizer.from_pretrained(base).save_pretrained(directory)


def main() -> None:
    """Train, merge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl: question and answer")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new base")
    parser.add_argument("--rows", type=int, default=400, help="rows to train on (default: %(default)s)")
    arguments = parser.parse_args()
    if (arguments.out / "config.json").is_file():
        return
    base = base_path("smollm2", default_cache())
    config = TrainConfig.model_validate(
        {"lora": {"rank": 16, "alpha": 32, "target_modules": "all-linear"}, "epochs": 1, "learning_rate": 5e-4}
    )
    rows = read_jsonl(arguments.data, required=("question", "answer"))[: arguments.rows]
    work = arguments.out.with_name(f"{arguments.out.name}-training")
    merge_into(base, train_update(base, rows, config, work), arguments.out)


if __name__ == "__main__":
    main()
