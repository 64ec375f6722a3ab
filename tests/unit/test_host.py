"""The process behind an actor: which bases it keeps."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cloudpickle import dumps

from tests.tiny import make_adapter, make_base
from translora.actors.blocks import generate_block
from translora.actors.calls import FAULT, Work, call_host
from translora.actors.host import EngineHost, base_bytes
from translora.config import BaseModelConfig
from translora.engine.transformers import TransformersEngine


def count_slots(engine: TransformersEngine, rows: list[dict[str, object]], _: dict[str, object]) -> list[dict]:  # type: ignore[type-arg]
    return [{**row, "engine": id(engine)} for row in rows]


def test_bases_stay_resident_as_long_as_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = [BaseModelConfig(model=str(make_base(tmp_path / n, seed=i))).model_dump() for i, n in enumerate("ab")]
    own = EngineHost(1, 1)

    def engine_of(base: dict[str, object]) -> object:
        rows, seconds = own.run(base, {}, dumps(count_slots), [{}], {})
        assert seconds["model"] >= 0 and seconds["load"] >= 0
        return rows[0]["engine"]

    first = [engine_of(base) for base in bases]
    assert [engine_of(base) for base in bases] == first and len(own.engines) == 2
    size = base_bytes(BaseModelConfig.model_validate(bases[0]))
    monkeypatch.setattr(EngineHost, "_free_bytes", lambda _: 2 * size - 1)
    own.engines.clear()
    engine_of(bases[0]), engine_of(bases[1])
    assert len(own.engines) == 1, "the second takes more than half of what is free: the first had to go"


def test_the_size_of_a_base_is_that_of_its_weights(tmp_path: Path) -> None:
    path = make_base(tmp_path / "base")
    on_disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    wide, narrow = (base_bytes(BaseModelConfig(model=str(path), dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert wide == 2 * narrow and 0 <= on_disk - wide < 20_000


def greedy(engine: TransformersEngine, rows: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Takes more memory than any machine has for a batch that is too large, or for a row that is."""
    if len(rows) > settings["most"] or any(row.get("huge") for row in rows):
        torch.empty(10**15)
    return [{**row, "batch": len(rows)} for row in rows]


def test_a_batch_that_is_too_large_is_halved_and_a_row_that_is_has_a_fault(tmp_path: Path) -> None:
    base = BaseModelConfig(model=str(make_base(tmp_path / "base"))).model_dump()
    rows: list[dict[str, Any]] = [{"row": index, "huge": index == 5} for index in range(11)]
    computed, _ = EngineHost(1, 1).run(base, {}, dumps(greedy), rows, {"most": 3})
    assert [row["row"] for row in computed] == list(range(11))
    assert {row["row"] for row in computed if FAULT in row} == {5}
    assert "out of memory with one row" in computed[5][FAULT] and "allocate" in computed[5][FAULT]
    assert all(row["batch"] <= 3 for row in computed if FAULT not in row)


def refuse(engine: TransformersEngine, rows: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    raise RuntimeError("something else")


def test_another_error_is_not_taken_for_want_of_memory(tmp_path: Path) -> None:
    base = BaseModelConfig(model=str(make_base(tmp_path / "base"))).model_dump()
    with pytest.raises(RuntimeError, match="something else"):
        EngineHost(1, 1).run(base, {}, dumps(refuse), [{}, {}], {})


def test_an_adapter_that_was_damaged_after_it_was_verified_spoils_its_own_rows_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters = {f"teacher/{name}": str(make_adapter(tmp_path / name, base, seed)) for seed, name in enumerate("ab")}
    weights = tmp_path / "b/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:500])
    rows = [{"slot": f"teacher/{name}"} for name in "abab"]
    host, config = EngineHost(1, 1), BaseModelConfig(model=str(base)).model_dump()
    for _ in range(2):
        computed, _ = host.run(config, adapters, dumps(count_slots), rows, {})
        assert [FAULT in row for row in computed] == [False, True, False, True]
        assert "cannot be used, though it was verified" in computed[1][FAULT] and "adapter_model" in computed[1][FAULT]
    shutil.rmtree(tmp_path / "a")
    assert EngineHost(1, 1).run(config, {"teacher/a": adapters["teacher/a"]}, dumps(count_slots), rows[:1], {})[0][0][
        FAULT
    ]


def test_a_process_that_hangs_ends_itself_and_says_where(tmp_path: Path) -> None:
    script = (
        "import time; from translora.run.watchdog import Watchdog\n"
        "watchdog = Watchdog(4.0)\n"
        "def here():\n    time.sleep({})\n"
        "for _ in range(3): watchdog.alive(); time.sleep(1.5)\n"
        "here()\n"
        "watchdog.stop(); time.sleep(4.5); print('well')\n"
    )
    hung, well = (
        subprocess.run([sys.executable, "-c", script.format(seconds)], capture_output=True, text=True, timeout=60)
        for seconds in (50, 0.1)
    )
    assert hung.returncode == 1 and "in here" in hung.stderr and "Timeout" in hung.stderr
    assert well.returncode == 0 and well.stdout == "well\n"


def slots_of(engine: TransformersEngine, rows: list[dict[str, Any]], _: dict[str, Any]) -> list[dict[str, Any]]:
    present = sorted(engine._adapters)
    return [{**row, "present": present} for row in rows]


def test_a_bank_that_is_too_large_for_the_machine_holds_what_a_block_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_base(tmp_path / "base")
    base = BaseModelConfig(model=str(path)).model_dump()
    adapters = {name: str(make_adapter(tmp_path / name, path, seed, 2)) for seed, name in enumerate("abc")}
    rows = [{"slot": "a", "discriminator": "c"}, {"slot": None}]
    own = EngineHost(1, 1)
    assert own.run(base, adapters, dumps(slots_of), rows, {})[0][0]["present"] == ["a", "b", "c"]
    monkeypatch.setattr(EngineHost, "_all_bytes", lambda _: 1)
    assert own.run(base, adapters, dumps(slots_of), rows, {})[0][0]["present"] == ["a", "c"]
    assert own.run(base, adapters, dumps(slots_of), [{"slot": "b"}], {})[0][0]["present"] == ["b"]


def test_a_task_that_hands_a_block_on_loads_no_torch() -> None:
    task = dumps((call_host, Work(dumps(generate_block), {}, {}, {})))
    code = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1])); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, task.hex()], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
