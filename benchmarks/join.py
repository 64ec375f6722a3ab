"""Seeds that were measured apart, on one page: `python -m benchmarks.join seed-*.json --out docs/results.md`.

A repetition is by itself: its evaluate file names one seed, and an output and a run directory of its own. So the seeds
may be measured on several machines, or one a night.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from translora.errors import InputError
from translora.evaluate.render import read_results, write_results
from translora.evaluate.results import join


def main() -> None:
    """Write the page of all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, help="results of `translora evaluate`, equal but for the seeds")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file; .json and .svg stand beside it")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".md":
        parser.error(f"--out {arguments.out} does not end in .md")
    try:
        write_results(join([(str(page), read_results(page)) for page in arguments.pages]), arguments.out)
    except InputError as error:
        parser.error(str(error))
    print(arguments.out)


if __name__ == "__main__":
    main()
