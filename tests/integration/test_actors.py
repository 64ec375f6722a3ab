"""Blocks on real actors: bases stay, actors die and come back, and none is left."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.exceptions

from tests.tiny import make_adapter, make_base
from translora.config import BaseModelConfig, ResourceConfig
from translora.synthesis.actors import Hosts, run_blocks

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]
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


def test_bases_and_processes_outlive_a_dataset(bases: list[BaseModelConfig], tmp_path: Path) -> None:
    adapters = {"one": str(make_adapter(tmp_path / "one", bases[1].model))}
    with Hosts(ResourceConfig(num_actors=2)) as hosts:
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
    with Hosts(ResourceConfig()) as hosts:
        rows = run(die_once, bases[0], hosts, tmp_path / "blocks", settings={"flag": str(tmp_path / "flag")})
    assert [row["row"] for row in rows] == list(range(8)) and (tmp_path / "flag").exists()


def test_a_block_that_kills_every_actor_ends_the_run(bases: list[BaseModelConfig], tmp_path: Path) -> None:
    with Hosts(ResourceConfig()) as hosts, pytest.raises(ray.exceptions.RayError, match=r"died|dead"):
        run(die, bases[0], hosts, tmp_path / "blocks")


def test_what_a_block_raises_reaches_the_driver(bases: list[BaseModelConfig], tmp_path: Path) -> None:
    with Hosts(ResourceConfig()) as hosts, pytest.raises(ray.exceptions.RayError, match="row 7 is blue"):
        run(refuse, bases[0], hosts, tmp_path / "blocks")
