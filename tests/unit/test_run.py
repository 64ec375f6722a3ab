import dataclasses
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bad_inputs.workshop import change_json, rehash
from tests.tiny import make_base, make_bundle
from translora.bundle import BaseInfo, Bundle, inspect_base
from translora.config import (
    AdapterEntry,
    BaseModelConfig,
    FleetConfig,
    GateConfig,
    SamplingConfig,
    SynthesisConfig,
    TrainConfig,
    load_config,
)
from translora.distill.job import FAILURE, TrainJob
from translora.distill.phase import discriminator_inputs, distill_phase, train_jobs, warm_start
from translora.distill.teacher import ask_teachers
from translora.engine.loading import load_tokenizer
from translora.gate.phase import fail, gate_phase, judges
from translora.gate.questions import GateMember
from translora.merge.fleet import warn_of_templates
from translora.report.table import note, remarks
from translora.run import files
from translora.run.check import check_training
from translora.run.entries import expand_entries
from translora.run.files import read_jsonl, replace_directory, sha256_path, write_json, write_jsonl
from translora.run.member import Member, Run
from translora.run.recipes import Bases, Seals, recipes
from translora.run.resume import continue_state, sent_back, withdraw_others
from translora.run.rundir import open_run
from translora.run.state import (
    DISCRIMINATOR,
    SYNTHETIC,
    AdapterState,
    GateResult,
    Phase,
    SynthesisStats,
    load_state,
    save_state,
)
from translora.run.tracker import Tracker
from translora.run.verify import check_copy, refused, verify, verify_fleet
from translora.synthesis.phase import make_pool, synthesis_phase
from translora.synthesis.pool import choose_screen


def config(run_dir: Path, **changes: object) -> FleetConfig:
    raw = {"run_dir": run_dir, "source": {"model": "a"}, "target": {"model": "b"}, "adapters": [{"bundle": "x"}]}
    return FleetConfig.model_validate(raw | changes)


def entries_of(entries: list[AdapterEntry]) -> dict[str, AdapterEntry]:
    """Those of a fleet none of whose directories has a name that it cannot bear in the run."""
    found, faults = expand_entries(entries)
    assert not faults
    return found


def test_a_rerun_may_add_adapters_but_not_change_what_decides_a_result(tmp_path: Path) -> None:
    with open_run(tmp_path, config(tmp_path)):
        (tmp_path / "rounds").mkdir()
    with open_run(tmp_path, config(tmp_path, adapters=[{"bundle": "y"}], resources={"num_actors": 2})):
        pass
    changed = config(tmp_path, distill={"epochs": 3})
    with (
        pytest.raises(
            ValueError, match=r"other settings \(distill.epochs 20.0 -> 3.0\); set it back, or give another run_dir"
        ),
        open_run(tmp_path, changed),
    ):
        pass


def test_before_anything_is_made_every_setting_may_be_corrected(tmp_path: Path) -> None:
    with open_run(tmp_path, config(tmp_path, distill={"lora": {"target_modules": ["qproj"]}})):
        save_state(tmp_path, AdapterState(name="a", bundle="x", status="quarantined"))
    with open_run(tmp_path, config(tmp_path)):
        (tmp_path / "adapters/a/synthetic.parquet").write_text("made")
    with pytest.raises(ValueError, match="other settings"), open_run(tmp_path, config(tmp_path, seed=1)):
        pass


@pytest.mark.parametrize("foreign", ["notes.txt", "other-run/adapters/.tmp-x"])
def test_a_directory_of_somebody_else_is_refused_and_left_alone(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = sha256_path(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="is not empty and no run directory"), open_run(tmp_path, config(tmp_path)):
            pass
        assert sha256_path(tmp_path) == before
        (tmp_path / "config.json").unlink(missing_ok=True)
        before = sha256_path(tmp_path)


def test_a_run_killed_at_its_very_start_is_continued(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    os.utime(tmp_path / "lock", (0, 0))
    (tmp_path / ".tmp-config.json-1234").write_text("{")
    with open_run(tmp_path, config(tmp_path)):
        assert not list(tmp_path.glob(".tmp-*"))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    with open_run(tmp_path, config(tmp_path)):
        pass
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / ".tmp-x").write_text("half")
    with open_run(tmp_path, config(tmp_path)):
        assert not list(tmp_path.rglob(".tmp-*"))
    with pytest.raises(RuntimeError), replace_directory(tmp_path / "made") as directory:
        (directory / "file").write_text("half")
        raise RuntimeError
    assert not (tmp_path / "made").exists() and not list(tmp_path.rglob(".tmp-*"))


def test_a_directory_has_its_successor_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, removed = tmp_path / "made", []
    remove, rename = shutil.rmtree, os.replace

    def look(path: Path, **rest: Any) -> None:
        removed.append((made / "file").read_text())
        remove(path, **rest)

    def fail(old: Path, new: Path) -> None:
        if new == made and not (old / "file").read_text() == "old":
            raise PermissionError(new)
        rename(old, new)

    def write(text: str) -> None:
        with replace_directory(made) as directory:
            (directory / "file").write_text(text)

    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(PermissionError):
            write("lost")
    assert (made / "file").read_text() == "old", "what cannot be replaced stays"
    monkeypatch.setattr(files.shutil, "rmtree", look)
    write("new")
    assert set(removed) == {"new"} and [path.name for path in tmp_path.iterdir()] == ["made"]
    monkeypatch.undo()
    made = tmp_path / "a-file"
    made.write_text("mine")
    with pytest.raises(NotADirectoryError):
        write("new")
    assert made.read_text() == "mine" and not list(tmp_path.glob(".tmp-*"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("published")
    return make_bundle(root / "bundle", make_base(root / "base"))


@pytest.fixture(scope="module")
def target(bundle: Bundle) -> BaseInfo:
    return inspect_base(str(bundle.path.parent / "base"))


@pytest.fixture
def finished(tmp_path: Path, bundle: Bundle) -> AdapterState:
    state = AdapterState(name="a", bundle="x", bundle_digest="d", num_samples=4, phase="done", status="migrated")
    paths = {
        "adapters/a/synthetic.parquet": None,
        "adapters/a/student": "w",
        "adapters/a/discriminator": "w",
    }
    for relative, child in paths.items():
        path = tmp_path / relative / child if child else tmp_path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(relative)
        state.artifacts[relative] = sha256_path(tmp_path / relative)
    shutil.copytree(bundle.path, tmp_path / "bundles/a")
    state.artifacts["bundles/a"] = bundle.digest
    (tmp_path / "adapters/a/train").mkdir()
    save_state(tmp_path, state)
    return state


def fresh(**changes: object) -> AdapterState:
    return AdapterState.model_validate(
        {"name": "a", "bundle": "x", "bundle_digest": "d", "num_samples": 4, "phase": "synthesis"} | changes
    )


def test_a_finished_adapter_is_skipped(tmp_path: Path, finished: AdapterState, target: BaseInfo) -> None:
    assert continue_state(tmp_path, fresh(), target) == finished


def test_a_model_card_in_a_published_bundle_is_kept(tmp_path: Path, finished: AdapterState, target: BaseInfo) -> None:
    (tmp_path / "bundles/a/README.md").write_text("# What it is good for")
    assert continue_state(tmp_path, fresh(), target) == finished
    assert (tmp_path / "bundles/a/README.md").is_file()


@pytest.mark.parametrize(
    ("damaged", "phase", "left"),
    [
        (
            "bundles/a/adapter_model.safetensors",
            "gate",
            {"adapters/a/synthetic.parquet", "adapters/a/student", "adapters/a/discriminator"},
        ),
        ("adapters/a/student/w", "distill", {"adapters/a/synthetic.parquet"}),
        ("adapters/a/synthetic.parquet", "synthesis", set()),
    ],
)
def test_a_changed_file_sends_the_adapter_back_to_the_phase_that_makes_it(
    tmp_path: Path, finished: AdapterState, target: BaseInfo, damaged: str, phase: str, left: set[str]
) -> None:
    (tmp_path / damaged).write_text("changed")
    state = continue_state(tmp_path, fresh(), target)
    assert (state.phase, state.status, set(state.artifacts)) == (phase, "pending", left)
    kept = left if damaged.startswith("bundles") else left | {"bundles/a"}
    assert {relative for relative in finished.artifacts if (tmp_path / relative).exists()} == kept, (
        "what was published and is sound stays until it is replaced"
    )
    assert state.gate is None and not state.output


def test_a_changed_bundle_starts_from_the_beginning(tmp_path: Path, finished: AdapterState, target: BaseInfo) -> None:
    state = continue_state(tmp_path, fresh(bundle_digest="other"), target)
    assert (state.phase, state.status) == ("synthesis", "pending")
    assert not (tmp_path / "adapters/a/student").exists()
    assert not (tmp_path / "bundles/a").exists(), "what was shipped of the old bundle must not pass for the new one"


def test_a_quarantined_adapter_is_tried_again_and_a_failed_gate_is_not(
    tmp_path: Path, finished: AdapterState, target: BaseInfo
) -> None:
    save_state(tmp_path, finished.model_copy(update={"status": "quarantined", "phase": "distill", "reason": "r"}))
    assert continue_state(tmp_path, fresh(), target).status == "pending"
    save_state(tmp_path, finished.model_copy(update={"status": "quarantined", "reason": "broken for a while"}))
    assert continue_state(tmp_path, fresh(), target) == finished
    save_state(tmp_path, finished.model_copy(update={"status": "failed_gate", "reason": "r"}))
    assert continue_state(tmp_path, fresh(), target).status == "failed_gate"
    assert load_state(tmp_path, "a").reason == "r"


@pytest.fixture
def run(tmp_path: Path, target: BaseInfo) -> Iterator[Run]:
    """A run whose two bases are the same tiny one; only bundles and states are looked at."""
    tokenizer = load_tokenizer(BaseModelConfig(model=str(target.path)))
    settings = config(tmp_path, source={"model": str(target.path)}, target={"model": str(target.path)})
    with Tracker(tmp_path, settings.tracking, {}, "test") as tracker:
        yield Run(settings, target, target, target, tracker, tokenizer, tokenizer)


def test_another_attempt_lays_the_first_set_aside_and_survives_a_kill(
    tmp_path: Path, run: Run, bundle: Bundle, finished: AdapterState, target: BaseInfo
) -> None:
    trained = {"losses": [1.0], "step": 1, "num_steps": 1, "answers_per_sample": 1.5}
    state = finished.model_copy(
        update=trained | {"phase": "gate", "status": "pending", "reason": "", "gate": verdict(0.4)}
    )
    assert sent_back(state, fresh(), "gate").model_dump().items() >= trained.items(), "the card tells of it"
    first = (tmp_path / "adapters/a/synthetic.parquet").read_bytes()
    member = Member(bundle, state, tmp_path / "adapters/a", [], AdapterEntry(bundle="x"))
    run.send_back(member)
    assert member.waits_for("synthesis") and state.attempt == 2
    assert (state.losses, state.answers_per_sample) == ([], None)
    assert member.earlier_set.read_bytes() == first and not (tmp_path / "adapters/a/synthetic.parquet").exists()
    assert "attempt 2: the gate sent it back for more samples" in note(state)
    assert (state.gate, state.accuracy, state.earlier_agreement) == (None, None, 0.4), "the verdict was on the first"
    again = continue_state(tmp_path, fresh(), target)
    assert again == state and run.config.gate.sizes(again.num_samples, again.attempt) == (8, 48)
    for phase in ("synthesis", "gate"):
        assert sent_back(state, fresh(), phase).earlier_agreement == 0.4, "what the next attempt is compared with"
    shipped = tmp_path / "bundles/a"
    shipped.mkdir(parents=True, exist_ok=True)
    member.earlier_set.write_bytes(b"damaged")
    assert continue_state(tmp_path, fresh(), target) == fresh(), "without the first set everything is made anew"
    assert not shipped.exists(), "a next hop would take it for the new one"


def verdict(agreement: float) -> GateResult:
    return GateResult(num_heldout=10, agreement_student=agreement, agreement_base=0, passed=False, reason="too low")


@pytest.mark.parametrize(
    ("retries", "agreements", "attempts"),
    [
        (1, (0.4, 0.5), 2),  # one retry, which helped and was not enough
        (3, (0.4, 0.5, 0.5), 3),  # the third attempt brought nothing: the fourth is not made
        (3, (0.4, 0.3), 2),
        (3, (0.1, 0.2, 0.3, 0.4), 4),
        (0, (0.4,), 1),
    ],
)
def test_attempts_end_when_more_samples_help_no_more(
    tmp_path: Path, run: Run, bundle: Bundle, finished: AdapterState, retries: int, agreements: Any, attempts: int
) -> None:
    settings = run.config.model_copy(update={"gate": GateConfig(retries=retries)})
    run = dataclasses.replace(run, config=settings)
    state = finished.model_copy(update={"phase": "gate", "status": "pending", "reason": ""})
    synthetic = (tmp_path / "adapters/a/synthetic.parquet").read_bytes()
    member = Member(bundle, state, tmp_path / "adapters/a", [], AdapterEntry(bundle="x"))
    for number, agreement in enumerate(agreements, 1):
        (tmp_path / "adapters/a/synthetic.parquet").write_bytes(synthetic)
        state.gate = verdict(agreement)
        fail(run, member)
        assert (state.status == "failed_gate") is (number == attempts)
    assert state.attempt == attempts == len(agreements) and state.reason.startswith("too low")
    assert ("more samples do not help" in state.reason) is (attempts > 1 and agreements[-1] <= agreements[-2])


def test_teachers_are_asked_for_soft_labels_where_their_answers_are_few_and_exclude_each_other(
    tmp_path: Path, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"input": "one", "answer": "yes", "split": "train"},
        {"input": "two", "answer": "No", "split": "train"},
        {"input": "three", "answer": "no", "split": "heldout"},
    ]

    def member(name: str, classes: dict[str, int], **settings: Any) -> Member:
        directory = tmp_path / "adapters" / name
        directory.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), directory / SYNTHETIC)
        state = fresh(name=name, synthesis=SynthesisStats(classes=classes))
        return Member(bundle, state, directory, [], AdapterEntry(bundle="x", **settings))

    few = {"no": 2, "yes": 1, "perhaps": 1}
    members = [
        member("few", few),
        member("free-text", {}),
        member("one-answer", {"yes": 3}),
        member("without-ends", few, stop="END"),
        Member(bundle, fresh(name="without-a-set"), tmp_path / "adapters/none", [], AdapterEntry(bundle="x")),
    ]
    asked: list[Any] = []
    faults: dict[str, str] = {}
    monkeypatch.setattr(
        "translora.distill.teacher.ask", lambda run, members, rows, *_: (asked.extend(rows) or {}, faults)
    )
    assert ask_teachers(run, members) == {}
    found = [(row["adapter"], row["index"], row["input"], row["answer"], row["given"]) for row in asked]
    assert found == [
        ("few", 0, "one", "yes", True),
        ("few", 0, "one", "no", False),
        ("few", 0, "one", "perhaps", False),
        ("few", 1, "two", "No", True),
        ("few", 1, "two", "yes", False),
        ("few", 1, "two", "perhaps", False),
    ]
    asked.clear()
    for other in ({"loss": "sft"}, {"token_share": 0.7}, {"epochs": 0}):
        part = run.config.distill.model_copy(update=other)
        ask_teachers(dataclasses.replace(run, config=run.config.model_copy(update={"distill": part})), members)
    assert all("given" not in row for row in asked), (
        "sft and a copy ask nobody, and chosen tokens are those of one answer"
    )
    assert {row["adapter"] for row in asked} == {"few", "free-text", "one-answer", "without-ends"}
    faults["few"] = "its rows end the worker"
    ask_teachers(run, members)
    assert remarks(members[0].state) == [], "it is past its training"
    members[0].state.phase = "distill"
    assert ask_teachers(run, members) == {}, "sft needs no soft labels, so the adapter goes on without"
    assert members[0].state.status == "pending" and remarks(members[0].state) == [
        "trained without soft labels, with sft: its teacher cannot be asked (its rows end the worker)"
    ]


def test_a_copy_is_not_tried_again_and_what_cannot_be_copied_is_refused(
    tmp_path: Path, run: Run, bundle: Bundle, finished: AdapterState
) -> None:
    """Of no epochs: more samples change no copy, and a DoRA's student would begin, and end, as nothing."""
    run = dataclasses.replace(
        run, config=run.config.model_copy(update={"distill": TrainConfig(warm_start=True, epochs=0)})
    )
    state = finished.model_copy(update={"phase": "gate", "status": "pending", "reason": "", "gate": verdict(0.4)})
    fail(run, Member(bundle, state, tmp_path / "adapters/a", [], AdapterEntry(bundle="x")))
    assert state.status == "failed_gate" and "a copy of its source adapter, which more samples" in state.reason
    bundle = dataclasses.replace(bundle, path=shutil.copytree(bundle.path, tmp_path / "copy"))
    settings = json.loads((bundle.path / "adapter_config.json").read_text())
    check_copy(run, bundle, AdapterEntry(bundle="x"))
    cut = TrainConfig.model_validate({"warm_start": True, "epochs": 0, "lora": {"rank": 1}})
    small = dataclasses.replace(run, config=run.config.model_copy(update={"distill": cut}))
    with pytest.raises(
        ValueError, match=rf"rank {settings['r']}, .* with 1, and is no copy then; set distill.lora.rank"
    ):
        check_copy(small, bundle, AdapterEntry(bundle="x"))
    check_copy(small, bundle, AdapterEntry(bundle="x", epochs=2))
    fewer = TrainConfig.model_validate({"warm_start": True, "epochs": 0, "lora": {"target_modules": ["q_proj"]}})
    narrow = dataclasses.replace(run, config=run.config.model_copy(update={"distill": fewer}))
    with pytest.raises(
        ValueError, match=r"adapts .*v_proj, which .* no copy then; add .*v_proj to distill.lora.target_modules"
    ):
        check_copy(narrow, bundle, AdapterEntry(bundle="x"))
    check_copy(narrow, bundle, AdapterEntry(bundle="x", epochs=2))
    (bundle.path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    check_copy(run, bundle, AdapterEntry(bundle="x", epochs=2))
    with pytest.raises(ValueError, match=r"is no plain LoRA: .* 0 epochs train nothing; give it epochs of its own"):
        check_copy(run, bundle, AdapterEntry(bundle="x"))


@pytest.mark.parametrize("content", ["", '{"name": "a", "bun', '{"name": "a", "bundle": "x", "of_the_future": 1}'])
def test_a_state_that_cannot_be_read_quarantines_its_adapter_and_is_kept(
    tmp_path: Path, run: Run, bundle: Bundle, content: str
) -> None:
    path = tmp_path / "adapters/a/state.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(
        ValueError, match=r"a/state\.json: truncated.*; delete it: the adapter is migrated anew"
    ) as fault:
        load_state(tmp_path, "a")
    assert "pydantic" not in str(fault.value) and "\n" not in str(fault.value)
    state = verify(run, "a", AdapterEntry(bundle=str(bundle.path)))
    assert isinstance(state, AdapterState) and state.status == "quarantined" and "state.json" in state.reason
    assert path.read_text() == content, "it may be of a newer version"
    path.unlink()
    (tmp_path / "bundles/a").mkdir(parents=True)
    member = verify(run, "a", AdapterEntry(bundle=str(bundle.path)))
    assert isinstance(member, Member) and member.waits_for("synthesis")
    assert not (tmp_path / "bundles/a").exists(), "what was shipped before is not of this run"


@pytest.fixture
def migrated(tmp_path: Path, run: Run, bundle: Bundle, finished: AdapterState) -> AdapterState:
    """`finished`, as this run would have left it."""
    entry = AdapterEntry(bundle=str(bundle.path))
    done = {"bundle_digest": bundle.digest, "num_samples": 16, "output": "bundles/a", "losses": [1.0], "step": 1}
    done |= {"recipes": recipes_of(run, entry, bundle)}
    state = finished.model_copy(update=done)
    save_state(tmp_path, state)
    return state


def recipes_of(run: Run, entry: AdapterEntry, bundle: Bundle) -> dict[Phase, str]:
    bases = Bases(run.source, run.target, run.generator)
    return recipes(run.config, entry, bundle_digest=bundle.digest, num_samples=16, bases=bases)


def found(run: Run, entry: AdapterEntry) -> AdapterState:
    member = verify(run, "a", entry)
    assert isinstance(member, Member)
    return member.state


@pytest.mark.parametrize(
    ("section", "change", "phase", "kept"),
    [
        ("gate", {"min_agreement": 0.9}, "gate", {"synthetic.parquet", "student", "discriminator"}),
        ("synthesis", {"max_answer_tokens": 9}, "synthesis", set()),
        ("gate", {"holdout_fraction": 0.5}, "synthesis", set()),
        ("distill", {"epochs": 7}, "distill", {"synthetic.parquet"}),
        ("discriminator", {"epochs": 7}, "distill", {"synthetic.parquet"}),
        ("distill", {"gang_size": 3, "num_workers": 1}, "done", {"synthetic.parquet", "student", "discriminator", "a"}),
        (
            "distill",
            {"ds_config": "zero3-offload.json"},
            "done",
            {"synthetic.parquet", "student", "discriminator", "a"},
        ),
        ("distill", {"ds_config": "zero3-zeropp.json"}, "distill", {"synthetic.parquet"}),
        ("synthesis", {"batch_size": 3}, "done", {"synthetic.parquet", "student", "discriminator", "a"}),
        ("synthesis", {"max_rounds": 9}, "done", {"synthetic.parquet", "student", "discriminator", "a"}),
        ("gate", {"retries": 3}, "done", {"synthetic.parquet", "student", "discriminator", "a"}),
        ("resources", {"num_actors": 3}, "done", {"synthetic.parquet", "student", "discriminator", "a"}),
    ],
)
def test_a_changed_setting_does_again_what_it_touches(
    tmp_path: Path,
    run: Run,
    bundle: Bundle,
    migrated: AdapterState,
    section: str,
    change: dict[str, object],
    phase: str,
    kept: set[str],
) -> None:
    settings = getattr(run.config, section).model_copy(update=change)
    changed = dataclasses.replace(run, config=run.config.model_copy(update={section: settings}))
    state = found(changed, AdapterEntry(bundle=str(bundle.path)))
    assert state.phase == phase and state.status == ("migrated" if phase == "done" else "pending")
    assert {Path(name).name for name in state.artifacts} == kept
    assert (tmp_path / "bundles/a").exists(), "what was published stays until it is replaced"
    assert (tmp_path / "adapters/a/student/w").exists(), "a training knows by itself what it made"
    assert (state.losses == [1.0]) == (phase in ("gate", "done")) and (state.gate is None)
    assert found(changed, AdapterEntry(bundle=str(bundle.path))) == state, "and is done again once"


def test_another_base_of_the_same_name_does_again_what_it_touches(
    tmp_path: Path, run: Run, bundle: Bundle, migrated: AdapterState
) -> None:
    entry = AdapterEntry(bundle=str(bundle.path))
    moved = inspect_base(str(shutil.copytree(run.target.path, tmp_path / "elsewhere/base")))
    assert found(dataclasses.replace(run, target=moved), entry).phase == "done", "where it lies does not matter"
    other = dataclasses.replace(run.target, fingerprint="other")
    assert found(dataclasses.replace(run, generator=other, target=other), entry).phase == "synthesis"


def test_what_was_published_of_another_base_is_removed_whoever_it_was(
    tmp_path: Path, run: Run, bundle: Bundle, target: BaseInfo
) -> None:
    """Also of adapters that left the fleet, or cannot be read tonight."""
    for name in ("a", "left"):
        shutil.copytree(bundle.path, tmp_path / "bundles" / name)
    (tmp_path / "bundles/damaged").mkdir()
    withdraw_others(tmp_path, target)
    assert {path.name for path in (tmp_path / "bundles").iterdir()} == {"a", "left", "damaged"}
    seals = Seals(tmp_path, run.config, (run.source, run.target, run.generator))
    verify_fleet(dataclasses.replace(run, target=dataclasses.replace(target, fingerprint="other")), {}, seals, {})
    assert {path.name for path in (tmp_path / "bundles").iterdir()} == {"damaged"}


def test_more_to_spend_touches_those_alone_that_failed_for_lack_of_it(
    tmp_path: Path, run: Run, bundle: Bundle, migrated: AdapterState
) -> None:
    entry = AdapterEntry(bundle=str(bundle.path))

    def with_more(section: str, **change: float) -> Run:
        settings = getattr(run.config, section).model_copy(update=change)
        return dataclasses.replace(run, config=run.config.model_copy(update={section: settings}))

    whole = found(run, entry)
    short = {"synthesis": whole.synthesis.model_copy(update={"shortfall": "12 of 16 samples"})}
    failed = {"status": "failed_gate", "artifacts": {}, "output": ""}
    outage = {**failed, "status": "quarantined"}
    rounds, fewer = with_more("synthesis", max_rounds=9), with_more("synthesis", max_rounds=2)
    retries, none = with_more("gate", retries=3), with_more("gate", retries=0)
    for state, settings, phase in (
        ({}, rounds, "done"),
        (short, rounds, "done"),  # it passed with what it had
        (short, retries, "done"),
        (failed, rounds, "done"),
        (failed | short, rounds, "synthesis"),
        (failed | short, fewer, "done"),
        (failed, retries, "gate"),
        (outage, retries, "gate"),  # its store was down for a night
        (failed, none, "done"),
        (failed | {"spending": {}}, retries, "done"),  # a state of an older version
    ):
        save_state(tmp_path, whole.model_copy(update=state))
        assert found(run, entry).phase == "done", "with no more than before"
        save_state(tmp_path, whole.model_copy(update=state))
        assert found(settings, entry).phase == phase, (state, phase)


def test_a_setting_in_whose_place_an_adapter_has_its_own_does_not_touch_it(
    tmp_path: Path, run: Run, bundle: Bundle, migrated: AdapterState
) -> None:
    entry = AdapterEntry(bundle=str(bundle.path), epochs=3, learning_rate=1e-3)
    save_state(tmp_path, migrated.model_copy(update={"recipes": recipes_of(run, entry, bundle)}))
    for change, phase in (({"epochs": 7, "learning_rate": 0.5}, "done"), ({"batch_size": 3}, "distill")):
        settings = run.config.distill.model_copy(update=change)
        changed = dataclasses.replace(run, config=run.config.model_copy(update={"distill": settings}))
        assert found(changed, entry).phase == phase


def test_an_adapters_own_settings_and_eval_data_touch_it_alone(
    tmp_path: Path, run: Run, bundle: Bundle, migrated: AdapterState
) -> None:
    rows = tmp_path / "test.jsonl"
    rows.write_text('{"input": "a", "target": "b"}\n')
    for own, phase in (
        ({"eval_data": str(rows)}, "gate"),
        ({"epochs": 3}, "distill"),
        ({"screen": "none"}, "synthesis"),
        ({"stop": "END"}, "synthesis"),
        ({"min_agreement": 0.3}, "gate"),
        ({"prompt_template": "Q: {input}\nA:"}, "distill"),
        ({"prompt_template": "source"}, "distill"),
        ({"prompt_template": "auto"}, "done"),
    ):
        save_state(tmp_path, migrated)
        shutil.copytree(bundle.path, tmp_path / "bundles/a", dirs_exist_ok=True)
        assert found(run, AdapterEntry(bundle=str(bundle.path), **own)).phase == phase  # type: ignore[arg-type]


def test_students_are_prompted_as_the_fleet_or_their_own_entry_says(run: Run, bundle: Bundle) -> None:
    plain = "Q: {input}\nA:"
    assert bundle.manifest.prompt_template == "chat"
    for fleet, own, expected in (
        ("auto", None, "auto"),
        ("auto", "source", "chat"),
        ("source", None, "chat"),
        ("source", plain, plain),
        (plain, None, plain),
    ):
        configured = dataclasses.replace(run, config=run.config.model_copy(update={"prompt_template": fleet}))
        member = verify(configured, "a", AdapterEntry(bundle=str(bundle.path), prompt_template=own))
        assert isinstance(member, Member) and member.template(configured.config) == expected


def test_an_empty_template_is_none_and_one_that_yaml_takes_for_a_mapping_is_named() -> None:
    with pytest.raises(ValueError, match="at least 1 character"):
        AdapterEntry(bundle="x", prompt_template="")
    for section in ({"prompt_template": {"input": None}}, {"adapters": [{"bundle": "x", "prompt_template": {"a": 1}}]}):
        with pytest.raises(ValueError, match="is no text; put it in quotation marks"):
            config(Path("run"), **section)


def test_settings_that_came_later_leave_what_was_made_before_alone(run: Run) -> None:
    assert "prompt_template" not in run.config.model_dump()
    assert set(AdapterEntry(bundle="x").model_dump()) == {
        "bundle", "num_samples", "eval_data", "screen", "epochs", "learning_rate"
    }  # fmt: skip


def test_the_gate_asks_students_in_their_own_template(
    tmp_path: Path, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def run_gate(members: list[GateMember], **rest: object) -> tuple[dict[str, object], dict[str, str]]:
        asked.extend((member.template, member.teacher_template) for member in members)
        return {}, {member.name: "enough" for member in members}

    monkeypatch.setattr("translora.gate.phase.run_gate", run_gate)
    state = AdapterState(name="a", bundle="x", phase="gate", synthesis=SynthesisStats(screen="none"))
    state.artifacts = {"adapters/a/student": "d"}
    entry = AdapterEntry(bundle="x", prompt_template="Q: {input}\nA:")
    member = Member(bundle, state, tmp_path / "adapters/a", [], entry)
    member.directory.mkdir(parents=True, exist_ok=True)
    rows = [{"split": "heldout", "input": "send", "answer": "yes", "score": 0.5}]
    pq.write_table(pa.Table.from_pylist(rows), member.directory / "synthetic.parquet")
    gate_phase(run, [member])
    assert asked == [("Q: {input}\nA:", "chat")] and member.state.reason == "enough"


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        ({"score": -1.0, "answer": None}, "dropped {'refused': 40}); raise synthesis.max_generated_factor"),
        ({"score": 1.0, "answer": ""}, "dropped {'empty_answer': 40}); the adapter answers nothing to these inputs"),
        ({"score": 1.0, "answer": "yes"}, ""),
    ],
    ids=["all refused", "a silent teacher", "one answer to everything"],
)
def test_what_becomes_of_an_adapter_whose_samples_teach_nothing(
    tmp_path: Path,
    run: Run,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stand_in: dict[str, Any],
    reason: str,
) -> None:
    """Without a sample it is quarantined with the reason and a remedy; with one answer it goes on, with a warning."""

    def run_rows(label: str, rows: list[dict[str, Any]], *rest: object, **more: object) -> list[dict[str, Any]]:
        if "generate" in label:
            return [row | {"text": f"input {row['sample_id']}", "finished": True} for row in rows]
        return [row | {"finished": True} | stand_in for row in rows]

    monkeypatch.setattr("translora.synthesis.rounds.run_rows", run_rows)
    synthesis = SynthesisConfig(screen="none", max_generated_factor=2, seed_similarity=1, duplicate_similarity=1)
    settings = {"run_dir": tmp_path, "synthesis": synthesis, "gate": GateConfig(min_holdout=2)}
    run = dataclasses.replace(run, config=run.config.model_copy(update=settings))
    state = AdapterState(name="a", bundle="x", phase="synthesis", num_samples=16)
    member = Member(bundle, state, tmp_path / "adapters/a", [], AdapterEntry(bundle="x"))
    member.directory.mkdir(parents=True)
    synthesis_phase(run, [member])
    if reason:
        assert state.status == "quarantined" and "too few synthetic samples: 0 of 20 samples" in state.reason
        assert reason in state.reason and not (member.directory / "synthetic.parquet").exists()
    else:
        assert member.waits_for("distill") and len(member.samples("train")) == 16
        assert "answers 'yes' to all 20 samples" in caplog.text


@pytest.mark.parametrize("asked", ["auto", "discriminator"])
def test_a_discriminator_that_nearly_all_displeases_starves_an_adapter_only_where_its_verdict_was_asked_for(
    tmp_path: Path, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """`auto` takes the inputs that it finds likest to real ones, of each answer, however little it likes them."""

    def run_rows(label: str, rows: list[dict[str, Any]], *rest: object, **more: object) -> list[dict[str, Any]]:
        if "generate" in label:
            return [row | {"text": f"input {row['sample_id']}", "finished": True} for row in rows]
        return [row | outcome(row["screen"], row["sample_id"]) for row in rows]

    def outcome(screen: str, number: int) -> dict[str, Any]:
        score = 1.0 if number % 8 == 0 else -float(number)
        answer = None if screen == "discriminator" and score < 0 else ("yes", "no")[number % 2]
        return {"score": score, "answer": answer, "finished": True}

    monkeypatch.setattr("translora.synthesis.rounds.run_rows", run_rows)
    settings = {"max_generated_factor": 2, "seed_similarity": 1, "duplicate_similarity": 1, "surplus": 2}
    synthesis = SynthesisConfig.model_validate({"screen": asked} | settings)
    run = dataclasses.replace(
        run,
        config=run.config.model_copy(
            update={"run_dir": tmp_path, "synthesis": synthesis, "gate": GateConfig(min_holdout=4)}
        ),
    )
    state = AdapterState(name="a", bundle="x", phase="synthesis", num_samples=16)
    member = Member(bundle, state, tmp_path / "adapters/a", [], AdapterEntry(bundle="x"))
    member.directory.mkdir(parents=True)
    assert bundle.discriminator_dir is not None
    synthesis_phase(run, [member])
    if asked == "discriminator":
        assert state.status == "quarantined" and "5 of 20 samples when synthesis.max_generated_factor" in state.reason
        return
    assert member.waits_for("distill") and state.synthesis.screen == "realness" and state.synthesis.leaves_discriminator
    assert state.synthesis.accepted == 40 and state.synthesis.dropped == {"outranked": 20}
    kept = [row for split in ("train", "heldout") for row in member.samples(split)]
    assert sorted(row["sample_id"] for row in kept if row["answer"] == "no") == list(range(1, 20, 2))
    assert {row["sample_id"] for row in kept if row["score"] > 0} == {0, 8, 16, 24, 32}
    known, unseen = discriminator_inputs(run, member)
    assert unseen is None, "too few to measure one on"
    assert sorted(known.real) == sorted(row["input"] for row in kept if row["score"] > 0)
    assert len(known.invented) == 20
    run.send_back(member)
    synthesis_phase(run, [member])
    assert state.attempt == 2 and state.synthesis.generated == 80 and len(member.samples("train")) == 32
    assert state.synthesis.accepted == 80, "those of the first attempt are chosen from again"


def test_another_attempt_has_the_screen_of_the_first(
    tmp_path: Path, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` of another version may have taken another one, whose scores cannot be compared."""
    stats = SynthesisStats(screen="confidence", generated=20, accepted=20)
    state = AdapterState(name="a", bundle="x", phase="synthesis", num_samples=16, attempt=2, synthesis=stats)
    member = Member(bundle, state, tmp_path / "adapters/a", [], AdapterEntry(bundle="x"))
    member.directory.mkdir(parents=True)
    row = {"sample_id": 0, "input": "send box", "answer": "yes", "score": 0.5, "split": "train"}
    pq.write_table(pa.Table.from_pylist([row]), member.earlier_set)
    assert choose_screen(run.config.synthesis, bundle) == "realness" and make_pool(run, member).screen == "confidence"
    state.attempt = 1
    assert make_pool(run, member).screen == "realness"


def test_virtual_tokens_count_of_adapters_that_have_some(tmp_path: Path, run: Run, bundle: Bundle) -> None:
    """A LoRA's config may hold anything there: it is not read."""
    for count in ("16", 100_000, -500):
        own = Path(shutil.copytree(bundle.path, tmp_path / f"own{count}"))
        change_json(own / "adapter_config.json", num_virtual_tokens=count)
        rehash(own)
        found = verify(run, "a", AdapterEntry(bundle=str(own)))
        assert isinstance(found, Member), found.reason


def test_merges_of_parts_that_are_prompted_in_two_ways_are_warned_of(
    tmp_path: Path, run: Run, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    merge = {"name": "desk", "when": "after", "method": "linear", "adapters": ["a", "b"]}
    merging = config(Path("run"), source=run.config.source, target=run.config.target, merges=[merge])

    def member(name: str, template: str | None) -> Member:
        entry = AdapterEntry(bundle="x", prompt_template=template)
        return Member(bundle, AdapterState(name=name, bundle="x"), tmp_path / name, [], entry)

    warn_of_templates(merging, [member("a", None), member("b", "chat")])
    assert not caplog.messages, "auto is chat where there is a chat template"
    warn_of_templates(merging, [member("a", None), member("b", "Q: {input}")])
    assert "desk: cannot be merged after the migration, its parts will have different" in caplog.text


def test_a_template_that_the_target_cannot_have_costs_its_adapter_alone(run: Run, bundle: Bundle) -> None:
    for template, reason in (
        ("Question:", "prompt template 'Question:' lacks {input}"),
        ("{input}" + " a" * 4000, "distill.max_length is 1024; raise it, or shorten the template"),
    ):
        state = verify(run, "a", AdapterEntry(bundle=str(bundle.path), prompt_template=template))
        assert isinstance(state, AdapterState) and state.status == "quarantined" and reason in state.reason


def test_a_teacher_without_ends_is_asked_for_none(run: Run, bundle: Bundle) -> None:
    part = run.config.distill.model_copy(update={"loss": "kl"})
    asking = dataclasses.replace(run, config=run.config.model_copy(update={"distill": part}))
    state = verify(asking, "a", AdapterEntry(bundle=str(bundle.path), stop="END"))
    assert isinstance(state, AdapterState) and "does not end its answers" in state.reason


def test_seeds_and_real_inputs_that_have_no_room_are_refused_with_the_setting(
    tmp_path: Path, run: Run, bundle: Bundle
) -> None:
    entry = AdapterEntry(bundle=str(bundle.path))
    short = run.config.synthesis.model_copy(update={"sampling": SamplingConfig(max_new_tokens=2)})
    state = verify(dataclasses.replace(run, config=run.config.model_copy(update={"synthesis": short})), "a", entry)
    assert isinstance(state, AdapterState) and state.status == "quarantined"
    assert re.search(
        r"seeds have \d+ tokens and more, .* of more than 2 are cut off .*; raise .*max_new_tokens", state.reason
    )
    rows = [{"input": "send box 1", "target": "yes"}, {"input": "send box 2 " * 3000, "target": "no"}]
    write_jsonl(tmp_path / "eval.jsonl", rows[:1])
    assert isinstance(verify(run, "a", entry.model_copy(update={"eval_data": str(tmp_path / "eval.jsonl")})), Member)
    write_jsonl(tmp_path / "eval.jsonl", rows)
    state = verify(run, "a", entry.model_copy(update={"eval_data": str(tmp_path / "eval.jsonl")}))
    assert isinstance(state, AdapterState) and state.status == "quarantined"
    assert re.search(r"eval\.jsonl: 1 of its inputs make prompts of up to \d+ tokens, .*; leave them out", state.reason)


def test_a_second_attempt_begins_anew_when_its_samples_are_touched(
    tmp_path: Path, run: Run, bundle: Bundle, migrated: AdapterState
) -> None:
    first = tmp_path / "adapters/a/synthetic-1.parquet"
    first.write_text("first")
    artifacts = {"adapters/a/synthetic-1.parquet": sha256_path(first)}
    again = {"attempt": 2, "phase": "synthesis", "status": "pending", "artifacts": artifacts}
    save_state(tmp_path, migrated.model_copy(update=again))
    entry = AdapterEntry(bundle=str(bundle.path))
    assert found(run, entry).attempt == 2
    changed = run.config.model_copy(update={"seed": 1})
    assert found(dataclasses.replace(run, config=changed), entry).attempt == 1


def test_a_state_of_an_older_version_is_kept(tmp_path: Path, run: Run, bundle: Bundle, migrated: AdapterState) -> None:
    save_state(tmp_path, migrated.model_copy(update={"recipes": {}}))
    kept = found(run, AdapterEntry(bundle=str(bundle.path)))
    assert kept == migrated.model_copy(update={"bundle": str(bundle.path), "spending": kept.spending})


def test_a_sealed_adapter_is_not_read_again_until_a_file_or_a_setting_changes(
    tmp_path: Path, run: Run, bundle: Bundle, migrated: AdapterState
) -> None:
    own = tmp_path / "given/a"
    shutil.copytree(bundle.path, own)
    entries = {"a": AdapterEntry(bundle=str(own))}
    bases = Bases(run.source, run.target, run.generator)

    def look_again(run: Run = run) -> Member | AdapterState:
        return verify_fleet(run, entries, Seals(tmp_path, run.config, bases), {})["a"]

    assert isinstance(look_again(), Member), "the first time everything is hashed"
    assert isinstance(look_again(), AdapterState)
    write_json(tmp_path / "cohort-gate.json", ["a"])
    assert isinstance(look_again(), Member), "a killed run's cohort is completed with all of its members"
    for damaged in ("", "{}", "[1]"):
        (tmp_path / "cohort-gate.json").write_text(damaged)
        assert isinstance(look_again(), AdapterState), "a damaged one is nobody's"
    (tmp_path / "cohort-gate.json").unlink()
    changed = run.config.model_copy(update={"seed": 1})
    for path in (own / "adapter_model.safetensors", tmp_path / "adapters/a/student/w"):
        os.utime(path, (0, 0))
        assert isinstance(look_again(), Member), path
        assert isinstance(look_again(), AdapterState)
    seals = Seals(tmp_path, run.config, bases)
    member = verify_fleet(run, entries, seals, {})["a"]
    if isinstance(member, AdapterState):  # it was sealed: have it read once more
        (tmp_path / "seals.json").unlink()
        member = verify_fleet(run, entries, seals := Seals(tmp_path, run.config, bases), {})["a"]
    assert isinstance(member, Member)
    (own / "adapter_model.safetensors").write_bytes(b"damaged")  # while the run is on
    seals.put(member.entry, member.state, member.looked)
    seals.save()
    state = look_again()
    assert isinstance(state, AdapterState) and state.status == "quarantined"
    shutil.copytree(bundle.path, own, dirs_exist_ok=True)
    assert isinstance(look_again(dataclasses.replace(run, config=changed)), Member)


def test_a_state_that_cannot_be_read_is_not_written_over_when_its_bundle_cannot_be_had(
    tmp_path: Path, run: Run
) -> None:
    path = tmp_path / "adapters/a/state.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"of a newer version": true}')
    state = refused(run, "a", AdapterEntry(bundle="memory://gone"), "unreachable")
    assert (state.status, state.reason) == ("quarantined", "unreachable")
    assert path.read_text() == '{"of a newer version": true}'


def test_a_file_that_is_damaged_in_the_middle_of_a_run_is_made_anew_a_few_times(
    tmp_path: Path, run: Run, bundle: Bundle, finished: AdapterState
) -> None:
    judged = {"phase": "gate", "status": "pending", "num_samples": 4, "bundle_digest": "d"}
    artifacts = {name: value for name, value in finished.artifacts.items() if name.startswith("adapters/")}
    state = finished.model_copy(update=judged | {"artifacts": artifacts})
    member = Member(bundle, state.model_copy(deep=True), tmp_path / "adapters/a", [], AdapterEntry(bundle="x"))
    assert run.is_whole(member) and member.waits_for("gate")
    for _ in range(2):
        (tmp_path / "adapters/a/synthetic.parquet").write_text("damaged")
        assert not run.is_whole(member)
        assert member.waits_for("synthesis") and load_state(tmp_path, "a") == member.state
        (tmp_path / "adapters/a/synthetic.parquet").write_text("adapters/a/synthetic.parquet")
        member.state = state.model_copy(deep=True)
        for kind in ("student", "discriminator"):
            (tmp_path / "adapters/a" / kind).mkdir(exist_ok=True)
            (tmp_path / "adapters/a" / kind / "w").write_text(f"adapters/a/{kind}")
    (tmp_path / "adapters/a/student/w").unlink()
    assert not run.is_whole(member)
    assert member.state.status == "quarantined"
    assert member.state.reason.endswith("adapters/a/student: damaged, 2 times made anew; check the file system")


def test_target_modules_are_linear_modules_of_the_target_base(run: Run) -> None:
    bases = {"source": run.config.source, "target": run.config.target}
    for names in (["embed_tokens"], ["lm_head"], ["q_proj", "qproj"]):
        settings = config(Path("run"), **bases, distill={"lora": {"target_modules": names}})
        with pytest.raises(ValueError, match=f"target_modules: {names[-1]} not in base; it has ") as fault:
            check_training(settings, run.source, run.target)
        assert "embed_tokens" not in str(fault.value).partition("it has")[2]
    virtual = {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4000}}
    with pytest.raises(ValueError, match=r"do not fit its context of .* or max_answer_tokens, or num_virtual_tokens"):
        check_training(config(Path("run"), **bases, distill=virtual), run.source, run.target)
    fits = config(Path("run"), **bases, distill={"lora": {"target_modules": ["q_proj", "down_proj"]}})
    check_training(fits, run.source, run.target)


def test_vllm_is_refused_where_it_cannot_compute(run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = {"source": run.config.source.model_dump() | {"vllm": {}}, "target": run.config.target.model_dump()}
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ValueError, match=r"asks for vllm, which is not installed; pip install '\.\[vllm\]'"):
            check_training(config(Path("run"), **bases), run.source, run.target)
    monkeypatch.setattr("translora.run.check.check_engine", lambda base: None)
    check_training(config(Path("run"), **bases), run.source, run.target)
    bases["target"]["vllm"] = {}
    tuning = {"peft": {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}}
    with pytest.raises(ValueError, match=r"target.vllm: vLLM computes LoRAs alone; leave it out, or distill.peft"):
        check_training(config(Path("run"), **bases, distill=tuning), run.source, run.target)
    short = run.config.source.model_copy(update={"vllm": {"max_model_len": 100}})
    run = dataclasses.replace(run, config=run.config.model_copy(update={"source": short}))
    state = verify(run, "a", AdapterEntry(bundle=str(bundle.path)))
    assert isinstance(state, AdapterState) and "the source base's context is 100" in state.reason


def test_a_base_without_vllm_decides_as_before_there_was_any(run: Run) -> None:
    settings = run.config.source
    assert settings.decides() == settings.model_dump(exclude={"vllm"})


def test_settings_of_vllm_that_change_no_result_do_nothing_again(run: Run, bundle: Bundle) -> None:
    def found(**vllm: object) -> dict[Phase, str]:
        bases = {name: run.config.source.model_copy(update={"vllm": vllm or None}) for name in ("source", "target")}
        own = dataclasses.replace(run, config=run.config.model_copy(update=bases))
        return recipes_of(own, AdapterEntry(bundle="x"), bundle)

    plain, small = found(), found(gpu_memory_utilization=0.5)
    assert small == found(gpu_memory_utilization=0.4, enforce_eager=True)
    assert small["distill"] == plain["distill"] and small["synthesis"] != plain["synthesis"]
    assert found(quantization="fp8")["gate"] != small["gate"]


def test_globs_are_expanded_and_twice_the_same_name_is_refused(tmp_path: Path) -> None:
    for path in ("one/a", "one/b", "two/a"):
        (tmp_path / path).mkdir(parents=True)
    found = entries_of([AdapterEntry(bundle=f"{tmp_path}/one/*", num_samples=7)])
    assert {name: entry.num_samples for name, entry in found.items()} == {"a": 7, "b": 7}
    explicit = entries_of(
        [AdapterEntry(bundle=f"{tmp_path}/one/*"), AdapterEntry(bundle=f"{tmp_path}/one/a", num_samples=3)]
    )
    assert explicit["a"].num_samples == 3, "a later entry overrides the glob's"
    turned = entries_of(
        [AdapterEntry(bundle=f"{tmp_path}/one/a", num_samples=3), AdapterEntry(bundle=f"{tmp_path}/one/*")]
    )
    assert turned["a"].num_samples == 3, "in any order"
    with pytest.raises(ValueError, match="are both named a; rename one directory"):
        entries_of([AdapterEntry(bundle=f"{tmp_path}/one/a"), AdapterEntry(bundle=f"{tmp_path}/two/a")])
    with pytest.raises(ValueError, match="matches no directory"):
        entries_of([AdapterEntry(bundle=f"{tmp_path}/none/*")])
    empty = entries_of([AdapterEntry(bundle=f"{tmp_path}/none/*"), AdapterEntry(bundle=f"{tmp_path}/one/*")])
    assert empty.keys() == {"a", "b"}, "a tenant without bundles stops nobody"


def test_a_name_that_two_globs_find_is_the_first_ones(tmp_path: Path, run: Run, bundle: Bundle) -> None:
    """And of an entry of its own, in any order; the other bundle is quarantined with the reason."""
    paths = [shutil.copytree(bundle.path, tmp_path / tenant / "a") for tenant in ("one", "two")]
    both, second = AdapterEntry(bundle=f"{tmp_path}/*/a"), AdapterEntry(bundle=str(paths[1]))
    for entries, owner in (([both], 0), ([both, second], 1), ([second, both], 1)):
        found, faults = expand_entries(entries)
        assert len(found) == 2 and found["a"].bundle == str(paths[owner])
        (other,) = found.keys() - {"a"}
        assert faults.keys() == {other} and other.startswith("a-") and found[other].bundle == str(paths[1 - owner])
    seals = Seals(tmp_path, run.config, (run.source, run.target, run.generator))
    verified = verify_fleet(run, found, seals, faults)
    assert isinstance(verified["a"], Member)
    refusal = verified[other]
    assert isinstance(refusal, AdapterState) and refusal.status == "quarantined"
    assert "one/a: another bundle of the fleet has its name; rename one directory" in refusal.reason


def test_a_bundle_is_one_however_it_is_spelled_and_two_without_a_usable_name_are_two(tmp_path: Path) -> None:
    for path in ("one/a", "one/~x", "two/~x"):
        (tmp_path / path).mkdir(parents=True)
    both = [AdapterEntry(bundle=f"{tmp_path}/one/a/"), AdapterEntry(bundle=f"{tmp_path}/one/a")]
    assert entries_of(both).keys() == {"a"}
    found, faults = expand_entries([AdapterEntry(bundle=f"{tmp_path}/*/?x")])
    assert len(found) == 2 and all(name.startswith("unnamed-") for name in found)
    assert faults.keys() == found.keys() and all("rename it" in fault for fault in faults.values())


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    rows = [{"input": "a"}, {"input": "b"}]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows))
    assert read_jsonl(tmp_path / "rows.jsonl", required=("input",)) == rows


def test_a_fleet_file_may_lie_in_a_directory_with_brackets(tmp_path: Path) -> None:
    here = tmp_path / "br[1]"
    (here / "bundles/a").mkdir(parents=True)
    for entry in ("bundles/*", "bundles/a"):
        raw = {"run_dir": "run", "source": {"model": "a"}, "target": {"model": "b"}, "adapters": [entry]}
        write_json(here / "fleet.yaml", raw)
        found = entries_of(load_config(here / "fleet.yaml", FleetConfig).adapters)
        assert {name: found[name].bundle for name in found} == {"a": str(here / "bundles/a")}


def test_a_ds_config_is_found_beside_the_file_that_names_it(tmp_path: Path) -> None:
    raw = {"run_dir": "run", "source": {"model": "a"}, "target": {"model": "b"}, "adapters": ["x"]}
    (tmp_path / "my").mkdir()
    (tmp_path / "my/zero3.json").write_text("{}")
    for given, found in (("my/zero3.json", str(tmp_path / "my/zero3.json")), ("zero3.json", "zero3.json")):
        write_json(tmp_path / "fleet.yaml", raw | {"distill": {"ds_config": given}})
        assert load_config(tmp_path / "fleet.yaml", FleetConfig).distill.ds_config == found


def test_jsonl_faults_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"input": "a", "target": "b"}) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: not JSON"):
        read_jsonl(path, required=("input", "target"))
    write_json(path, {"input": ""})
    with pytest.raises(ValueError, match=r"data\.jsonl"):
        read_jsonl(path, required=("input",))


def refusing_member(tmp_path: Path, bundle: Bundle, screen: str, refused: int) -> Member:
    """An adapter that waits for its student, whose screen refused so many inputs."""
    stats = SynthesisStats(screen=screen, dropped={"refused": refused}, num_train=60)
    state = AdapterState(name="a", bundle="x", task_name="boxes", phase="distill", synthesis=stats)
    entry = AdapterEntry(bundle="x", prompt_template="Q: {input}\nA:")
    member = Member(bundle, state, tmp_path / "adapters/a", [], entry)
    member.directory.mkdir(parents=True, exist_ok=True)
    split = ["train"] * 60 + ["heldout"] * 20 + ["refused"] * refused
    rows = [
        {"split": kind, "input": f"send box {index}", "answer": "yes", "score": 1.0 if kind != "refused" else -1.0}
        for index, kind in enumerate(split)
    ]
    pq.write_table(pa.Table.from_pylist(rows), member.directory / "synthetic.parquet")
    return member


@pytest.mark.parametrize(
    ("screen", "refused", "left"),
    [("discriminator", 80, True), ("realness", 80, True), ("excess", 80, True), ("confidence", 0, False)],
)
def test_a_discriminator_is_trained_where_a_score_speaks_against_inputs(
    tmp_path: Path, run: Run, bundle: Bundle, screen: str, refused: int, left: bool
) -> None:
    """Confidence speaks against none: there would be nothing to learn the difference from."""
    member = refusing_member(tmp_path, bundle, screen, refused)
    jobs = train_jobs(run, member, None)
    assert [job.name for job in jobs] == ["a/student", "a/discriminator"][: 1 + left]
    assert (member.directory / "train/discriminator").exists() is left
    assert {job.template for job in jobs} == {"Q: {input}\nA:"}
    if left:
        assert {judge.template for judge in judges(run, [member]).values()} == {"Q: {input}\nA:"}


def test_a_discriminator_learns_from_the_inputs_whose_score_and_fate_agree(
    tmp_path: Path, run: Run, bundle: Bundle
) -> None:
    """Realness keeps the likest, which may be unlike real ones all the same, and leaves out what found no room."""
    member = refusing_member(tmp_path, bundle, "realness", 80)
    rows = [
        {"split": split, "input": f"{split} box {index} {score}", "answer": "yes", "score": score}
        for split in ("train", "heldout", "refused")
        for score in (1.0, -1.0)
        for index in range(50)
    ]
    pq.write_table(pa.Table.from_pylist(rows), member.directory / "synthetic.parquet")
    known, unseen = discriminator_inputs(run, member)
    assert unseen is not None
    real, invented = ({*getattr(known, kind), *getattr(unseen, kind)} for kind in ("real", "invented"))
    assert real == {row["input"] for row in rows if row["split"] != "refused" and row["score"] > 0}
    assert invented == {row["input"] for row in rows if row["split"] == "refused" and row["score"] < 0}
    pq.write_table(
        pa.Table.from_pylist([row for row in rows if row["score"] < 0]), member.directory / "synthetic.parquet"
    )
    assert [job.name for job in train_jobs(run, member, None)] == ["a/student"], "nothing to learn a yes from"


def test_a_student_is_not_lost_with_its_discriminator(
    tmp_path: Path, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is for a later migration, and may fail for reasons of its own."""
    member = refusing_member(tmp_path, bundle, "discriminator", 80)

    def train(settings: object, base: str, jobs: Sequence[TrainJob], *_: object, **__: object) -> None:
        for job in jobs:
            if job.kind == DISCRIMINATOR:
                write_json(Path(job.work_dir) / FAILURE, {"reason": "loss was not finite"})
            else:
                write_json(Path(job.output) / "losses.json", [0.5])

    monkeypatch.setattr("translora.distill.phase.train_adapters", train)
    distill_phase(run, [member])
    assert member.waits_for("gate") and not member.state.has_discriminator
    assert list(member.state.artifacts) == ["adapters/a/student"]
    assert [*remarks(member.state)] == [
        "the discriminator for the next hop could not be trained (loss was not finite): it is left out"
    ]
    member.state.phase = "distill"
    monkeypatch.setattr(TrainJob, "failure", lambda job: None)
    (member.directory / DISCRIMINATOR).mkdir()
    distill_phase(run, [member])
    assert member.state.has_discriminator and remarks(member.state) == []


def test_what_a_training_of_before_failed_of_is_forgotten(
    tmp_path: Path, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discriminator that could not be trained costs nobody anything once none is asked for."""

    def train(base: object, name: str, jobs: list[TrainJob], *rest: object, **more: object) -> None:
        for job in jobs:
            write_json(Path(job.output) / "losses.json", [1.0, 0.5])

    state = AdapterState(name="a", bundle="x", phase="distill", synthesis=SynthesisStats(screen="confidence"))
    member = Member(bundle, state, tmp_path / "adapters/a", [], AdapterEntry(bundle="x"))
    member.directory.mkdir(parents=True, exist_ok=True)
    rows = [{"split": "train", "input": "send", "answer": "yes", "score": 0.5}]
    pq.write_table(pa.Table.from_pylist(rows), member.directory / "synthetic.parquet")
    for kind in ("student", "discriminator"):
        write_json(member.directory / "train" / kind / "failure.json", {"reason": "of the run before"})
    monkeypatch.setattr("translora.distill.phase.train_adapters", train)
    distill_phase(run, [member])
    assert member.state.status == "pending" and member.waits_for("gate") and member.state.losses == [1.0, 0.5]
    assert list(member.state.artifacts) == ["adapters/a/student"]


@pytest.mark.parametrize(
    ("targets", "warning"),
    [
        (["q_proj", "v_proj"], ""),
        (["q_proj"], "a: adapts v_proj, which distill.lora.target_modules does not: its student begins without these"),
        (["down_proj"], "a: adapts none of the student's modules: its student begins without it"),
    ],
)
def test_a_warm_start_says_what_it_does_not_copy(
    tmp_path: Path, run: Run, bundle: Bundle, caplog: pytest.LogCaptureFixture, targets: list[str], warning: str
) -> None:
    state = AdapterState(name="a", bundle=str(bundle.path))
    member = Member(bundle, state, tmp_path / "adapters/a", [], AdapterEntry(bundle=str(bundle.path)))
    assert warm_start(run, member) is None and not caplog.messages, "by default there is none"
    settings = TrainConfig.model_validate({"warm_start": True, "lora": {"target_modules": targets}})
    warm = dataclasses.replace(run, config=run.config.model_copy(update={"distill": settings}))
    check_training(warm.config, warm.source, warm.target)
    assert warm_start(warm, member) == (None if "none of" in warning else bundle.path)
    assert caplog.messages == ([warning] if warning else [])


@pytest.mark.parametrize(
    ("lora", "num_samples", "fits"),
    [
        ({"chain": {"links": 7}}, 16, False),
        ({"chain": {"links": 2}}, 16, True),
        ({"chain": {"links": 2}, "init": "eva"}, 16, False),
        ({"chain": {"links": 2}, "init": "eva"}, 24, True),
        ({"init": "eva"}, 8, True),
    ],
)
def test_a_chain_of_more_links_than_steps_is_refused_before_the_synthesis(
    run: Run, bundle: Bundle, lora: dict[str, object], num_samples: int, fits: bool
) -> None:
    settings = TrainConfig.model_validate({"lora": lora, "epochs": 1, "batch_size": 8})
    chained = dataclasses.replace(run, config=run.config.model_copy(update={"distill": settings}))
    found = verify(chained, "a", AdapterEntry(bundle=str(bundle.path), num_samples=num_samples))
    state = found.state if isinstance(found, Member) else found
    assert (state.status == "pending") is fits, state.reason
    assert fits or "lower lora.chain.links, or raise epochs" in state.reason
