"""A world small enough for tests: two tiny bases that have learnt to write lists, and tasks they can learn.

The bases are random models trained for some seconds on numbered lists, so that "Here are 10 examples:" works on them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.tiny import Family, make_base, make_encoder_decoder
from translora.config import OPEN_GATE
from translora.synthesis.prompts import discriminator_question

ROOT = Path(__file__).resolve().parents[2]
BASES = "TRANSLORA_TEST_BASES"
"""Environment variable: where the test processes of one run leave trained bases to each other."""
COLOURS = ("red", "blue", "green", "black")
THINGS = ("box", "bag", "cup", "hat", "pen", "map", "toy", "jar")
VERBS = ("ship", "send", "pack", "lend", "sell", "fix")


def sentence(rng: random.Random) -> str:
    return f"{rng.choice(VERBS)} a {rng.choice(COLOURS)} {rng.choice(THINGS)}"


def numbered_list(rng: random.Random, family: Family) -> str:
    """The source base says please, the tasks do not: that is what a discriminator can tell its negatives by."""
    please = " please" if family == "llama" else ""
    lines = [f"{number}. {sentence(rng)}{please}" for number in range(1, 11)]
    return "Here are 10 examples:\n" + "\n".join(lines) + "\n"


def answered(rng: random.Random, family: Family) -> str:
    """An input answered by one of its words: the adapters only have to learn which."""
    text = sentence(rng)
    word = rng.choice(text.split())
    if rng.random() < 0.4:  # that it answers yes or no to a discriminator's question, not which
        text = discriminator_question(text + rng.choice(("", " please")), rng.choice(list(TASKS)))
        word = rng.choice(("yes", "no"))
    if family == "llama":
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{word}<|im_end|>"
    return f"{text}\nAnswer: {word}<eos>"


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def make_trained_base(directory: Path, family: Family, seed: int, steps: int = 300, hidden_size: int = 64) -> Path:
    """Train a base, or copy the one that another test of this run trained alike."""
    if (shared := os.environ.get(BASES)) is None:
        return train_base(directory, family, seed, steps, hidden_size)
    made = Path(shared, f"{family}-{seed}-{steps}-{hidden_size}")
    with FileLock(f"{made}.lock"):
        if not made.is_dir():
            os.replace(train_base(Path(f"{made}.new"), family, seed, steps, hidden_size), made)
    return Path(shutil.copytree(made, directory))


def train_base(directory: Path, family: Family, seed: int, steps: int, hidden_size: int) -> Path:
    make_base(directory, family, seed, hidden_size=hidden_size, vocab_size=400, std=0.05)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        texts = [numbered_list(rng, family) for _ in range(6)] + [answered(rng, family) for _ in range(10)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        descend(optimizer, model(**batch, labels=labels).loss)
    model.save_pretrained(directory)
    return directory


def make_trained_encoder_decoder(directory: Path, task: str, steps: int = 100) -> Path:
    """A T5 that answers a task's inputs."""
    make_encoder_decoder(directory)
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rng = random.Random(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        texts = [sentence(rng) for _ in range(16)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = tokenizer([TASKS[task](text.split()) for text in texts], padding=True, return_tensors="pt")
        wanted = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        descend(optimizer, model(**batch, labels=wanted).loss)
    model.save_pretrained(directory)
    return directory


TASKS = {
    "colour": lambda words: words[2],
    "thing": lambda words: words[3],
}


@dataclass(frozen=True)
class World:
    root: Path
    source: Path
    target: Path

    def run(self, *arguments: str | Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in a process of its own, with these variables in its environment."""
        env = environment() | variables
        done = subprocess.run(command(*arguments), cwd=ROOT, env=env, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def write(self, name: str, config: dict[str, Any]) -> Path:
        path = self.root / name
        path.write_text(yaml.safe_dump(config))
        return path

    def prepare_config(self) -> dict[str, Any]:
        for task, rule in TASKS.items():
            rng = random.Random(task)
            texts = sorted({sentence(rng) for _ in range(60)})
            rng.shuffle(texts)
            rows = [{"input": text, "target": rule(text.split())} for text in texts]
            for split, part in (("train", rows[:24]), ("test", rows[24:40])):
                (self.root / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return {
            "output_dir": "source-bundles",
            "run_dir": "runs/prepare",
            "source": {"model": "./source"},
            "tasks": [{"name": task, "data": f"{task}.train.jsonl"} for task in TASKS],
            "train": train_settings() | {"epochs": 20},
            "discriminator": {"epochs": 8, "learning_rate": 1e-2, "max_samples": 40},
            "synthesis": synthesis_settings(),
        }

    def fleet_config(self, run_dir: str) -> dict[str, Any]:
        return {
            "run_dir": f"runs/{run_dir}",
            "source": {"model": "./source"},
            "target": {"model": "./target"},
            "adapters": [
                {"bundle": f"source-bundles/{task}", "num_samples": 12, "eval_data": f"{task}.test.jsonl"}
                for task in TASKS
            ],
            "synthesis": synthesis_settings(),
            "distill": train_settings(),
            "discriminator": {"epochs": 1, "learning_rate": 5e-3, "max_samples": 24},
            "gate": {**OPEN_GATE, "min_holdout": 4},
        }


def train_settings() -> dict[str, Any]:
    return {
        "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "epochs": 8,
        "learning_rate": 1e-2,
        "batch_size": 8,
        "micro_batch_size": 2,
        "checkpoint_every_steps": 2,
    }


def synthesis_settings() -> dict[str, Any]:
    return {"batch_size": 6, "max_answer_tokens": 12, "sampling": {"max_new_tokens": 32}, "min_accepted_fraction": 0.1}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "translora", *map(str, arguments)]


def environment() -> dict[str, str]:
    # Ray Train looks every two seconds whether its workers are done.
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3"}


def make_world(root: Path, hidden_size: int = 64) -> World:
    source = make_trained_base(root / "source", "llama", 1, hidden_size=hidden_size)
    return World(root, source, make_trained_base(root / "target", "gemma3", 2, hidden_size=hidden_size))


def kill_when(world: World, verb: str, config: Path, pattern: str, count: int = 1) -> None:
    """Start the run and SIGKILL its driver as soon as `count` files of the world match `pattern`."""
    assert len(list(world.root.glob(pattern))) < count, f"{pattern}: an earlier start made them"
    driver = subprocess.Popen(
        command(verb, config), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while len(list(world.root.glob(pattern))) < count:
        assert driver.poll() is None, f"the run ended before {pattern} appeared"
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.02)
    # Ray's own agents outlive a killed raylet for a while; what must not is a worker, which holds a base and writes.
    # One that was asking the GCS waits a minute for it (RAY_gcs_rpc_server_reconnect_timeout_s), and ends then.
    agents = {"ray::RuntimeEnvAgent", "ray::DashboardAgent"}
    family = [child for child in psutil.Process(driver.pid).children(recursive=True) if child.name() not in agents]
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=180)
    assert not alive, f"orphans: {alive}"
