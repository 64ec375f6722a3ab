"""Quiet logging: the environment, the driver's handlers, the worker's prints, and Ray for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from translora.run import log
from translora.run.cluster import ray_arguments

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DS_", "TRANS", "WANDB_"))}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = CLEAN | environment | {"PYTHONPATH": os.getcwd()}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


def test_the_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    environment = log.quiet_environment()
    assert environment["TRANSFORMERS_VERBOSITY"] == "debug"
    assert environment["OMP_WAIT_POLICY"] == os.environ.get("OMP_WAIT_POLICY", "PASSIVE")


def test_verbose_sets_the_behaviour_only() -> None:
    verbose, quiet = log.quiet_environment(verbose=True), log.quiet_environment()
    assert verbose.items() < quiet.items()
    assert "OMP_WAIT_POLICY" in verbose and log.QUIET_MARK not in verbose


def test_the_cpu_accelerator_is_asked_for_exactly_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert log.quiet_environment(on_gpu=False)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in log.quiet_environment(on_gpu=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(log, "_NVIDIA", (tmp_path / "absent",))
    assert not log.has_cuda_device()
    monkeypatch.setattr(log, "_NVIDIA", (tmp_path,))
    assert log.has_cuda_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not log.has_cuda_device()


def test_importing_the_logging_loads_neither_torch_nor_ray() -> None:
    done = run_python(
        "import sys, translora.run.log, translora.run.cluster, translora.run.status, translora.run.tracker\n"
        "import translora.report.table, translora.report.html\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr


def test_lines_in_a_log_are_plain_and_warnings_of_others_stay() -> None:
    done = run_python(
        "from translora.run.log import setup_logging\n"
        "setup_logging()\n"
        "import logging, warnings\n"
        "logging.getLogger('translora.x').info('round 1: 12 accepted')\n"
        "logging.getLogger('translora.x').debug('not shown')\n"
        "logging.getLogger('elsewhere').info('chatter')\n"
        "logging.getLogger('elsewhere').error('disk full')\n"
        "warnings.warn('old name', FutureWarning)\n"
        "warnings.warn('numbers look wrong', UserWarning)\n"
    )
    lines = done.stderr.splitlines()
    assert lines[0].endswith("INFO    round 1: 12 accepted") and "\x1b" not in done.stderr
    assert lines[1].endswith("ERROR   disk full")
    assert "numbers look wrong" in done.stderr
    assert not {"chatter", "not shown", "old name"} & set(done.stderr.replace(":", " ").split())
    assert done.stdout == ""


def test_verbose_shows_debug_lines() -> None:
    code = (
        "from translora.run.log import setup_logging; setup_logging(True)\n"
        "import logging; logging.getLogger('translora.x').debug('detail'); logging.getLogger('ray').info('node up')"
    )
    assert "detail" in (stderr := run_python(code).stderr) and "node up" in stderr


def test_a_quiet_worker_drops_prints_to_stdout_only() -> None:
    code = (
        "import sys\nfrom translora.run.log import quiet_worker\nquiet_worker()\n"
        "print('op built'); print('op built', file=sys.stdout); print('broken', file=sys.stderr)"
    )
    quiet, speaking = run_python(code, **{log.QUIET_MARK: "1"}), run_python(code)
    assert (quiet.stdout, quiet.stderr) == ("", "broken\n")
    assert speaking.stdout == "op built\nop built\n"


def test_ray_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    local, joined = ray_arguments(), ray_arguments(address="10.0.0.1:6379", on_gpu=True)
    workers = local["runtime_env"]["env_vars"]
    assert local["address"] == "local"
    assert workers["RAY_API_SERVER_ADDRESS"] == f"http://127.0.0.1:{local['dashboard_port']}"
    assert workers["DS_ACCELERATOR"] == "cpu"
    assert joined["address"] == "10.0.0.1:6379" and "dashboard_port" not in joined
    assert not {"DS_ACCELERATOR", "RAY_API_SERVER_ADDRESS"} & set(joined["runtime_env"]["env_vars"])


def test_ray_data_logging_file_is_complete() -> None:
    settings = yaml.safe_load(log._RAY_DATA_LOGGING.read_text())
    assert settings["handlers"]["console"]["level"] == "WARNING"
    assert set(settings["loggers"]["ray.data"]["handlers"]) == set(settings["handlers"])


@pytest.mark.timeout(300)
def test_a_ray_data_run_says_nothing_and_its_errors_are_seen() -> None:
    code = (
        "from translora.run.log import setup_logging\n"
        "setup_logging()\n"
        "from translora.run.cluster import start_ray\n"
        "start_ray()\n"
        "import ray, sys\n"
        "class Actor:\n"
        "    def __call__(self, batch):\n"
        "        assert batch['id'].max() < LIMIT, 'row out of range'\n"
        "        return batch\n"
        "pool = ray.data.ActorPoolStrategy(size=1)\n"
        "data = ray.data.range(8, override_num_blocks=1).map_batches(Actor, compute=pool)\n"
        "sys.stdout.write(f'{data.sum(\"id\")}')\n"
    )
    quiet = run_python(code.replace("LIMIT", "8"))
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "28", "")
    failing = run_python(code.replace("LIMIT", "4"))
    assert failing.returncode != 0 and "row out of range" in failing.stderr


@pytest.mark.timeout(300)
def test_under_ray_ctrl_c_and_sigterm_unwind(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, threading, time
import translora.cli as cli
from translora.config import ResourceConfig
from translora.run.log import setup_logging
from translora.run.signals import interruptible_fit

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
setup_logging()
cli.start_cluster(ResourceConfig(), 1, False)
import ray, ray.train
from ray.train.torch import TorchTrainer

def train(path):
    open(path, "w").close()
    time.sleep(100)

def kill_when(path, number):
    def wait():
        while not os.path.exists(path):
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(os.getpid(), number)
    threading.Thread(target=wait, daemon=True).start()

trainer = TorchTrainer(
    train,
    train_loop_config="{tmp_path}/fit",
    scaling_config=ray.train.ScalingConfig(num_workers=1),
    run_config=ray.train.RunConfig(
        name="t", storage_path="{tmp_path}", logging_config=ray.train.LoggingConfig(log_level="WARNING")
    ),
)
kill_when("{tmp_path}/fit", signal.SIGINT)
try:
    with interruptible_fit():
        trainer.fit()
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.stdout.write("interrupted")

def work(arguments):
    kill_when("{tmp_path}/task", signal.SIGTERM)
    ray.get(ray.remote(train).remote("{tmp_path}/task"))

cli.run_status = work
sys.exit(cli.main(["status", "run"]))
"""
    done = run_python(code)
    assert done.stdout == "interrupted"
    assert done.returncode == 143, done.stderr
    assert done.stderr == "translora: terminated; what is finished is kept, the same command continues\n"
