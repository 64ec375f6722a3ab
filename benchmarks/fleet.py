"""A whole migration of many small adapters: `translora migrate` against a plain script, both in this run.

    python -m examples.bases && python -m benchmarks.fleet [--adapters 16] [--samples 8] [--mended]

The adapters are copies of the example bundles under names of their own; real bases, the demo's settings. The plain
script (benchmarks/plain.py) gets the same counts of samples. Both use all cores; each is a process of its own, in an
environment that says nothing of threads, as a user would start it on a machine that he has for himself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.plain import Result
from translora.config import OPEN_GATE
from translora.run.state import load_states

ROOT = Path(__file__).parents[1]


def make_fleet(directory: Path, num_adapters: int, num_samples: int, num_heldout: int) -> Path:
    """A fleet file over copies of the example bundles."""
    examples = sorted(path for path in (ROOT / "examples" / "bundles").iterdir() if path.is_dir())
    entries = []
    for index in range(num_adapters):
        source = examples[index % len(examples)]
        copy = directory / "bundles" / f"{source.name}-{index:02d}"
        shutil.copytree(source, copy)
        entries.append({"bundle": str(copy), "num_samples": num_samples})
    config = yaml.safe_load((ROOT / "examples" / "fleet.yaml").read_text())
    config |= {"run_dir": str(directory / "run"), "adapters": entries}
    config["distill"]["loss"], config["synthesis"]["screen"] = "sft", "discriminator"  # what the plain script does
    config["gate"] = {**OPEN_GATE, "min_holdout": num_heldout, "holdout_fraction": 0.01}
    path = directory / "fleet.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(*command: str) -> tuple[float, int]:
    """Seconds from the start of a command to its end, and its exit code."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=own, check=False).returncode
    return time.monotonic() - start, code


def run_translora(path: Path) -> tuple[float, list[Result], dict[str, float]]:
    """Seconds from the command's start to its end, what came of each adapter, and the phases' seconds."""
    seconds, code = run("translora", "migrate", str(path))
    assert code in (0, 1), f"translora migrate ended with {code}"
    states = load_states(path.parent / "run")
    results = [
        Result(s.name, s.synthesis.generated, s.synthesis.accepted, s.gate.agreement_student if s.gate else 0.0)
        for s in states
    ]
    return seconds, results, dict(states[0].seconds)


def run_plain(path: Path, num_heldout: int, *mended: str) -> tuple[float, list[Result]]:
    """The same for the plain script; `mended` as there."""
    output = path.parent / "plain.json"
    seconds, code = run("benchmarks.plain", str(path), str(num_heldout), str(output), *mended)
    assert code == 0, f"the plain script ended with {code}"
    return seconds, [Result(**row) for row in json.loads(output.read_text())]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="synthetic training samples an adapter (default: 8)")
    parser.add_argument("--heldout", type=int, default=4)
    parser.add_argument("--mended", action="store_true", help="the plain script is one that was profiled, see there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = make_fleet(Path(name), arguments.adapters, arguments.samples, arguments.heldout)
        ours, our_results, phases = run_translora(path)
        plain, plain_results = run_plain(path, arguments.heldout, *(["mended"] if arguments.mended else []))
    table = Table(title=f"{arguments.adapters} adapters, SmolLM2-135M-Instruct -> Gemma 3 270M")
    for column in ("", "seconds", "generated", "accepted", "mean agreement"):
        table.add_column(column, justify="right")
    for label, seconds, results in (("plain script", plain, plain_results), ("translora", ours, our_results)):
        generated, accepted = (sum(getattr(r, key) for r in results) for key in ("num_generated", "num_accepted"))
        agreement = sum(result.agreement for result in results) / len(results)
        table.add_row(label, f"{seconds:.0f}", str(generated), str(accepted), f"{agreement:.0%}")
    table.add_row("ratio", f"{plain / ours:.2f}", "", "", "")
    Console(width=100).print(table)
    Console().print("translora's phases, seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in phases.items()))


if __name__ == "__main__":
    main()
