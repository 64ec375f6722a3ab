from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_inputs.cases import DOCUMENT, GROUPS, HEAD, escape
from tests.bad_inputs.workshop import Bench, Case, Materials
from translora.bundle import BundleError, inspect_base, read_bundle, verify_bundle

ALL = [(group, case) for group, cases in GROUPS.items() for case in cases]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return Materials.make(tmp_path_factory.mktemp("materials"))


@pytest.mark.parametrize(("group", "case"), ALL, ids=[f"{group.split()[0]}-{case.id}" for group, case in ALL])
def test_message(group: str, case: Case, materials: Materials, tmp_path: Path) -> None:
    message = case.message(tmp_path, materials)
    assert case.expect in message
    row = f"| {escape(case.what)} | {escape(message)} |\n"
    section = DOCUMENT.read_text(encoding="utf-8").split(f"## {group}\n")[1].split("\n## ")[0]
    assert row in section, "docs/bad_inputs.md is stale: run `python -m tests.bad_inputs.cases`"
    assert str(materials.root) not in message
    assert str(tmp_path) not in message


def test_document_has_no_other_rows() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    rows = [line for line in text.splitlines() if line.startswith("| ") and line != "| input | message |"]
    assert len(rows) == len(ALL)


def test_every_bundle_fault_is_a_bundle_error(materials: Materials, tmp_path: Path) -> None:
    for case in GROUPS["Bundles that are read"] + GROUPS["Bundles that are written"]:
        directory = tmp_path / case.id
        directory.mkdir()
        with pytest.raises(BundleError):
            case.act(Bench(directory, materials))


def test_good_inputs_pass(materials: Materials) -> None:
    verify_bundle(read_bundle(materials.root / "bundles" / "good"), materials.base)
    inspect_base(str(materials.root / "sharded-base"))
