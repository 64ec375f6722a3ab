"""Blocks on real actors: bases stay, actors die and come back, and none is left."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray.exceptions

from tests.tiny import make_adapter, make_base
from translora.actors import rows as actors
from translora.actors.hosts import Hosts, hosts_of_a_machine
from translora.actors.rows import run_blocks
from translora.config import BaseModelConfig, ResourceConfig
from translora.engine.transformers import TransformersEngine
from translora.run.files import write_parquet
from translora.synthesis.discriminator import Inputs, Judge, measure, quality
from translora.synthesis.screens import judge_block

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]
Row = dict[str, Any]


def look(engine: Any, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    found = {"process": os.getpid(), "engine": id(engine), "adapters": ",".join(engine.bank.names)}
    return [{**row, **found} for row in rows]


def die_once(engine: Any, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    flag = Path(settings["flag"])
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return rows


def die(engine: Any, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    os.kill(os.getpid(), signal.SIGKILL)
    return rows


def die_of_row_3(engine: Any, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    return die(engine, rows, settings) if any(row["row"] == 3 for row in rows) else rows


def hang_at_row_3(engine: Any, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    time.sleep(600 if any(row["row"] == 3 for row in rows) else 0)
    return rows


def refuse(engine: Any, rows: list[Row], settings: dict[str, Any]) -> list[Row]:
    raise ValueError("row 7 is blue")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[BaseModelConfig]:
    root = tmp_path_factory.mktemp("bases")
    return [BaseModelConfig(model=str(make_base(root / name, seed=seed))) for seed, name in enumerate("ab")]


def run(function: Any, base: BaseModelConfig, hosts: Hosts, directory: Path, **changes: Any) -> list[Row]:
    blocks = [[{"row": 2 * block + row} for row in range(2)] for block in range(4)]
    rest: dict[str, Any] = {"adapters": {}, "settings": {}} | changes
    return run_blocks(blocks, function, base=base, hosts=hosts, directory=directory, **rest)


def test_actors_share_the_memory_of_their_own_machine_alone(bases: list[BaseModelConfig]) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    found = [hosts_of_a_machine(ResourceConfig(num_actors=number)) for number in (1, cpus, 10 * cpus)]
    assert found == [1, cpus, cpus], "a cluster of more actors has them on other machines"
    assert hosts_of_a_machine(ResourceConfig(num_actors=9, cpus_per_actor=cpus)) == 1


def test_bases_and_processes_outlive_a_dataset(bases: list[BaseModelConfig], tmp_path: Path) -> None:
    adapters = {"one": str(make_adapter(tmp_path / "one", bases[1].model))}
    with Hosts(ResourceConfig(num_actors=2), tmp_path, 7) as hosts:
        rounds = [run(look, bases[0], hosts, tmp_path / "0")]
        rounds.append(run(look, bases[1], hosts, tmp_path / "1", adapters=adapters))
        rounds.append(run(look, bases[0], hosts, tmp_path / "2"))
        processes = [psutil.Process(process) for process in {row["process"] for row in rounds[0]}]
    assert all([row["row"] for row in rows] == list(range(8)) for rows in rounds)
    assert rounds[0] == rounds[2], "the same engines in the same processes"
    assert len(processes) == 2
    assert {row["adapters"] for row in rounds[1]} == {"one"} and {row["adapters"] for row in rounds[0]} == {""}
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, "the actors ended with their block"


def test_an_actor_that_dies_comes_back_and_its_block_is_computed(bases: list[BaseModelConfig], tmp_path: Path) -> None:
    with Hosts(ResourceConfig(), tmp_path, 7) as hosts:
        rows = run(die_once, bases[0], hosts, tmp_path / "blocks", settings={"flag": str(tmp_path / "flag")})
    assert [row["row"] for row in rows] == list(range(8)) and (tmp_path / "flag").exists()


POISON = [[{"row": 2 * block + row, "adapter": "ab"[row]} for row in range(2)] for block in range(3)]


def run_poison(function: Any, base: BaseModelConfig, directory: Path, **resources: Any) -> tuple[list[Row], dict]:  # type: ignore[type-arg]
    faults: dict[str, str] = {}
    with Hosts(ResourceConfig(**resources), directory, 2) as hosts:
        rows = run_blocks(
            POISON, function, base=base, adapters={}, settings={}, hosts=hosts, directory=directory, faults=faults
        )
    return rows, faults


def test_a_row_that_ends_every_actor_is_found_and_the_others_are_computed(
    bases: list[BaseModelConfig], tmp_path: Path
) -> None:
    rows, faults = run_poison(die_of_row_3, bases[0], tmp_path / "blocks", num_actors=2)
    assert sorted(row["row"] for row in rows) == [0, 1, 2, 4, 5]
    assert faults.keys() == {"b"} and "its row ends the process that computes it" in faults["b"]
    assert len(list((tmp_path / "blocks").glob("*.parquet"))) == 2, "its block is tried again by a rerun"


def test_a_row_that_hangs_is_ended_and_found(bases: list[BaseModelConfig], tmp_path: Path) -> None:
    rows, faults = run_poison(hang_at_row_3, bases[0], tmp_path / "blocks", worker_timeout_seconds=4)
    assert sorted(row["row"] for row in rows) == [0, 1, 2, 4, 5]
    assert faults == {"b": "its row is not computed within resources.worker_timeout_seconds (4)"}


def test_blocks_that_end_every_actor_end_the_run_with_the_reason(
    bases: list[BaseModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "MAX_SUSPECTS", 1)
    blocks = [[{"row": index}] for index in range(4)]
    with (
        Hosts(ResourceConfig(), tmp_path, 7) as hosts,
        pytest.raises(ray.exceptions.RayError, match=r"2 blocks .* synthesis.batch"),
    ):
        run_blocks(blocks, die, base=bases[0], adapters={}, settings={}, hosts=hosts, directory=tmp_path)


def test_a_shard_that_cannot_be_read_back_costs_its_own_adapters_after_some_tries(
    bases: list[BaseModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write_on_a_bad_disk(path: Path, table: pa.Table) -> None:
        written.append(path.name)
        if path.name == "000001.parquet" or (path.name == "000002.parquet" and written.count(path.name) == 1):
            path.write_bytes(b"PAR1 and nothing else")
        else:
            write_parquet(path, table)

    monkeypatch.setattr(actors, "write_parquet", write_on_a_bad_disk)
    blocks = [[{"row": index, "adapter": "abc"[index]}] for index in range(3)]
    faults: dict[str, str] = {}
    with Hosts(ResourceConfig(), tmp_path, 7) as hosts:
        arguments: dict[str, Any] = {"base": bases[0], "adapters": {}, "settings": {}, "hosts": hosts}
        rows = run_blocks(blocks, look, directory=tmp_path, faults=faults, **arguments)
    assert [row["row"] for row in rows] == [0, 2]
    assert faults.keys() == {"b"} and "000001.parquet cannot be read back, 3 times written" in faults["b"]
    assert [written.count(f"{index:06d}.parquet") for index in range(3)] == [1, 3, 2]


def test_what_a_block_raises_reaches_the_driver(bases: list[BaseModelConfig], tmp_path: Path) -> None:
    with Hosts(ResourceConfig(), tmp_path, 7) as hosts, pytest.raises(ray.exceptions.RayError, match="row 7 is blue"):
        run(refuse, bases[0], hosts, tmp_path / "blocks")


def test_discriminators_are_measured_by_their_own_scores(bases: list[BaseModelConfig], tmp_path: Path) -> None:
    """Two of them in mixed batches, as an engine with each of them alone scores."""
    texts = [f"send order {index} " + "now " * (index % 5) for index in range(24)]
    judges = {
        name: Judge(make_adapter(tmp_path / name, bases[0].model, seed), name, "auto", Inputs(texts[:14], texts[14:]))
        for seed, name in enumerate(("one", "two"))
    }
    base = bases[0].model_copy(update={"dtype": "float32"})
    settings: dict[str, Any] = {"base": base, "weights": {}}
    with Hosts(ResourceConfig(), tmp_path, 7) as hosts:
        found = measure(judges, hosts=hosts, **settings)
    for name, judge in judges.items():
        engine = TransformersEngine(base, {"discriminator/": judge.directory}, 1)
        row = {"discriminator": "discriminator/", "task_name": name, "template": "auto"}
        scores = [row["score"] for row in judge_block(engine, [{**row, "input": text} for text in texts], {})]
        assert found[name] == quality(scores[:14], scores[14:])
    assert found["one"] != found["two"]
