"""Every PEFT method into every other: `python -m benchmarks.methods examples/evaluate-methods.yaml`.

The arms of an evaluate file are methods of the students; here each is once the method of the source adapters too, and
of the adapters that are trained on the target with the real data. One `translora evaluate` a source, then one table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from translora.config import load_config
from translora.evaluate.config import REAL, SOURCE_ADAPTER, EvaluateConfig, merge
from translora.evaluate.render import points, ratio, read_results, table
from translora.evaluate.results import Results

HEAD = """\
# Every PEFT method into every other

**{source} → {target}, {tasks}, {seeds}, \\|D_syn\\| = {num_samples}.** A row is the method of the source adapters, a
column that of the students. Mean accuracy over the tasks in percent, below it retention ρ, in brackets 95 % bootstrap
intervals; [results.md](results.md) says what they mean. The adapters that are trained on the target with the real data,
against which ρ is measured, are of the row's method.
"""


def with_source(whole: dict[str, Any], arm: str, directory: Path) -> Path:
    """Write the evaluate file whose source adapters are of an arm's method."""
    settings = dict(whole)
    settings["train"] = merge(whole.get("train", {}), whole["arms"][arm].get("distill", {}))
    settings["run_dir"] = f"{whole['run_dir']}/from-{arm}"
    output = Path(whole["output"])
    settings["output"] = str(output.with_name(f"{output.stem}-from-{arm}.md"))
    path = directory / f".{output.stem}-from-{arm}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def row(source: str, results: Results, arms: list[str]) -> list[str]:
    """One line of the table: the source adapter, the real data's adapter, the students of each method."""
    cells = [source]
    for arm in (SOURCE_ADAPTER, REAL):
        cells.append(points(results.references[arm]))
    for arm in arms:
        found = results.arms[arm]
        cells.append(f"{points(found.accuracy)}<br>ρ {ratio(found.retention)}")
    return cells


def main() -> None:
    """Evaluate each source, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="an evaluate file whose arms are methods")
    arguments = parser.parse_args()
    config = load_config(arguments.config, EvaluateConfig)
    whole = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    arms, found = list(config.arms), dict[str, Results]()
    for arm in arms:
        path = with_source(whole, arm, arguments.config.parent)
        try:
            subprocess.run([sys.executable, "-m", "translora", "evaluate", str(path)], check=True)
            found[arm] = read_results(load_config(path, EvaluateConfig).output)
        finally:
            path.unlink()
    setup = found[arms[0]].setup
    head = HEAD.format(
        source=setup.source.name,
        target=setup.target.name,
        tasks=", ".join(task.name for task in config.tasks),
        seeds=f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}",
        num_samples=config.num_samples,
    )
    lines = table(
        ["from", "source adapter", "real data on the target", *(f"into {arm}" for arm in arms)],
        [row(arm, found[arm], arms) for arm in arms],
    )
    config.output.write_text("\n".join([head, *lines, ""]), encoding="utf-8")
    print(config.output)


if __name__ == "__main__":
    main()
