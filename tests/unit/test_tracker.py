"""The tracker: metrics.jsonl through kills, and real offline W&B runs read back from disk."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from translora.config import TrackingConfig
from translora.run.tracker import METRICS_FILE, Tracker, wandb_name

BLOCK_BYTES, HEADER_BYTES = 32768, 7


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format (crc, length, kind) behind a header of 7 bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, record = HEADER_BYTES, b""
    while position + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += HEADER_BYTES
        record += data[position : position + length]
        position += length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def finished_records(path: Path) -> list[Any]:
    """The records once the last one, `exit`, is there: W&B's process writes the file a moment after `finish`."""
    deadline = time.monotonic() + 30
    while True:
        records = list(wandb_records(path))
        if (records and records[-1].WhichOneof("record_type") == "exit") or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def test_lines_are_flushed_and_appended_by_a_rerun(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = Tracker(tmp_path, TrackingConfig(), {}, "run")
        tracker.log({"loss/student": 1.0 / step}, step=step, adapter="routing")
        assert len(rows_of(tmp_path)) == step  # before close
        tracker.close()
        tracker.close()
    assert [row["metrics"]["loss/student"] for row in rows_of(tmp_path)] == [1.0, 0.5]
    assert rows_of(tmp_path)[0].keys() == {"time", "adapter", "step", "metrics"}
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    ("torn", "kept"), [(b'{"time": 2, "metr', 1), (b'{"time": 2}', 2), (b'{"a": "\xe2\x82', 1), (b"\n", 1)]
)
def test_a_line_torn_by_a_kill_does_not_spoil_the_next(tmp_path: Path, torn: bytes, kept: int) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b'{"time": 1}\n' + torn)
    with Tracker(tmp_path, TrackingConfig(), {}, "run") as tracker:
        tracker.log({"time/gate_seconds": 3.0})
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines if line]
    assert len(rows) == kept + 1 and rows[-1]["metrics"] == {"time/gate_seconds": 3.0}


def test_a_loss_that_is_no_number_is_still_json(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(), {}, "run") as tracker:
        tracker.log({"loss/student": float("nan"), "perf/tokens_per_second": float("inf")})
    assert rows_of(tmp_path)[0]["metrics"] == {"loss/student": None, "perf/tokens_per_second": None}


@pytest.mark.parametrize("name", ["loss", "accuracy/x", "loss/", "loss/a b", "adapter//x", "loss/a.b"])
def test_a_misnamed_metric_is_refused(tmp_path: Path, name: str) -> None:
    with (
        Tracker(tmp_path, TrackingConfig(), {}, "run") as tracker,
        pytest.raises(AssertionError, match="must be named"),
    ):
        tracker.log({name: 1.0})


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(), {}, "run") as tracker:

        def work(adapter: str) -> None:
            for step in range(50):
                tracker.log({"loss/student": 0.5}, step=step, adapter=adapter)

        threads = [threading.Thread(target=work, args=(f"a{index}",)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(rows_of(tmp_path)) == 200


def test_offline_wandb_runs_hold_the_metrics_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    config = TrackingConfig(wandb_project="fleet", wandb_mode="offline")
    for rerun in range(2):
        with Tracker(tmp_path, config, {"seed": 7, "hub": {"hub_token": "hf_secret"}}, "demo") as tracker:
            for step in (1, 2):
                tracker.log({"loss/student": 1.0 / step, "adapter/agreement": 0.5}, step=step, adapter="rou.ting")
            tracker.log({"time/gate_seconds": 4.0 + rerun})
    paths = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    identifier = (tmp_path / "wandb_id").read_text()
    assert len(paths) == 2 and {path.name for path in paths} == {f"run-{identifier}.wandb"}
    for path in paths:
        records = finished_records(path)
        rows = history(records)
        name = "adapter/rou_ting"
        assert [(row[f"{name}/step"], row[f"{name}/loss/student"]) for row in rows[:2]] == [(1, 1.0), (2, 0.5)]
        assert rows[0][f"{name}/agreement"] == 0.5 and rows[2]["time/gate_seconds"] in (4.0, 5.0)
        axes = {
            record.metric.glob_name: record.metric.step_metric
            for record in records
            if record.WhichOneof("record_type") == "metric" and record.metric.glob_name
        }
        assert axes[f"{name}/*"] == f"{name}/step" and axes["loss/*"] == "step"
        run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (run.project, run.run_id, run.display_name) == ("fleet", identifier, "demo")
        assert {item.key for item in run.config.update} >= {"seed", "hub"}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hf_secret" not in written and b"0123456789" * 4 not in written


def test_wandb_without_a_key_is_one_clear_error(tmp_path: Path) -> None:
    # A process of its own: W&B reads its environment once. Port 9 of this machine answers nobody.
    code = (
        "import sys, pathlib\n"
        "from translora.config import TrackingConfig\n"
        "from translora.run.tracker import Tracker\n"
        "try: Tracker(pathlib.Path(sys.argv[1]), TrackingConfig(wandb_project='fleet'), {}, 'demo')\n"
        "except ValueError as error: sys.stdout.write(str(error))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environment["PYTHONPATH"] = os.getcwd()
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert re.search(r"wandb_project 'fleet'.*wandb login.*offline", done.stdout), done


def test_names_in_wandb_open_no_nested_keys() -> None:
    assert wandb_name("v1.0 billing/eu") == "v1_0_billing_eu"
