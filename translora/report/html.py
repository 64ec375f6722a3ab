"""RUN/report.html: one self-contained page on a run. No network, no external script, light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from translora import __version__
from translora.report.table import (
    ACCURACY_FIELDS,
    MISSING,
    STATUS_WORDS,
    accepted_text,
    gain,
    note,
    percent,
    status_text,
    summary,
)
from translora.run.files import write_bytes
from translora.run.state import AdapterState, load_states

REPORT_FILE = "report.html"
NUM_KEPT, NUM_REFUSED = 4, 2
"""Examples shown of each adapter's synthetic set."""
_MOST_POINTS = 160
"""Points of a loss curve; longer ones are averaged in bins."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 520, 150, 40, 20
_MOST_TEXT = 600
_OPEN_SECTIONS = 12
"""A fleet larger than this is shown with its sections closed."""


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the states of a run, finished or not, and return its path.

    Raises:
        ValueError: `run_dir` is not a run directory.
    """
    run_dir = Path(run_dir)
    states = load_states(run_dir)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    page = environment.get_template("template.html.j2").render(
        title=run_dir.resolve().name,
        version=__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        summary=summary(states),
        sections_open=len(states) <= _OPEN_SECTIONS,
        with_accuracy=any(state.accuracy for state in states),
        adapters=[describe(run_dir, state) for state in states],
        missing=MISSING,
        **_run_facts(run_dir, states),
    )
    path = run_dir / REPORT_FILE
    write_bytes(path, page.encode())
    return path


def _run_facts(run_dir: Path, states: Sequence[AdapterState]) -> dict[str, Any]:
    """What the head and the foot of the page say: bases, tiles, config and versions."""
    config = _read_json(run_dir / "config.json")
    gates = [state.gate for state in states if state.gate]
    counts = {status: sum(state.status == status for state in states) for status in STATUS_WORDS}
    tiles = [(word, counts[status], status) for status, word in STATUS_WORDS.items() if counts[status]]
    mean_agreement = None
    if gates:
        before = sum(gate.agreement_base for gate in gates) / len(gates)
        after = sum(gate.agreement_student for gate in gates) / len(gates)
        mean_agreement = f"{percent(before)} → {percent(after)}"
    return {
        "source": _model_name(config, "source"),
        "target": _model_name(config, "target"),
        "tiles": tiles,
        "mean_agreement": mean_agreement,
        "min_agreement": (config.get("gate") or {}).get("min_agreement"),
        "config": json.dumps(config, indent=2, ensure_ascii=False),
        "versions": _read_json(run_dir / "versions.json"),
    }


def _model_name(config: dict[str, Any], role: str) -> str:
    model = (config.get(role) or {}).get("model") or MISSING
    return str(model).rstrip("/").rsplit("/", 1)[-1] if str(model).startswith(("/", ".", "~")) else str(model)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def describe(run_dir: Path, state: AdapterState) -> dict[str, Any]:
    """What the page shows of one adapter; parts that do not exist yet are None or empty."""
    stats, gate, accuracy = state.synthesis, state.gate, state.accuracy
    flow = [("accepted", stats.accepted, "good")] if stats.generated else []
    flow += [(reason.replace("_", " "), count, "bad") for reason, count in sorted(stats.dropped.items(), key=_falling)]
    return {
        "state": state,
        "status": status_text(state),
        "accepted": accepted_text(state),
        "acceptance": stats.acceptance if stats.generated else None,
        "gain": gain(gate.agreement_base, gate.agreement_student) if gate else "",
        "note": note(state),
        "flow": flow,
        "flow_most": max((count for _, count, _ in flow), default=1) or 1,
        "agreement": [("target base", gate.agreement_base), ("migrated", gate.agreement_student)] if gate else [],
        "accuracy": [(field.replace("_", " "), getattr(accuracy, field)) for field in ACCURACY_FIELDS if accuracy],
        "curve": loss_curve(state.losses),
        "samples": samples(run_dir / "adapters" / state.name / "synthetic.parquet"),
        "seconds": {phase: f"{seconds:.0f} s" for phase, seconds in state.seconds.items()},
    }


def _falling(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def samples(path: Path) -> list[dict[str, Any]]:
    """A few rows of the synthetic set: kept ones of both splits, then refused ones with the lowest scores."""
    if not path.is_file():
        return []
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path, columns=["sample_id", "input", "answer", "score", "split"]).to_pylist()
    except (OSError, ValueError):  # half-copied or of another version: the rest of the page is still good
        return []
    kept = sorted((row for row in rows if row["split"] != "refused"), key=lambda row: int(row["sample_id"]))
    refused = sorted((row for row in rows if row["split"] == "refused"), key=lambda row: float(row["score"] or 0))
    shown = kept[:NUM_KEPT] + refused[:NUM_REFUSED]
    return [{**row, "input": _cut(row["input"]), "answer": _cut(row["answer"])} for row in shown]


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + " …"


def loss_curve(losses: Sequence[float]) -> dict[str, Any] | None:
    """Coordinates of the loss over the steps as an SVG of _WIDTH × _HEIGHT; None with fewer than two finite values."""
    points = [(float(step), loss) for step, loss in enumerate(losses, 1) if math.isfinite(loss)]
    if len(points) < 2:
        return None
    size = math.ceil(len(points) / _MOST_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part)) for part in bins]
    if len(means) < 2:
        means = points
    tick = _round_up(max(loss for _, loss in means) / 3)
    top = 3 * tick
    first, last = means[0][0], means[-1][0]

    def x(step: float) -> float:
        return round(_LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - 6), 1)

    def y(loss: float) -> float:
        return round(6 + (1 - loss / top) * (_HEIGHT - _BOTTOM - 6), 1)

    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "points": " ".join(f"{x(step)},{y(loss)}" for step, loss in means),
        "levels": [(y(tick * index), f"{tick * index:.4g}") for index in range(4)],
        "num_steps": len(losses),
        "first_loss": f"{points[0][1]:.3f}",
        "last_loss": f"{points[-1][1]:.3f}",
    }


def _round_up(value: float) -> float:
    """The next round number; 1 for zero."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if power * factor >= value)
