"""Round three bases and back: `python -m benchmarks.hops examples/evaluate-options.yaml --third DIRECTORY`.

The source adapters, test rows and settings are those of the evaluate file, of one arm and in its first seed. Each hop
is a `translora migrate` from the bundles that the one before wrote: source -> target -> third -> source.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from translora.bundle.hub import name_of_path
from translora.config import AdapterEntry, BaseModelConfig, load_config
from translora.evaluate.cells import table
from translora.evaluate.config import EvaluateConfig, without_gate
from translora.evaluate.data import load_task, split
from translora.fleet import migrate
from translora.prepare import prepare
from translora.report.table import interval
from translora.run.cluster import start_ray
from translora.run.files import write_jsonl
from translora.run.log import setup_logging

HEAD = """\
# Round three bases and back

**{bases}, {tasks}, seed {seed}, \\|D_syn\\| = {num_samples} at each hop.** Each hop is a `translora migrate` from the
bundles that the hop before wrote; only the owner's adapter has seen real data. Inputs are
screened by {screen}. Accuracy in percent on the same test
items, the bare base beside it, in brackets 95 % intervals (Wilson). *agreement* is the gate's: with the adapter of the
hop before, on invented prompts. The gate is open here: below `gate.min_agreement`, {min_agreement} in this file, a
`translora migrate` would have tried once more with twice the samples, and withheld what still was below.
Made by `python -m benchmarks.hops {config} --arm {arm} --third {third}`.
"""


def percent(share: float, num_items: int) -> str:
    """A share of items with its interval."""
    return f"{100 * share:.0f} ({interval(share, num_items)})"


def rows(config: EvaluateConfig, arm: str, third: BaseModelConfig) -> list[list[str]]:
    """Migrate round the bases: a line for the owner's adapters and for each hop."""
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
    lines = []
    for number, (source, target) in enumerate(itertools.pairwise(bases), start=1):
        whole = config.fleet(seed, arm)
        fleet = without_gate(whole).model_copy(
            update={
                "run_dir": work / f"hop-{number}",
                "source": source,
                "target": target,
                "discriminator": config.discriminator,
                "adapters": [
                    AdapterEntry(bundle=str(path), num_samples=entry.num_samples, eval_data=str(tests[name]))
                    for entry, (name, path) in zip(whole.adapters, bundles.items(), strict=True)
                ],
            }
        )
        owner, hop = [f"the owner's, {name_of_path(source.model)}"], [f"hop {number}, {name_of_path(target.model)}"]
        for state in sorted(migrate(fleet), key=lambda state: list(tests).index(state.name)):
            found, gate = state.accuracy, state.gate
            if state.status != "migrated" or found is None or gate is None:
                raise SystemExit(f"hop {number}: {state.name} was not migrated: {state.reason}")
            items = found.num_items
            owner += [percent(share, items) for share in (found.source_base, found.source_adapter)] + ["–"]
            hop += [percent(share, items) for share in (found.target_base, found.migrated)]
            hop += [percent(gate.agreement_student, gate.num_heldout)]
            bundles[state.name] = fleet.run_dir / state.output
        lines += [owner, hop] if number == 1 else [hop]
    return lines


def main() -> None:
    """Read the files and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="an evaluate file")
    parser.add_argument("--arm", help="one of the file's (default: its first)")
    parser.add_argument("--third", required=True, help="the third base")
    parser.add_argument("--out", type=Path, default=Path("docs/results-hops.md"), help="default: %(default)s")
    arguments = parser.parse_args()
    setup_logging()
    config, third = load_config(arguments.config, EvaluateConfig), BaseModelConfig(model=arguments.third)
    arm = arguments.arm or next(iter(config.arms))
    if arm not in config.arms:
        parser.error(f"--arm {arm}: {arguments.config} has {', '.join(config.arms)}")
    found = rows(config, arm, third)
    bases, fleet = (config.source, config.target, third, config.source), config.fleet(config.seeds[0], arm)
    head = HEAD.format(
        bases=" → ".join(name_of_path(base.model) for base in bases),
        tasks=", ".join(task.name for task in config.tasks),
        seed=config.seeds[0],
        num_samples=fleet.adapters[0].num_samples,
        config=arguments.config,
        arm=arm,
        third=arguments.third.replace(str(Path.home()), "~"),
        min_agreement=fleet.gate.min_agreement,
        screen=fleet.synthesis.screen,
    )
    columns = [f"{task.name}: {what}" for task in config.tasks for what in ("bare base", "adapter", "agreement")]
    arguments.out.write_text("\n".join([head, *table(["adapter", *columns], found), ""]), encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
