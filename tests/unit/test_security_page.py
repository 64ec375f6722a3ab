"""docs/security.md names only files, tests and bad inputs that are there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.bad_inputs.cases import GROUPS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_tests_and_files_that_it_names_are_there() -> None:
    named = re.findall(r"`([\w/]+\.(?:py|txt|md))(?:::(\w+))?`", TEXT)
    assert len(named) > 20
    for path, inside in named:
        found = [root / path for root in (ROOT, ROOT / "translora", ROOT / "tests" / "unit") if (root / path).is_file()]
        assert found, f"{path} is not there"
        assert not inside or f"def {inside}(" in found[0].read_text(encoding="utf-8"), f"{inside} is not in {path}"


def test_the_bad_inputs_that_it_names_are_tested() -> None:
    known = {case.what for cases in GROUPS.values() for case in cases} | GROUPS.keys()
    named = re.findall(r"\"([^\"]+)\"", TEXT)
    assert len(named) > 10 and not set(named) - known, set(named) - known
