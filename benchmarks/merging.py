"""Two skills merged by every method, on a task that needs both: `python -m benchmarks.merging --work runs/merging`.

routing  the bundle examples/bundles/ticket-routing: a customer's message -> one of four teams
tag      trained here: "Answer as a tag: QUESTION" -> "<<ANSWER>>", on questions about facts
both     "Answer as a tag: Route this ticket: ..." -> "<<TEAM>>"; no adapter has seen one of these

Each method is one `translora merge` in a process of its own, whose CPU time is told, imports and loading included.
Everything is kept in --work: a rerun goes on where the last one stopped. `--scaling` measures IterIS against the
number of samples and adapters instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.facts import facts
from examples.bases import base_path, default_cache
from examples.tasks import NUM_TEST, NUM_TRAIN, generate, split
from tests.tiny import make_adapter
from translora.bundle import read_bundle
from translora.config import BaseModelConfig, SamplingConfig
from translora.distill.data import batch_indices, encode_samples, num_steps
from translora.engine.decode import Request
from translora.engine.prompts import prompt_format, raw_prompt
from translora.engine.transformers import TransformersEngine
from translora.evaluate.statistics import Estimate, Resample
from translora.gate.agreement import is_equal
from translora.merge.config import METHODS, CatSettings, IterisSettings
from translora.merge.data import pad_batch
from translora.run.files import digest, replace_directory, sha256_file, sha256_path, write_json, write_jsonl
from translora.synthesis.prompts import generation_row

TAG = "Answer as a tag: "
NUM_TICKETS = 394
"""All that the task's word lists give."""
ROUTING = Path(__file__).parent.parent / "examples/bundles/ticket-routing"
WITH_DATA = ("cat", "iteris", "regmean")
SKILLS = ("routing", "tag")
VARIANTS = {
    "cat softmax": ("cat", ["cat.coefficients=softmax"]),
    "static_cat 1 + 1": ("static_cat", ["weights=[1, 1]"]),
}
"""Methods and settings of arms that are no method's default."""
ARMS = [f"only {skill}" for skill in SKILLS] + [
    f"{arm}, {source}" if source else arm
    for arm in (*METHODS, *VARIANTS)
    for source in (("real", "synthetic") if arm.split()[0] in WITH_DATA else ("",))
]
Rows = list[dict[str, str]]


def place(work: Path, arm: str) -> Path:
    """Where an arm's adapter lies; its figures are in the .json of the same name."""
    return work / arm.replace(", ", "-").replace(" + ", "+").replace(" ", "-")


def tests(size: int) -> dict[str, Rows]:
    """The three test sets; no ticket is one that the bundle was trained on."""
    train, _ = split("ticket-routing", NUM_TRAIN, NUM_TEST, seed=0)
    known = {row["input"] for row in train}
    tickets = [row for row in generate("ticket-routing", NUM_TICKETS, seed=0) if row["input"] not in known][:size]
    if len(tickets) < size:
        raise SystemExit(f"--tests {size}: there are {len(tickets)} tickets; ask for fewer")
    return {
        "routing": tickets,
        "tag": facts("test")[:size],
        "both": [{"input": TAG + row["input"], "target": f"<<{row['target']}>>"} for row in tickets],
    }


def train_tag(base: Path, out: Path, epochs: float) -> None:
    """The second skill: a LoRA like the bundle's, by a plain loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    prompts = prompt_format(AutoTokenizer.from_pretrained(base))
    rows = [{"input": row["input"], "answer": row["target"]} for row in facts("train")]
    samples = encode_samples(rows, prompts, 160, "tag")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    steps = num_steps(len(samples), epochs, 8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        batch = pad_batch([samples[index] for index in batch_indices(len(samples), 8, step, 0)], 0, with_labels=True)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        print(f"tag: step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    with replace_directory(out) as directory:
        model.save_pretrained(directory)


def complete(engine: TransformersEngine, slot: str | None, texts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers of one adapter."""
    prompts = prompt_format(engine.tokenizer)
    found = []
    for start in range(0, len(texts), 32):
        requests = [Request(prompts.render(text), slot, max_new_tokens) for text in texts[start : start + 32]]
        found += [one.text.strip() for one in engine.generate(requests)]
    return found


def score(engine: TransformersEngine, rows: Rows) -> list[bool]:
    """Which rows the adapter "it" answers right."""
    answers = complete(engine, "it", [row["input"] for row in rows], 16)
    return [is_equal(answer, row["target"]) for answer, row in zip(answers, rows, strict=True)]


def accuracy(correct: Sequence[bool], name: str) -> Estimate:
    """With a bootstrap interval over the rows."""
    return Resample(1, len(correct), name, over_seeds=False).estimate(np.array([correct], dtype=float))


def synthesise(base: Path, adapters: dict[str, Path], seeds: dict[str, list[str]], num: int, work: Path) -> None:
    """Inputs that the base invents from five seeds, answered by each skill's own adapter: no real data at all."""
    engine = TransformersEngine(BaseModelConfig(model=str(base)), adapters)
    for skill in SKILLS:
        texts: list[str] = []
        for start in range(0, 8 * num, 24):
            rows = [generation_row(skill, seeds[skill], index, 0, index % 5) for index in range(start, start + 24)]
            requests = [
                Request(raw_prompt(engine.tokenizer, row["prompt"]), None, 48, row["stop"], row["seed"]) for row in rows
            ]
            for one in engine.generate(requests, SamplingConfig(max_new_tokens=48)):
                text = one.text.strip()
                if one.finished and text and text not in texts and text not in seeds[skill]:
                    texts.append(text)
            if len(texts) >= num + num // 8:  # an answer may be empty
                break
        answers = complete(engine, skill, texts, 16)
        pairs = [{"input": text, "answer": answer} for text, answer in zip(texts, answers, strict=True) if answer]
        if len(pairs) < num:
            raise SystemExit(f"{skill}: {len(pairs)} of {num} synthetic samples; ask for fewer --samples")
        write_jsonl(work / f"{skill}.synthetic.jsonl", pairs[:num])


def run_command(arguments: Sequence[str]) -> tuple[float, float]:
    """CPU seconds and peak gigabytes of a `translora` command."""
    child, peak, ended = (
        subprocess.Popen([sys.executable, "-m", "translora", *arguments], stdout=subprocess.DEVNULL),
        0.0,
        0,
    )
    while not ended:
        with contextlib.suppress(
            OSError
        ):  # the peak that wait4 tells counts this process, too, which the child began as
            (found,) = re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{child.pid}/status").read_text()) or ["0"]
            peak = max(peak, int(found) * 1024 / 1e9)
        time.sleep(0.05)
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"translora {' '.join(arguments)}: exit code {child.returncode}")
    return usage.ru_utime + usage.ru_stime, peak


def merge(arm: str, base: Path, adapters: dict[str, Path], work: Path, settings: Sequence[str]) -> tuple[float, float]:
    """Merge by one arm; the result lies at work/ARM."""
    name, _, source = arm.partition(", ")
    method, own = VARIANTS.get(name, (name, []))
    arguments = ["merge", method, "--base", str(base), "--out", str(place(work, arm))]
    arguments += ["--adapters", *map(str, adapters.values())]
    if source:
        arguments += ["--data", *(str(work / f"{skill}.{source}.jsonl") for skill in adapters)]
    chosen = [*settings, *own]
    return run_command([*arguments, *(["--set", *chosen] if chosen else [])])


def once(path: Path, work: Callable[[], object]) -> None:
    """Do the work unless its result is there."""
    if not path.exists():
        print(f"{path.name} ...", flush=True)
        work()


def prepare(arguments: argparse.Namespace, base: Path) -> dict[str, Path]:
    """Skills and their data, real and synthetic; other sizes need another --work.

    Raises:
        SystemExit: the directory is of other sizes.
    """
    work: Path = arguments.work
    sizes = {"samples": arguments.samples, "epochs": arguments.epochs}
    if (work / "sizes.json").exists() and json.loads((work / "sizes.json").read_text()) != sizes:
        raise SystemExit(f"{work} was made with other --samples or --epochs; name another --work")
    write_json(work / "sizes.json", sizes)
    adapters = {"routing": ROUTING, "tag": work / "tag"}
    once(adapters["tag"], lambda: train_tag(base, adapters["tag"], arguments.epochs))
    train = {"routing": split("ticket-routing", NUM_TRAIN, NUM_TEST, seed=0)[0], "tag": facts("train")}
    for skill, rows in train.items():
        chosen = random.Random(1).sample(rows, arguments.samples)
        write_jsonl(work / f"{skill}.real.jsonl", chosen)
    seeds = {"routing": read_bundle(ROUTING).seeds, "tag": [row["input"] for row in facts("train")[:5]]}
    once(
        work / "tag.synthetic.jsonl",
        lambda: synthesise(
            base, adapters, {name: list(found) for name, found in seeds.items()}, arguments.samples, work
        ),
    )
    return adapters


def measure(arguments: argparse.Namespace) -> None:
    """Merge and answer by every arm, then print the table."""
    base, work = base_path("smollm2", default_cache()), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    adapters = prepare(arguments, base)
    sets = tests(arguments.tests)
    files = [work / f"{skill}.{source}.jsonl" for skill in adapters for source in ("real", "synthetic")]
    made_from = digest(
        sets,
        [sha256_file(path) for path in files],
        [sha256_path(path) for path in adapters.values()],
        arguments.set,
        CatSettings().model_dump(),
        IterisSettings().model_dump(),
    )
    engine: TransformersEngine | None = None
    for arm in arguments.arms:
        record = place(work, arm).with_suffix(".json")
        if record.exists() and json.loads(record.read_text()).get("made_from") == made_from:
            continue
        print(f"{arm} ...", flush=True)
        single = arm.removeprefix("only ") if arm.startswith("only ") else None
        seconds, gigabytes = (0.0, 0.0) if single else merge(arm, base, adapters, work, arguments.set)
        engine = engine or TransformersEngine(BaseModelConfig(model=str(base)), {})
        engine.use_adapters({"it": adapters[single] if single else place(work, arm)})
        correct = {name: score(engine, rows) for name, rows in sets.items()}
        costs = {"seconds": seconds, "gigabytes": gigabytes}
        write_json(record, {"arm": arm, "made_from": made_from, **costs, "correct": correct})
    print_table(arguments)


def cell(estimate: Estimate, sign: str = "") -> str:
    """Percent with its interval."""
    return f"{100 * estimate.value:{sign}.0f} ({100 * estimate.low:{sign}.0f} to {100 * estimate.high:{sign}.0f})"


def print_table(arguments: argparse.Namespace) -> None:
    """Accuracies in percent with 95 % bootstrap intervals, as Markdown."""
    print("| arm | routing | tag | both | CPU s | GB |\n| --- | --- | --- | --- | --- | --- |")
    correct: dict[str, dict[str, np.ndarray]] = {}
    for arm in arguments.arms:
        found = json.loads(place(arguments.work, arm).with_suffix(".json").read_text())
        cells = [cell(accuracy(values, name)) for name, values in found["correct"].items()]
        cost = (f"{found['seconds']:.0f}", f"{found['gigabytes']:.1f}") if found["seconds"] else ("", "")
        print("| " + " | ".join([arm, *cells, *cost]) + " |")
        correct[arm] = {name: np.array([values], dtype=float) for name, values in found["correct"].items()}
    for arm in [arm for arm in correct if arm.startswith("cat") and "static_cat" in correct]:
        gains = []
        for name, own in correct[arm].items():
            gain = own - correct["static_cat"][name]
            estimate = Resample(1, gain.shape[1], name, over_seeds=False).estimate(gain)
            gains.append(f"{name} {cell(estimate, '+')}")
        print(f"\n{arm} minus static_cat, paired: {', '.join(gains)}")


def scaling(arguments: argparse.Namespace) -> None:
    """Time and memory of IterIS against samples and adapters; random adapters of the real base."""
    base, work = base_path("smollm2", default_cache()), arguments.work
    table = Table(title="IterIS, 2 solves, rank 8 on q_proj and v_proj, SmolLM2-135M")
    for column in ("adapters", "samples each", "CPU seconds", "peak GB"):
        table.add_column(column, justify="right")
    tickets = generate("ticket-routing", 128, seed=0)
    for count in (2, 4):
        paths = [work / f"random-{index}" for index in range(count)]
        for index, path in enumerate(paths):
            once(path, lambda path=path, index=index: make_adapter(path, base, index, 8, scale=0.02))
        for num in (8, 32, 128):
            write_jsonl(work / "inputs.jsonl", tickets[:num])
            flags = ["merge", "iteris", "--base", str(base), "--out", str(work / "scaling"), "--set"]
            flags += [
                "iteris.max_iter=2",
                "--adapters",
                *map(str, paths),
                "--data",
                *[str(work / "inputs.jsonl")] * count,
            ]
            seconds, gigabytes = run_command(flags)
            table.add_row(str(count), str(num), f"{seconds:.0f}", f"{gigabytes:.2f}")
    Console(width=100).print(table)


def main() -> None:
    """Measure, or go on measuring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/merging"), help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=40, help="rows of data a skill (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=298, help="rows of each test set (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=3, help="of the tag skill (default: %(default)s)")
    parser.add_argument(
        "--arms", nargs="+", default=ARMS, choices=ARMS, metavar="ARM", help=f"any of: {'; '.join(ARMS)}"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the merges")
    parser.add_argument("--threads", type=int, default=2, help="torch's CPU threads (default: %(default)s)")
    parser.add_argument("--scaling", action="store_true", help="IterIS against samples and adapters")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    scaling(arguments) if arguments.scaling else measure(arguments)


if __name__ == "__main__":
    main()
