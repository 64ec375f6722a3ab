"""RUN/report.html: one self-contained page on a run. No network, no external script, light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from translora import __version__
from translora.report.charts import histogram, loss_curve, scatter
from translora.report.table import (
    ACCURACY_FIELDS,
    AGREEMENT_FIELDS,
    MISSING,
    STATUS_WORDS,
    accepted_text,
    agreement_interval,
    chance_text,
    informedness_text,
    interval,
    loglik_text,
    note,
    percent,
    remarks,
    status_text,
    summary,
)
from translora.report.templates import environment
from translora.run.files import read_object, write_bytes
from translora.run.state import BY_DISCRIMINATOR, AdapterState, load_states, was_refused

REPORT_FILE = "report.html"
NUM_KEPT, NUM_REFUSED = 4, 2
"""Examples shown of each adapter's synthetic set."""
_MOST_TEXT = 600
_OPEN_SECTIONS = 12
"""A fleet larger than this is shown with its sections closed."""


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the states of a run, finished or not, and return its path.

    Raises:
        InputError: `run_dir` is not a run directory.
    """
    run_dir = Path(run_dir)
    states = load_states(run_dir)
    templates = environment(autoescape=True)
    templates.filters["percent"] = percent
    page = templates.get_template("template.html.j2").render(
        title=run_dir.resolve().name,
        version=__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        summary=summary(states),
        sections_open=len(states) <= _OPEN_SECTIONS,
        with_accuracy=any(state.accuracy for state in states),
        scatter=scatter(states),
        adapters=[describe(run_dir, state) for state in states],
        missing=MISSING,
        **_run_facts(run_dir, states),
    )
    path = run_dir / REPORT_FILE
    write_bytes(path, page.encode())
    return path


def _run_facts(run_dir: Path, states: Sequence[AdapterState]) -> dict[str, Any]:
    """What the head and the foot of the page say: bases, tiles, config and versions."""
    config = read_object(run_dir / "config.json")
    gates = [state.gate for state in states if state.gate]
    counts = {status: sum(state.status == status for state in states) for status in STATUS_WORDS}
    tiles = [(word, counts[status], status) for status, word in STATUS_WORDS.items() if counts[status]]
    agreements = []
    for unit in ("answers", "tokens"):
        if own := [gate for gate in gates if gate.unit == unit]:
            before, after = (fmean(getattr(gate, field) for gate in own) for field in AGREEMENT_FIELDS)
            agreements.append((f"{percent(before)} → {percent(after)}", unit))
    return {
        "source": _model_name(config, "source"),
        "target": _model_name(config, "target"),
        "tiles": tiles,
        "agreements": agreements,
        "config": json.dumps(config, indent=2, ensure_ascii=False),
        "versions": read_object(run_dir / "versions.json"),
    }


def _model_name(config: dict[str, Any], role: str) -> str:
    model = (config.get(role) or {}).get("model") or MISSING
    return str(model).rstrip("/").rsplit("/", 1)[-1] if str(model).startswith(("/", ".", "~")) else str(model)


def describe(run_dir: Path, state: AdapterState) -> dict[str, Any]:
    """What the page shows of one adapter; parts that do not exist yet are None or empty."""
    stats, gate, accuracy = state.synthesis, state.gate, state.accuracy
    rows = read_samples(run_dir / "adapters" / state.name / "synthetic.parquet")
    kept = [row for row in rows if row["split"] != "refused"]
    left_out = [row | {"split": why_left_out(row, stats.screen)} for row in rows if row["split"] == "refused"]
    flow = [("kept", stats.accepted - stats.dropped.get("outranked", 0), "good")] if stats.generated else []
    flow += [(reason.replace("_", " "), count, "bad") for reason, count in sorted(stats.dropped.items(), key=_falling)]
    return {
        "state": state,
        "status": status_text(state),
        "accepted": accepted_text(state),
        "acceptance": stats.acceptance if stats.generated else None,
        "interval": agreement_interval(gate) if gate else "",
        "note": note(state),
        "remarks": [text for text in remarks(state) if text not in state.reason],
        "flow": flow,
        "flow_most": max((count for _, count, _ in flow), default=1) or 1,
        "distinct": ", ".join(f"{name} {share:.2f}" for name, share in sorted(stats.distinct.items())),
        "classes": sorted(stats.classes.items(), key=_falling),
        "agreement": [("target base", gate.agreement_base), ("migrated", gate.agreement_student)] if gate else [],
        "chance": chance_text(gate) if gate else "",
        "informedness": informedness_text(gate) if gate else "",
        "loglik": loglik_text(gate) if gate else "",
        "accuracy_interval": interval(accuracy.migrated, accuracy.num_items) if accuracy else "",
        "accuracy": [(field.replace("_", " "), getattr(accuracy, field)) for field in ACCURACY_FIELDS if accuracy],
        "curve": loss_curve(state.losses),
        "scores": histogram([row["score"] for row in kept], [row["score"] for row in left_out]),
        "score_name": "log-odds" if stats.screen in BY_DISCRIMINATOR or not stats.screen else stats.screen,
        "samples": examples(kept, left_out),
        "seconds": {phase: f"{seconds:.0f} s" for phase, seconds in state.seconds.items()},
    }


def _falling(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Every row of a synthetic set, in the order of its making; none where there is no such file or a broken one."""
    if not path.is_file():
        return []
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path, columns=["sample_id", "input", "answer", "score", "split"]).to_pylist()
    except (OSError, ValueError):  # half-copied or of another version: the rest of the page is still good
        return []
    return sorted(rows, key=lambda row: int(row["sample_id"]))


def why_left_out(row: Mapping[str, Any], screen: str) -> str:
    """A row that the screen accepted is not refused: others of its answer were better, or enough."""
    return "refused" if was_refused(row["score"], screen) else "outranked"


def examples(kept: Sequence[dict[str, Any]], left_out: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few rows of the synthetic set: the first kept ones, then those left out that have the lowest scores."""
    worst = sorted(left_out, key=lambda row: float(row["score"] or 0))
    shown = [*kept[:NUM_KEPT], *worst[:NUM_REFUSED]]
    return [{**row, "input": _cut(row["input"]), "answer": _cut(row["answer"])} for row in shown]


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + " …"
