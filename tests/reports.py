"""States and run directories as a migration leaves them, for tests of what is reported."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from translora.run.state import Accuracy, AdapterState, GateResult, SynthesisStats, save_state

HOSTILE = "<script>alert('x')</script> | a\nb"


def migrated(name: str = "routing") -> AdapterState:
    return AdapterState(
        name=name,
        bundle=f"bundles/{name}",
        task_name="tickets",
        phase="done",
        status="migrated",
        num_samples=120,
        synthesis=SynthesisStats(
            rounds=3, generated=200, accepted=144, needed=144, dropped={"refused": 50, "duplicate": 6}
        ),
        step=40,
        num_steps=40,
        losses=[2.0 / step for step in range(1, 41)],
        gate=GateResult(num_heldout=24, agreement_student=0.875, agreement_base=0.125, passed=True),
        accuracy=Accuracy(num_items=50, source_base=0.1, source_adapter=0.9, target_base=0.2, migrated=0.84),
        seconds={"synthesis": 61.7},
        output=f"bundles/{name}",
    )


def states() -> list[AdapterState]:
    """One adapter of every status."""
    failed = migrated("tone").model_copy(
        update={"status": "failed_gate", "reason": "agreement 0.40 is below 0.60", "accuracy": None}
    )
    broken = AdapterState(name="old", bundle="bundles/old", status="quarantined", reason=f"old: {HOSTILE}")
    waiting = AdapterState(name="later", bundle="bundles/later", phase="synthesis")
    return [migrated(), failed, broken, waiting]


def full_stats() -> SynthesisStats:
    """Counts with every field that a newer run fills."""
    return migrated().synthesis.model_copy(
        update={
            "screen": "discriminator",
            "distinct": {"distinct-1": 0.314, "distinct-2": 0.728},
            "classes": {"billing": 70, "shipping": 50, "refund": 24},
            "warning": "two answers of three are billing",
        }
    )


def fleet() -> list[AdapterState]:
    """Six adapters: four that migrated, one that failed the gate, one in quarantine; all fields filled."""
    rng = random.Random(3)
    found = []
    for name, samples, source, moved, bare in (
        ("contract-clauses", 250, 0.86, 0.88, 0.41),
        ("intent-banking", 120, 0.93, 0.9, 0.12),
        ("name-badge", 32, 0.98, 0.9, 0.0),
        ("review-weather", 48, 0.97, 0.96, 0.22),
        ("ticket-routing", 1200, 0.74, 0.37, 0.3),
    ):
        state = migrated(name)
        state.task_name, state.num_samples, state.bundle_digest = name, samples, f"{samples:064x}"
        state.synthesis = full_stats().model_copy(update={"needed": samples + 24, "accepted": samples + 24})
        state.synthesis.generated = round((samples + 24) * 1.7)
        state.losses = [3 / (1 + step / 8) + rng.uniform(0, 0.3) for step in range(90)]
        state.gate = GateResult(
            num_heldout=24,
            agreement_student=moved,
            agreement_base=bare / 2,
            passed=True,
            loglik_student=-0.31,
            loglik_base=-2.4,
        )
        state.accuracy = Accuracy(
            num_items=50, source_base=bare / 3, source_adapter=source, target_base=bare, migrated=moved
        )
        if name != "intent-banking":
            state.synthesis.warning = ""
        found.append(state)
    failed = found[-1]
    failed.status, failed.output = "failed_gate", ""
    failed.reason = "agreement 0.37 with the teacher is below gate.min_agreement 0.60"
    broken = AdapterState(
        name="tone-of-voice",
        bundle="bundles/tone-of-voice",
        status="quarantined",
        reason="bundles/tone-of-voice/adapter_model.safetensors: truncated; restore the bundle from its source",
    )
    return [*found, broken]


def make_run(path: Path, adapters: list[AdapterState]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"source": {"model": "/m/old"}, "target": {"model": "org/new"}}))
    for state in adapters:
        save_state(path, state)
    return path


def write_rows(run_dir: Path, name: str, rows: list[dict[str, object]]) -> None:
    types = {"sample_id": pa.int64(), "score": pa.float64()}
    names = ("adapter", "sample_id", "input", "answer", "score", "split")
    schema = pa.schema([(column, types.get(column, pa.string())) for column in names])
    table = pa.Table.from_pylist([{"adapter": name, **row} for row in rows], schema)
    pq.write_table(table, run_dir / "adapters" / name / "synthetic.parquet")


def write_synthetic(run_dir: Path, name: str, score: float | None = 1.5) -> None:
    """Seven kept samples with this screen score, and, where there was a screen, a refused one."""
    splits = ["train"] * 6 + ["heldout"]
    rows: list[dict[str, object]] = [
        {"sample_id": index, "input": f"{HOSTILE} {index}", "answer": "billing", "score": score, "split": split}
        for index, split in enumerate(splits)
    ]
    if score is not None:
        rows.append({"sample_id": 90, "input": "cats", "answer": None, "score": -2.0, "split": "refused"})
    write_rows(run_dir, name, rows)


def write_many(run_dir: Path, name: str, seed: int, count: int = 300) -> None:
    """A synthetic set whose scores are spread as a discriminator's are."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for index in range(count):
        score = rng.gauss(3, 2)
        kept = score > 0
        split = ("heldout" if index % 6 == 0 else "train") if kept else "refused"
        text = f"My parcel {rng.randrange(10_000)} has not arrived and I was charged twice, who can help me?"
        answer = rng.choice(("billing", "shipping", "refund")) if kept else None
        rows.append({"sample_id": index, "input": text, "answer": answer, "score": score, "split": split})
    write_rows(run_dir, name, rows)
