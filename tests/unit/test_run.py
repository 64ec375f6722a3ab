import json
import multiprocessing
from pathlib import Path

import pytest

from translora.config import AdapterEntry, FleetConfig
from translora.run.files import read_jsonl, replace_directory, sha256_path, write_json
from translora.run.member import continue_state, expand_entries
from translora.run.rundir import open_run
from translora.run.state import AdapterState, load_state, save_state


def config(run_dir: Path, **changes: object) -> FleetConfig:
    raw = {"run_dir": run_dir, "source": {"model": "a"}, "target": {"model": "b"}, "adapters": [{"bundle": "x"}]}
    return FleetConfig.model_validate(raw | changes)


def hold(run_dir: Path, opened, leave) -> None:  # type: ignore[no-untyped-def]
    with open_run(run_dir, config(run_dir)):
        opened.set()
        leave.wait(60)


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    opened, leave = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path / "run", opened, leave))
    first.start()
    assert opened.wait(60)
    with (
        pytest.raises(ValueError, match="another process works on this run"),
        open_run(tmp_path / "run", config(tmp_path)),
    ):
        pass
    first.kill()
    first.join()
    with open_run(tmp_path / "run", config(tmp_path / "run")):
        pass


def test_a_rerun_may_add_adapters_but_not_change_what_decides_a_result(tmp_path: Path) -> None:
    with open_run(tmp_path, config(tmp_path)):
        pass
    with open_run(tmp_path, config(tmp_path, adapters=[{"bundle": "y"}], resources={"num_actors": 2})):
        pass
    changed = config(tmp_path, distill={"epochs": 3})
    with (
        pytest.raises(ValueError, match=r"other settings \(distill.epochs 20.0 -> 3.0\); give another run_dir"),
        open_run(tmp_path, changed),
    ):
        pass


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / ".tmp-x").write_text("half")
    with open_run(tmp_path, config(tmp_path)):
        assert not list(tmp_path.rglob(".tmp-*"))
    with pytest.raises(RuntimeError), replace_directory(tmp_path / "made") as directory:
        (directory / "file").write_text("half")
        raise RuntimeError
    assert not (tmp_path / "made").exists() and not list(tmp_path.rglob(".tmp-*"))


@pytest.fixture
def finished(tmp_path: Path) -> AdapterState:
    state = AdapterState(name="a", bundle="x", bundle_digest="d", num_samples=4, phase="done", status="migrated")
    paths = {
        "adapters/a/synthetic.parquet": None,
        "adapters/a/student": "w",
        "adapters/a/discriminator": "w",
        "bundles/a": "w",
    }
    for relative, child in paths.items():
        path = tmp_path / relative / child if child else tmp_path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(relative)
        state.artifacts[relative] = sha256_path(tmp_path / relative)
    (tmp_path / "adapters/a/train").mkdir()
    save_state(tmp_path, state)
    return state


def fresh(**changes: object) -> AdapterState:
    return AdapterState.model_validate(
        {"name": "a", "bundle": "x", "bundle_digest": "d", "num_samples": 4, "phase": "synthesis"} | changes
    )


def test_a_finished_adapter_is_skipped(tmp_path: Path, finished: AdapterState) -> None:
    assert continue_state(tmp_path, fresh()) == finished


@pytest.mark.parametrize(
    ("damaged", "phase", "left"),
    [
        ("bundles/a/w", "gate", {"adapters/a/synthetic.parquet", "adapters/a/student", "adapters/a/discriminator"}),
        ("adapters/a/student/w", "distill", {"adapters/a/synthetic.parquet"}),
        ("adapters/a/synthetic.parquet", "synthesis", set()),
    ],
)
def test_a_changed_file_sends_the_adapter_back_to_the_phase_that_makes_it(
    tmp_path: Path, finished: AdapterState, damaged: str, phase: str, left: set[str]
) -> None:
    (tmp_path / damaged).write_text("changed")
    state = continue_state(tmp_path, fresh())
    assert (state.phase, state.status, set(state.artifacts)) == (phase, "pending", left)
    assert all((tmp_path / relative).exists() == (relative in left) for relative in finished.artifacts)
    assert state.gate is None and not state.output


def test_a_changed_bundle_starts_from_the_beginning(tmp_path: Path, finished: AdapterState) -> None:
    state = continue_state(tmp_path, fresh(bundle_digest="other"))
    assert (state.phase, state.status) == ("synthesis", "pending")
    assert not (tmp_path / "adapters/a/student").exists()
    assert not (tmp_path / "bundles/a").exists(), "what was shipped of the old bundle must not pass for the new one"


def test_a_quarantined_adapter_is_tried_again_and_a_failed_gate_is_not(tmp_path: Path, finished: AdapterState) -> None:
    save_state(tmp_path, finished.model_copy(update={"status": "quarantined", "phase": "distill", "reason": "r"}))
    assert continue_state(tmp_path, fresh()).status == "pending"
    save_state(tmp_path, finished.model_copy(update={"status": "quarantined", "reason": "broken for a while"}))
    assert continue_state(tmp_path, fresh()) == finished
    save_state(tmp_path, finished.model_copy(update={"status": "failed_gate", "reason": "r"}))
    assert continue_state(tmp_path, fresh()).status == "failed_gate"
    assert load_state(tmp_path, "a").reason == "r"


def test_globs_are_expanded_and_twice_the_same_name_is_refused(tmp_path: Path) -> None:
    for path in ("one/a", "one/b", "two/a"):
        (tmp_path / path).mkdir(parents=True)
    found = expand_entries([AdapterEntry(bundle=f"{tmp_path}/one/*", num_samples=7)])
    assert {name: entry.num_samples for name, entry in found.items()} == {"a": 7, "b": 7}
    explicit = expand_entries(
        [AdapterEntry(bundle=f"{tmp_path}/one/*"), AdapterEntry(bundle=f"{tmp_path}/one/a", num_samples=3)]
    )
    assert explicit["a"].num_samples == 3, "a later entry overrides the glob's"
    turned = expand_entries(
        [AdapterEntry(bundle=f"{tmp_path}/one/a", num_samples=3), AdapterEntry(bundle=f"{tmp_path}/one/*")]
    )
    assert turned["a"].num_samples == 3, "in any order"
    with pytest.raises(ValueError, match="are both named a; rename one directory"):
        expand_entries([AdapterEntry(bundle=f"{tmp_path}/*/a")])
    with pytest.raises(ValueError, match="matches no directory"):
        expand_entries([AdapterEntry(bundle=f"{tmp_path}/none/*")])


def test_jsonl_faults_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"input": "a", "target": "b"}) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: not JSON"):
        read_jsonl(path, required=("input", "target"))
    write_json(path, {"input": ""})
    with pytest.raises(ValueError, match=r"data\.jsonl"):
        read_jsonl(path, required=("input",))
