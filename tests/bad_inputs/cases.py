"""The table of bad inputs. `python -m tests.bad_inputs.cases` rewrites docs/bad_inputs.md from the real messages."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.bad_inputs import base_cases, bundle_cases, config_cases, evaluate_cases, hostile_cases, storage_cases
from tests.bad_inputs.workshop import Case, Materials

DOCUMENT = Path(__file__).parents[2] / "docs" / "bad_inputs.md"
GROUPS: dict[str, list[Case]] = {
    "Bundles that are read": bundle_cases.CASES,
    "Hostile bundles": hostile_cases.CASES,
    "Fleets with one bad bundle": hostile_cases.FLEET_CASES,
    "Bundles that are written": base_cases.WRITE_CASES,
    "Bases": base_cases.CASES,
    "Fleet and prepare files": config_cases.CASES,
    "Paths of fleet files and bundles": config_cases.PATH_CASES,
    "JSONL data": config_cases.JSONL_CASES,
    "Evaluations": evaluate_cases.CASES,
    "Task data and results of evaluations": evaluate_cases.DATA_CASES,
    "Run directories": storage_cases.CASES,
}
HEAD = """\
# Bad inputs and the message each gives

Each row is a test (`tests/bad_inputs/`), and the messages are what the code really said: this file is written by
`python -m tests.bad_inputs.cases`, and a test compares it. Paths are relative to the case's own directory. A bad bundle
quarantines itself alone, and the other bundles of the fleet go on; a bad file or base ends the command with exit code 2
and this one line. Both are tested for each case.
"""


def escape(text: str) -> str:
    """Text as a Markdown table cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def document(root: Path) -> str:
    """The Markdown document, from every case's message; makes the inputs below `root`."""
    materials = Materials.make(root / "materials")
    parts = [HEAD]
    for group, cases in GROUPS.items():
        parts.append(f"\n## {group}\n\n| input | message |\n|---|---|\n")
        for case in cases:
            directory = root / group / case.id
            directory.mkdir(parents=True)
            parts.append(f"| {escape(case.what)} | {escape(case.message(directory, materials))} |\n")
    return "".join(parts)


def main() -> None:
    """Write the document."""
    with tempfile.TemporaryDirectory() as root:
        DOCUMENT.write_text(document(Path(root).resolve()), encoding="utf-8")
    sys.stdout.write(f"wrote {DOCUMENT}\n")


if __name__ == "__main__":
    main()
