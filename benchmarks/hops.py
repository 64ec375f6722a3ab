"""Round three bases and back: `python -m benchmarks.hops examples/evaluate-options.yaml --third DIRECTORY`.

The source adapters, test rows and settings are those of the evaluate file, in its first seed. Each hop is
a `translora migrate` from the bundles that the one before wrote: source -> target -> third -> source. A rerun goes on.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from benchmarks.merging import accuracy, cell
from translora.bundle.base import name_of_path
from translora.config import AdapterEntry, BaseModelConfig, load_config
from translora.evaluate.config import EvaluateConfig, without_gate
from translora.evaluate.data import load_task, split
from translora.fleet import migrate
from translora.prepare import prepare
from translora.run.cluster import start_ray
from translora.run.files import write_jsonl
from translora.run.log import setup_logging


def hops(config: EvaluateConfig, third: BaseModelConfig) -> None:
    """Migrate round the bases and print the table."""
    seed, work = config.seeds[0], config.run_dir.with_name(f"{config.run_dir.name}-hops")
    tests = {}
    for task in config.tasks:
        part = split(load_task(task), seed)
        write_jsonl(config.train_file(seed, task.name), part.train)
        tests[task.name] = work / f"{task.name}.test.jsonl"
        write_jsonl(tests[task.name], part.test)
    start_ray()
    prepare(config.prepare(seed))
    bundles = {task.name: config.bundle_dir(seed, task.name) for task in config.tasks}
    bases = (config.source, config.target, third, config.source)
    lines = [
        f"| hop | {' | '.join(f'{task}: before | after' for task in tests)} |",
        f"| --- |{' ---: | ---: |' * len(tests)}",
    ]
    for number, (source, target) in enumerate(itertools.pairwise(bases), start=1):
        fleet = without_gate(config.fleet(seed, next(iter(config.arms)))).model_copy(
            update={
                "run_dir": work / f"hop-{number}",
                "source": source,
                "target": target,
                "discriminator": config.discriminator,
                "adapters": [
                    AdapterEntry(bundle=str(path), num_samples=config.num_samples, eval_data=str(tests[name]))
                    for name, path in bundles.items()
                ],
            }
        )
        cells = []
        for state in sorted(migrate(fleet), key=lambda state: list(tests).index(state.name)):
            if state.status != "migrated" or state.accuracy is None:
                raise SystemExit(f"hop {number}: {state.name} was not migrated: {state.reason}")
            for share in (state.accuracy.source_adapter, state.accuracy.migrated):
                num_right = round(share * state.accuracy.num_items)
                answers = [index < num_right for index in range(state.accuracy.num_items)]
                cells.append(cell(accuracy(answers, state.name)))
            bundles[state.name] = fleet.run_dir / state.output
        lines.append(f"| {name_of_path(source.model)} → {name_of_path(target.model)} | {' | '.join(cells)} |")
    print("\n".join(lines))


def main() -> None:
    """Read the files and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="an evaluate file")
    parser.add_argument("--third", required=True, help="the third base")
    arguments = parser.parse_args()
    setup_logging()
    hops(load_config(arguments.config, EvaluateConfig), BaseModelConfig(model=arguments.third))


if __name__ == "__main__":
    main()
