"""Merge and migrate, in both orders, from one fleet file: `python -m benchmarks.composition --work runs/composition`.

The skills and the test sets are those of benchmarks/skills.py, SmolLM2-135M-Instruct is the source and Gemma 3 270M
the target. No real data is used after the skills' own training: the tag skill is a bundle of five seeds without a
discriminator. A rerun goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.skills import accuracy, bundle, cell, once, score, seeds, tests, train_tag
from examples.bases import base_path, default_cache
from translora.bundle import inspect_base, read_bundle, write_bundle
from translora.config import OPEN_GATE, BaseModelConfig
from translora.engine.transformers import TransformersEngine

ROOT = Path(__file__).parents[1]
ROUTING = bundle("routing")
AFTER = {"static_cat": {}, "iteris": {"iteris": {"max_iter": 5}}, "cat": {}}


def make_tag_bundle(work: Path, source: Path) -> Path:
    """The tag skill as its owner would leave it, without a discriminator."""
    once(work / "tag", lambda: train_tag(source, work / "tag", epochs=3))
    bundle = work / "bundles" / "tag"
    template = read_bundle(ROUTING).manifest.prompt_template
    once(
        bundle,
        lambda: write_bundle(
            bundle,
            adapter_dir=work / "tag",
            discriminator_dir=None,
            seeds=seeds("tag"),
            task_name="tag",
            base=inspect_base(str(source)),
            num_samples=60,
            prompt_template=template,
            provenance={"made_by": "benchmarks.composition"},
        ),
    )
    return bundle


def write_fleet(work: Path, tag: Path, num_samples: int) -> Path:
    """Both skills, their merge before the migration, and merges after it."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "fleet.yaml").read_text())
    config |= {
        "run_dir": str(work / "run"),
        "adapters": [{"bundle": str(path), "num_samples": num_samples} for path in (ROUTING, tag)],
        "merges": [
            {
                "name": "before-static_cat",
                "when": "before",
                "method": "static_cat",
                "adapters": [str(ROUTING), str(tag)],
                "num_samples": 2 * num_samples,
            },
            *(
                {"name": f"after-{method}", "when": "after", "method": method, "adapters": ["ticket-routing", "tag"]}
                | settings
                for method, settings in AFTER.items()
            ),
        ],
        "gate": {**OPEN_GATE, "min_holdout": 8, "holdout_fraction": 0.1},
    }
    config["distill"]["loss"] = "sft"  # as the page was measured
    path = work / "fleet.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def main() -> None:
    """Migrate, answer the test sets, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/composition"), help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=60, help="synthetic samples a skill (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=100, help="rows of each test set (default: %(default)s)")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source, target = (base_path(name, default_cache()) for name in ("smollm2", "gemma3"))
    fleet = write_fleet(work, make_tag_bundle(work, source), arguments.samples)
    done = subprocess.run([sys.executable, "-m", "translora", "migrate", str(fleet)], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"translora migrate ended with {done.returncode}")
    sets = tests(arguments.tests, ["routing"])
    arms = {
        "source base: routing": (source, ROUTING),
        "source base: tag": (source, work / "tag"),
        "source base: merged (static_cat)": (source, work / "run" / "merges" / "before-static_cat"),
        "migrated: routing": (target, work / "run" / "bundles" / "ticket-routing"),
        "migrated: tag": (target, work / "run" / "bundles" / "tag"),
        "merged (static_cat), then migrated": (target, work / "run" / "bundles" / "before-static_cat"),
        **{
            f"migrated, then merged ({method})": (target, work / "run" / "bundles" / f"after-{method}")
            for method in AFTER
        },
    }
    print(f"| adapter | {' | '.join(sets)} |\n| --- |{' --- |' * len(sets)}", flush=True)
    engines = {base: TransformersEngine(BaseModelConfig(model=str(base)), {}) for base in (source, target)}
    for arm, (base, adapter) in arms.items():
        engine = engines[base]
        engine.use_adapters({"it": adapter})
        cells = [cell(accuracy(score(engine, rows), name)) for name, rows in sets.items()]
        print(f"| {arm} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
