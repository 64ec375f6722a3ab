"""Every PEFT method into every other: `python -m benchmarks.methods examples/evaluate-methods.yaml`.

The arms of an evaluate file are methods of the students; here each is once the method of the source adapters too, and
of the adapters that are trained on the target with the real data. One `translora evaluate` a source, each of which may
run by itself (--sources), and one table of what was measured so far.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from translora.config import load_config
from translora.evaluate.cells import points, table
from translora.evaluate.config import REAL, SOURCE_ADAPTER, EvaluateConfig, merge
from translora.evaluate.render import read_results, write_results
from translora.evaluate.results import Results
from translora.evaluate.run import evaluate
from translora.run.cluster import start_ray
from translora.run.log import setup_logging

HEAD = """\
# Every PEFT method into every other

**{source} → {target}, {tasks}, {seeds}, \\|D_syn\\| = {num_samples}, {epochs} epochs, screened by {screen}.**
A row is the method of the source adapters, a column that of the students. Mean accuracy over the tasks in percent,
below it the points that the student has more than its source adapter, paired by test item, in brackets 95 % bootstrap
intervals; [results.md](results.md) says what they mean. Beside them adapters of the row's method that are trained on
the target with the real data. Made by `python -m benchmarks.methods {config}`,
each row from a page of its own: {pages}.
"""


def with_source(config: EvaluateConfig, arm: str) -> EvaluateConfig:
    """The same evaluation with source adapters of an arm's method."""
    return EvaluateConfig.model_validate(
        config.model_dump()
        | {
            "train": merge(config.train.model_dump(), config.arms[arm].get("distill", {})),
            "run_dir": config.run_dir / f"from-{arm}",
            "output": config.output.with_name(f"{config.output.stem}-from-{arm}.md"),
        }
    )


def row(source: str, results: Results, arms: list[str]) -> list[str]:
    """One line of the table: the source adapter, the real data's adapter, the students of each method."""
    cells = [source]
    for arm in (SOURCE_ADAPTER, REAL):
        cells.append(points(results.references[arm]))
    for arm in arms:
        found = results.arms[arm]
        cells.append(f"{points(found.accuracy)}<br>{points(found.against_source, signed=True)}")
    return cells


def page(config: EvaluateConfig, found: Mapping[str, Results], path: Path) -> str:
    """The table of the sources that were measured."""
    arms, setup = list(config.arms), next(iter(found.values())).setup
    head = HEAD.format(
        source=setup.source.name,
        target=setup.target.name,
        tasks=", ".join(task.name for task in config.tasks),
        seeds=f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}",
        num_samples=config.num_samples,
        epochs=f"{config.distill.epochs:g}",
        screen=config.synthesis.screen,
        config=path,
        pages=", ".join(f"[{arm}]({with_source(config, arm).output.name})" for arm in arms if arm in found),
    )
    lines = table(
        ["from", "source adapter", "real data on the target", *(f"into {arm}" for arm in arms)],
        [row(arm, found[arm], arms) for arm in arms if arm in found],
    )
    missing = ", ".join(arm for arm in arms if arm not in found)
    return "\n".join([head, *([f"Not measured yet: from {missing}.\n"] if missing else []), *lines, ""])


def main() -> None:
    """Evaluate each source, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="an evaluate file whose arms are methods")
    parser.add_argument("--sources", nargs="+", metavar="ARM", help="of these methods alone; the others' rows are kept")
    arguments = parser.parse_args()
    config = load_config(arguments.config, EvaluateConfig)
    own = {arm: with_source(config, arm) for arm in config.arms}
    sources = arguments.sources or list(own)
    if strange := [arm for arm in sources if arm not in own]:
        parser.error(f"--sources {strange[0]}: {arguments.config} has {', '.join(own)}")
    setup_logging()
    for arm in sources:
        write_results(evaluate(own[arm], start_ray), own[arm].output)
        made = {name: one.output for name, one in own.items() if one.output.with_suffix(".json").is_file()}
        found = {name: read_results(output) for name, output in made.items()}
        config.output.write_text(page(config, found, arguments.config), encoding="utf-8")
        print(config.output)


if __name__ == "__main__":
    main()
