"""An owner's adapter on its own data, without models: who is asked what, and what is said of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_adapter, make_base
from translora.bundle import inspect_base
from translora.bundle.task import Task
from translora.config import PrepareConfig, PrepareEntry
from translora.gate import questions
from translora.gate.owned import NUM_ROWS, try_adapters


@pytest.mark.parametrize(("adapter", "base", "is_warned"), [(15, 2, False), (2, 2, True), (0, 0, True), (20, 20, None)])
@pytest.mark.parametrize("length", [1, 100])
def test_an_adapter_that_does_no_better_than_the_base_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    adapter: int,
    base: int,
    is_warned: bool | None,
    length: int,
) -> None:
    """By its answers, or by their likelihood where they are long texts."""
    caplog.set_level(logging.INFO, logger="translora")
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "old-base"))
    rows = [{"input": f"box {number}", "target": f"{number}" * length} for number in range(30)]
    given = {"name": "boxes", "data": "boxes.jsonl", "adapter": str(tmp_path / "adapter")}
    config = PrepareConfig.model_validate(
        {
            "output_dir": tmp_path / "bundles",
            "run_dir": tmp_path / "run",
            "source": {"model": str(tmp_path / "old-base")},
            "tasks": [given],
        }
    )
    tasks = [
        Task(config.tasks[0], rows, ["a", "b"], tmp_path / "bundles/boxes", "Box? {input}"),
        Task(PrepareEntry(name="jars", data="jars.jsonl"), rows, ["a", "b"], tmp_path / "bundles/jars"),
    ]

    def run_rows(_: str, asked: list[dict[str, Any]], __: object, **rest: Any) -> list[dict[str, Any]]:
        assert {(row["arm"], row["slot"]) for row in asked} == {("adapter", "adapter/boxes"), ("base", None)}
        assert {row["template"] for row in asked} == {"Box? {input}"} and len(asked) == 2 * NUM_ROWS
        assert rest["adapters"] == {"adapter/boxes": given["adapter"]}
        right = {"adapter": adapter, "base": base}
        return [
            {
                **row,
                "answer": row["reference"] if length == 1 and row["index"] < right[row["arm"]] else "no",
                "finished": True,
                "loglik": right[row["arm"]] - 20.0,
            }
            for row in asked
        ]

    monkeypatch.setattr(questions, "run_rows", run_rows)
    try_adapters(config, tasks, inspect_base(str(tmp_path / "old-base")))
    if length == 1:
        shares = f"answers {5 * adapter} % as they are, the bare base {5 * base} %"
        assert f"boxes: of 20 rows of its data its adapter {shares}" in caplog.text
    warning = "was it trained with another prompt_template than 'Box? {input}'?"
    assert (warning in caplog.text) is (length > 1 if is_warned is None else is_warned), "none is better than all right"
    monkeypatch.setattr(questions, "run_rows", None)
    try_adapters(config, tasks[1:], inspect_base(str(tmp_path / "old-base")))
