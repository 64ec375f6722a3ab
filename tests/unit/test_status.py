"""`translora status`: text and JSON, while the run goes on, and quickly for a large fleet."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from translora.run.state import AdapterState, GateResult, SynthesisStats, save_state
from translora.run.status import render_status


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def in_distill(name: str, run_dir: Path, log: str) -> AdapterState:
    state = AdapterState(
        name=name,
        bundle=f"bundles/{name}",
        phase="distill",
        num_samples=120,
        synthesis=SynthesisStats(rounds=2, generated=180, accepted=144, needed=144),
        step=50,
        num_steps=300,
    )
    save_state(run_dir, state)
    path = run_dir / "adapters" / name / "train" / "student" / "train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(log)
    return state


def test_a_run_without_adapters_yet(run_dir: Path) -> None:
    assert "no adapter has been started yet" in render_status(run_dir)
    assert json.loads(render_status(run_dir, as_json=True))["adapters"] == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run directory"):
        render_status(tmp_path / "nowhere")


def test_training_is_followed_from_its_own_log(run_dir: Path) -> None:
    in_distill(
        "routing",
        run_dir,
        '{"step": 62, "num_steps": 300, "loss": 0.9}\n{"step": 63, "num_steps": 300, "loss": 0.8}\n{"st',
    )
    row = json.loads(render_status(run_dir, as_json=True))["adapters"][0]
    assert (row["step"], row["num_steps"], row["last_loss"]) == (63, 300, 0.8)
    text = render_status(run_dir)
    assert "63/300" in text and "0.800" in text and "144/144" in text and "80%" in text


@pytest.mark.parametrize("log", ["", "{", "[1]\n", "not json\n"])
def test_a_log_without_a_whole_line_falls_back_to_the_state(run_dir: Path, log: str) -> None:
    in_distill("routing", run_dir, log)
    row = json.loads(render_status(run_dir, as_json=True))["adapters"][0]
    assert (row["step"], row["num_steps"], row["last_loss"]) == (50, 300, None)


def test_what_failed_is_listed_with_its_reason(run_dir: Path) -> None:
    reason = "bundles/old/adapter_model.safetensors: truncated or not safetensors; copy the file again, " * 3
    save_state(run_dir, AdapterState(name="old", bundle="bundles/old", status="quarantined", reason=reason))
    gate = GateResult(num_heldout=10, agreement_student=0.5, agreement_base=0.4, passed=False)
    failed = AdapterState(
        name="tone",
        bundle="bundles/tone",
        status="failed_gate",
        phase="done",
        losses=[1.5, 0.25],
        gate=gate,
        reason="too low",
    )
    save_state(run_dir, failed)
    text = render_status(run_dir)
    assert f"old: quarantined: {reason}" in text and "tone: failed gate: too low" in text
    assert "40% → 50% (+10)" in text and "0.250" in text
    value = json.loads(render_status(run_dir, as_json=True))
    assert value["statuses"] == {"quarantined": 1, "failed_gate": 1} and value["phases"] == {"verify": 1, "done": 1}
    assert value["adapters"][1]["gate"]["num_heldout"] == 10


def test_a_thousand_adapters_take_seconds(run_dir: Path) -> None:
    for index in range(1000):
        save_state(run_dir, AdapterState(name=f"client-{index:04d}", bundle="b", losses=[0.5] * 300, status="migrated"))
    start = time.monotonic()
    text = render_status(run_dir)
    assert time.monotonic() - start < 20
    assert text.count("client-") == 1000 and "1000 of 1000 migrated" in text
