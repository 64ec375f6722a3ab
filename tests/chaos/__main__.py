"""A fleet of tiny adapters, once undisturbed and once with processes killed at random: the same in the end?

    python -m tests.chaos --adapters 200 --kills 50 [--seed 0] [--directory DIR]

Exit code 0 when every adapter is done and equals that of the undisturbed run, nothing finished was done twice, and
neither a process nor a temporary file is left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.chaos.fleet import leftovers, make_fleet, model_seconds, progress, results, step_rows, write_config
from tests.chaos.killer import disturbed, undisturbed


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(root: Path, num_adapters: int, num_kills: int, seed: int) -> list[str]:
    """Make the fleet, run it twice, print what happened; returns the faults."""
    say(f"making two bases and {num_adapters} bundles in {root}")
    make_fleet(root, num_adapters)
    calm, wild = root / "undisturbed", root / "disturbed"
    wall = undisturbed(write_config(root, calm.name), root / "undisturbed.log")
    model, load = model_seconds(calm, num_actors=1, num_workers=2)
    rest = wall - model - load
    say(
        f"undisturbed: {wall:.0f} s, of which models {model:.0f} s, loading bases for the actors {load:.0f} s; "
        f"driver, Ray and start-up {rest:.0f} s: {rest / wall:.0%} of the wall time"
    )
    tally = disturbed(write_config(root, wild.name), wild, progress(calm), num_kills, seed, root / "disturbed.log", say)
    say(f"disturbed: {tally.seconds:.0f} s, {tally.starts} starts, exit codes {dict(tally.exits)}")
    say(f"killed: {dict(tally.kills)}; {dict(tally.victims)}")
    return check(calm, wild, num_adapters, num_kills, tally.rewritten, tally.kills.total())


def check(calm: Path, wild: Path, num_adapters: int, num_kills: int, rewritten: list[str], killed: int) -> list[str]:
    """Compare the runs; prints the figures and returns the faults."""
    expected, found = results(calm), results(wild)
    done = [name for name, result in found.items() if result["state"]["phase"] == "done"]
    different = [name for name in expected if found.get(name) != expected[name]]
    steps = Counter(job for job, _ in step_rows(wild))
    needed = Counter(job for job, _ in step_rows(calm))
    repeated = sum((steps - needed).values())
    say(f"{len(done)} of {num_adapters} adapters done, {num_adapters - len(different)} equal to the undisturbed ones")
    say(f"finished files written again: {len(rewritten)}")
    say(f"training steps done again: {repeated} of {sum(needed.values())} ({repeated / max(1, killed):.0f} a kill)")
    faults = []
    if killed < num_kills:
        faults.append(f"only {killed} of {num_kills} kills found a process before the run was done")
    if len(done) != num_adapters:
        faults.append(f"not done: {sorted(set(expected) - set(done))[:10]}")
    if different:
        faults.append(f"differ: {different[:10]}")
    if rewritten:
        faults.append(f"written again: {rewritten[:10]}")
    if left := leftovers(wild) + leftovers(calm):
        faults.append(f"left behind: {left[:10]}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="an empty directory that is kept; a temporary one when left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="translora-chaos-") as temporary:
        root = arguments.directory or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        faults = run(root.resolve(), arguments.adapters, arguments.kills, arguments.seed)
    for fault in faults:
        say(f"FAULT: {fault}")
    say("the fleet survived" if not faults else f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
