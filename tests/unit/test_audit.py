"""What `make audit` makes of pip-audit's answer: a service that knows nothing is no clean bill of health."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.audit import CONSTRAINTS, report

SOUND: dict[str, Any] = {"name": "numpy", "version": "2.4.6", "vulns": []}
UNKNOWN = {"name": "left-pad", "skip_reason": "Dependency not found on PyPI"}
BROKEN = {"name": "ray", "version": "2.0.0", "vulns": [{"id": "CVE-2023-48022", "fix_versions": []}]}


@pytest.mark.parametrize(
    ("found", "code", "text"),
    [
        ([SOUND], 0, "audit: 0 of 1 packages are vulnerable"),
        ([SOUND, BROKEN], 1, "ray 2.0.0: CVE-2023-48022, fixed in no version yet"),
        ([SOUND, UNKNOWN], 2, "1 of 2 are unknown to the service: left-pad"),
        ([UNKNOWN, UNKNOWN], 2, "the vulnerability service cannot be reached from here"),
        (None, 2, "the vulnerability service cannot be reached from here"),
    ],
)
def test_exit_code_and_text(found: list[dict[str, Any]] | None, code: int, text: str) -> None:
    exit_code, lines = report("" if found is None else json.dumps({"dependencies": found, "fixes": []}))
    assert exit_code == code and text in "\n".join(lines)
    assert "cannot be reached" not in text or len(lines) == 1


def test_every_dependency_is_pinned() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 50 and all(line.count("==") == 1 and not set(line) & set("<>~*; ") for line in lines)
