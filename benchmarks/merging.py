"""Skills merged by every method, on a task that needs two of them: `python -m benchmarks.merging --work runs/merging`.

The skills are those of benchmarks/skills.py: `tag`, and those named by --skills (routing).

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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.skills import TASKS, accuracy, bundle, cell, once, score, synthesise, tests, train_rows, train_tag
from examples.bases import base_path, default_cache
from examples.tasks import generate
from tests.tiny import make_adapter
from translora.config import BaseModelConfig
from translora.config.merge import METHODS, SETTINGS_OF, CatSettings, IterisSettings
from translora.engine.transformers import TransformersEngine
from translora.evaluate.statistics import Resample, all_different
from translora.run.files import digest, sha256_file, sha256_path, write_json, write_jsonl

WITH_DATA = ("cat", "iteris", "regmean")
VARIANTS = {"cat softmax": ["cat.coefficients=softmax"], "static_cat 1 + 1": ["weights=[{ones}]"]}
"""Settings of arms that are no method's default."""
ARMS = [
    f"{arm}, {source}" if source else arm
    for arm in (*METHODS, *VARIANTS)
    for source in (("real", "synthetic") if arm.split()[0] in WITH_DATA else ("",))
]


def place(work: Path, arm: str) -> Path:
    """Where an arm's adapter lies; its figures are in the .json of the same name."""
    return work / arm.replace(", ", "-").replace(" + ", "+").replace(" ", "-")


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
    own = [setting.format(ones=", ".join("1" for _ in adapters)) for setting in VARIANTS.get(name, [])]
    arguments = ["merge", name.split()[0], "--base", str(base), "--out", str(place(work, arm))]
    arguments += ["--adapters", *map(str, adapters.values())]
    if source:
        arguments += ["--data", *(str(work / f"{skill}.{source}.jsonl") for skill in adapters)]
    method, shared = arguments[1], [(setting, re.split(r"[.=]", setting)[0]) for setting in settings]
    followed = [setting for setting, key in shared if key not in SETTINGS_OF or method in SETTINGS_OF[key][0]]
    chosen = [*followed, *own]
    return run_command([*arguments, *(["--set", *chosen] if chosen else [])])


def prepare(arguments: argparse.Namespace, base: Path) -> dict[str, Path]:
    """Skills and their data, real and synthetic; other sizes need another --work.

    Raises:
        SystemExit: the directory is of other sizes.
    """
    work: Path = arguments.work
    sizes = {"samples": arguments.samples, "epochs": arguments.epochs, "skills": arguments.skills}
    if (work / "sizes.json").exists() and json.loads((work / "sizes.json").read_text()) != sizes:
        raise SystemExit(f"{work} was made with other --samples, --epochs or --skills; name another --work")
    write_json(work / "sizes.json", sizes)
    adapters = {**{skill: bundle(skill) for skill in arguments.skills}, "tag": work / "tag"}
    once(adapters["tag"], lambda: train_tag(base, adapters["tag"], arguments.epochs))
    for skill in adapters:
        write_jsonl(work / f"{skill}.real.jsonl", random.Random(1).sample(train_rows(skill), arguments.samples))
    once(work / "tag.synthetic.jsonl", lambda: synthesise(base, adapters, arguments.samples, work))
    return adapters


def measure(arguments: argparse.Namespace) -> None:
    """Merge and answer by every arm, then print the table."""
    base, work = base_path("smollm2", default_cache()), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    adapters = prepare(arguments, base)
    sets = tests(arguments.tests, arguments.skills)
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
    arms = [*(f"only {skill}" for skill in adapters), *arguments.arms]
    for arm in arms:
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
    print_table(work, arms, list(sets))


def print_table(work: Path, arms: Sequence[str], sets: Sequence[str]) -> None:
    """Accuracies in percent with 95 % bootstrap intervals, as Markdown."""
    print(f"| arm | {' | '.join(sets)} | CPU s | GB |\n|{' --- |' * (len(sets) + 3)}")
    correct: dict[str, dict[str, np.ndarray]] = {}
    for arm in arms:
        found = json.loads(place(work, arm).with_suffix(".json").read_text())
        cells = [cell(accuracy(values, name)) for name, values in found["correct"].items()]
        cost = (f"{found['seconds']:.0f}", f"{found['gigabytes']:.1f}") if found["seconds"] else ("", "")
        print("| " + " | ".join([arm, *cells, *cost]) + " |")
        correct[arm] = {name: np.array([values], dtype=float) for name, values in found["correct"].items()}
    for arm in [arm for arm in correct if arm.startswith("cat") and "static_cat" in correct]:
        gains = []
        for name, own in correct[arm].items():
            gain = own - correct["static_cat"][name]
            estimate = Resample(all_different(1, gain.shape[1]), name, over_seeds=False).estimate(gain)
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
    parser.add_argument("--skills", nargs="+", default=["routing"], choices=TASKS, help="beside tag (default: routing)")
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
