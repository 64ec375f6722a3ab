"""A fleet of many tiny adapters, and what a run of it did: results, files, the time it spent on models."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.integration.world import make_trained_base, sentence
from tests.tiny import make_adapter
from translora.bundle import inspect_base, write_bundle
from translora.config import OPEN_GATE
from translora.run.files import read_object, sha256_path
from translora.run.state import load_states

NUM_SAMPLES, NUM_HELDOUT, BATCH_SIZE, EPOCHS = 6, 2, 4, 10
FINISHED = (
    "rounds/*/*.parquet",
    "gate/*/*.parquet",
    "adapters/*/student/adapter_model.safetensors",
    "adapters/*/discriminator/adapter_model.safetensors",
)
"""Files that no rerun has a reason to write again."""


def make_fleet(root: Path, num_adapters: int) -> Path:
    """Two tiny bases that can write lists, and bundles whose adapters differ by their random weights."""
    source = make_trained_base(root / "source", "llama", 1)
    make_trained_base(root / "target", "gemma3", 2)
    pattern = make_adapter(root / "pattern", source, scale=0.02)
    weights = load_file(pattern / "adapter_model.safetensors")
    base = inspect_base(str(source))
    for index in range(num_adapters):
        generator, rng = torch.Generator().manual_seed(index), random.Random(index)
        parts = []
        for part in ("adapter", "discriminator"):
            directory = root / "parts" / part
            directory.mkdir(parents=True, exist_ok=True)
            own = {name: 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
            save_file(own, directory / "adapter_model.safetensors", {"format": "pt"})
            (directory / "adapter_config.json").write_bytes((pattern / "adapter_config.json").read_bytes())
            parts.append(directory)
        write_bundle(
            root / "bundles" / f"client-{index:03d}",
            adapter_dir=parts[0],
            discriminator_dir=parts[1],
            seeds=sorted({sentence(rng) for _ in range(5)}),
            task_name="colour",
            base=base,
            num_samples=NUM_SAMPLES,
            prompt_template="chat",
            provenance={"made_by": "tests.chaos", "seed": index},
        )
    return root


def write_config(root: Path, run_dir: str) -> Path:
    """The fleet file of a run below `root`."""
    lora = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    config: dict[str, Any] = {
        "run_dir": run_dir,
        "source": {"model": "./source"},
        "target": {"model": "./target"},
        "adapters": ["bundles/*"],
        "synthesis": {
            "batch_size": 24,
            "max_answer_tokens": 12,
            "sampling": {"max_new_tokens": 32},
            "min_accepted_fraction": 0.1,
            "max_rounds": 3,
        },
        "distill": {
            "lora": lora,
            "epochs": EPOCHS,
            "learning_rate": 1e-2,
            "batch_size": BATCH_SIZE,
            "micro_batch_size": BATCH_SIZE,
            "checkpoint_every_steps": 5,
            "gang_size": 16,
            "max_failures": 5,
        },
        "discriminator": {"epochs": 1, "learning_rate": 5e-3, "max_samples": 12},
        "gate": {**OPEN_GATE, "min_holdout": NUM_HELDOUT, "retries": 0},
    }
    path = root / f"{Path(run_dir).name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def results(run_dir: Path) -> dict[str, Any]:
    """What must not depend on kills, by adapter: its state but for wall times, and the hash of its bundle."""
    return {
        state.name: {
            "state": state.model_dump(exclude={"seconds"}),
            "bundle": sha256_path(run_dir / "bundles" / state.name) if state.output else "",
        }
        for state in load_states(run_dir)
    }


def finished_files(run_dir: Path) -> dict[str, int]:
    """Time of writing, in ns, of each finished file."""
    found = {}
    for pattern in FINISHED:
        for path in run_dir.glob(pattern):
            try:
                found[str(path.relative_to(run_dir))] = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
    return found


def step_rows(run_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every line of every training's log, with the job's name."""
    rows = []
    for path in run_dir.glob("adapters/*/train/*/train.jsonl"):
        job = "/".join((path.parts[-4], path.parts[-2]))
        for line in path.read_text(errors="replace").splitlines():
            try:
                rows.append((job, json.loads(line)))
            except ValueError:
                continue  # a worker was killed while it wrote
    return rows


@dataclass(frozen=True)
class Progress:
    """How far a run is: blocks of rows, steps, published bundles."""

    blocks: int
    steps: int
    bundles: int

    def share_of(self, whole: Progress) -> float:
        """0 to 1, each phase with a fixed weight."""
        parts = ((0.5, self.blocks, whole.blocks), (0.35, self.steps, whole.steps), (0.15, self.bundles, whole.bundles))
        return sum(weight * min(1.0, count / max(1, total)) for weight, count, total in parts)


def progress(run_dir: Path) -> Progress:
    """Counts of what lies in the run directory."""
    blocks = sum(1 for pattern in FINISHED[:2] for _ in run_dir.glob(pattern))
    steps = 0
    for path in run_dir.glob("adapters/*/train/*/train.jsonl"):
        try:
            steps += path.read_bytes().count(b"\n")
        except FileNotFoundError:
            continue
    return Progress(blocks, steps, sum(1 for _ in run_dir.glob("bundles/client-*")))


def model_seconds(run_dir: Path, num_actors: int, num_workers: int) -> tuple[float, float]:
    """Seconds that actors and training workers spent on models, and those that actors spent on loading them."""
    model = load = 0.0
    for pattern in FINISHED[:2]:
        for path in run_dir.glob(pattern):
            seconds = json.loads((pq.read_schema(path).metadata or {}).get(b"seconds", b"{}"))
            model += seconds.get("model", 0.0) / num_actors
            load += seconds.get("load", 0.0) / num_actors
    model += sum(row.get("gang_seconds", 0.0) for _, row in step_rows(run_dir)) / num_workers
    return model, load


def leftovers(run_dir: Path) -> list[str]:
    """Temporary files, and what only a running driver has."""
    names = [*run_dir.rglob(".tmp-*"), *run_dir.glob("cohort-*.json"), *run_dir.glob("gangs/*"), run_dir / "lock"]
    return [str(path.relative_to(run_dir)) for path in names if path.exists()] + (
        ["progress.json"] if read_object(run_dir / "progress.json") else []
    )
