from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_inputs.cases import DOCUMENT, GROUPS, HEAD, escape
from tests.bad_inputs.workshop import Bench, Case, Materials
from translora.bundle import BundleError, inspect_base, read_bundle, verify_bundle
from translora.cli import main
from translora.config import FleetConfig
from translora.fleet import migrate
from translora.run.state import load_states

ALL = [(group, case) for group, cases in GROUPS.items() for case in cases]
ALONE = GROUPS["Bundles that are read"] + GROUPS["Hostile bundles"]
FILES = [(group, case) for group in ("Fleet and prepare files", "Evaluations") for case in GROUPS[group]]
COMMANDS = {"fleet.yaml": "migrate", "prepare.yaml": "prepare", "evaluate.yaml": "evaluate"}


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


class FleetBench(Bench):
    """Migrates a bundle beside a sound one, as far as that goes without Ray."""

    def verify(self, bundle: Path) -> None:
        paths = [str(bundle), str(self.materials.root / "bundles" / "good")]
        config = FleetConfig.model_validate(
            {
                "run_dir": self.directory / "run",
                "source": {"model": str(self.materials.base.path)},
                "target": {"model": str(self.materials.root / "new-base")},
                "adapters": [{"bundle": path} for path in paths],
            }
        )

        def start_cluster() -> None:
            raise StartedError

        with pytest.raises(StartedError):
            migrate(config, start_cluster)
        bad, good = sorted(load_states(config.run_dir), key=lambda state: state.name == "good")
        assert (good.name, good.status, good.phase) == ("good", "pending", "synthesis")
        assert bad.status == "quarantined" and bad.reason.isprintable()
        raise ValueError(bad.reason)


class StartedError(Exception):
    """The fleet has work: Ray would be started."""


@pytest.mark.parametrize("case", ALONE, ids=[case.id for case in ALONE])
def test_a_bad_bundle_is_quarantined_alone(case: Case, materials: Materials, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(case.expect)):
        case.act(FleetBench(tmp_path, materials))


@pytest.fixture
def own_process() -> Iterator[None]:
    """Takes back what a command changes in its process: environment, logging, signal handler."""
    root, level, handlers = logging.getLogger(), logging.getLogger().level, list(logging.getLogger().handlers)
    before, on_sigterm = dict(os.environ), signal.getsignal(signal.SIGTERM)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("translora").setLevel(logging.NOTSET)
    logging.captureWarnings(False)
    signal.signal(signal.SIGTERM, on_sigterm)
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(("group", "case"), FILES, ids=[f"{group.split()[0]}-{case.id}" for group, case in FILES])
def test_a_bad_file_ends_the_command_with_one_line(
    group: str, case: Case, materials: Materials, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_process: None
) -> None:
    case.message(tmp_path, materials)
    (file,) = (path for path in tmp_path.glob("*.yaml") if path.is_file())
    wrong_command = re.search(r"for (migrate|prepare|evaluate)$", case.what)
    command = wrong_command[1] if wrong_command else COMMANDS[file.name]
    assert main([command, str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("translora: ") and error.count("\n") == 1 and case.expect in error


def test_every_bundle_fault_is_a_bundle_error(materials: Materials, tmp_path: Path) -> None:
    for case in ALONE + GROUPS["Bundles that are written"]:
        directory = tmp_path / case.id
        directory.mkdir()
        with pytest.raises(BundleError):
            case.act(Bench(directory, materials))


def test_good_inputs_pass(materials: Materials) -> None:
    verify_bundle(read_bundle(materials.root / "bundles" / "good"), materials.base)
    inspect_base(str(materials.root / "sharded-base"))
