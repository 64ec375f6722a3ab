import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from translora import cli
from translora.cli import build_parser, main, print_report
from translora.config import ResourceConfig
from translora.report import html
from translora.run import cluster
from translora.run.faults import RunFailedError
from translora.run.state import AdapterState, save_state

ROOT = Path(__file__).resolve().parents[2]


def test_help_and_configs_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys; import translora.cli, translora.config, translora.run.status, translora.report.html\n"
        "import translora.evaluate.config, translora.evaluate.render, translora.config.merge\n"
        "translora.cli.build_parser().format_help()\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'wandb'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("command", "argument", "text"),
    [
        ("migrate", "fleet.yaml", "migrate a fleet of bundles; a rerun continues where it stopped"),
        ("prepare", "prepare.yaml", "the owner's side: make bundles from task data"),
        ("evaluate", "evaluate.yaml", "measure on real task data what migrations keep, and report it"),
        ("merge", "--adapters", "merge LoRA adapters of one base into one plain adapter"),
        ("status", "run directory", "show where a run stands, also while it goes on"),
        ("report", "run directory", "write the HTML report of a run again and print its table"),
    ],
)
def test_every_command_has_a_help_text(
    command: str, argument: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{command} {text}" in " ".join(build_parser().format_help().split())
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert argument in capsys.readouterr().out


def test_bad_input_gives_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not a run directory" in error


def run_of(root: Path, *names: str) -> list[AdapterState]:
    (root / "config.json").write_text("{}")
    states = [AdapterState(name=name, bundle=name, status="quarantined", reason="why " * 60) for name in names]
    for state in states:
        save_state(root, state)
    return states


def test_only_the_adapters_of_the_fleet_file_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = run_of(tmp_path, "removed", "stays")
    print_report(tmp_path, states[1:])
    lines = capsys.readouterr().out.splitlines()
    assert not any("removed:" in line for line in lines)
    assert "earlier adapters of this run that are no longer in the fleet file: 1" in lines
    assert f"stays: quarantined: {'why ' * 60}".rstrip() in [line.rstrip() for line in lines], "cut in two"
    print_report(tmp_path, states)
    assert "earlier adapters" not in capsys.readouterr().out


def test_a_report_that_cannot_be_written_does_not_hide_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(tmp_path, "a")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "report.html")

    monkeypatch.setattr(html, "write_bytes", refuse)
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "0 of 1 migrated, 1 quarantined" in out
    assert out.endswith(f"report: {tmp_path / 'report.html'} cannot be written (Read-only file system)\n")


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_prepare_run_and_a_broken_state_are_named(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path, "a", "b")
    (tmp_path / "adapters/a/state.json").write_text("")
    assert main([command, str(tmp_path)]) == 0, "one damaged file hides no other adapter"
    assert "state.json: truncated" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"tasks": [], "output_dir": "/out"}))
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"translora: {tmp_path}: the run of a `translora prepare`, which has no states; "
        "its bundles are written to /out\n"
    )


@pytest.mark.parametrize(("signal", "code", "what"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_ends_a_run_with_one_line_and_its_own_exit_code(signal: str, code: int, what: str) -> None:
    script = (
        "import os, signal, sys, translora.cli as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "def work(arguments):\n"
        "    cli.unwind_on_sigterm()\n"
        f"    os.kill(os.getpid(), signal.{signal})\n"
        "cli.run_status = work\n"
        "sys.exit(cli.main(['status', 'run']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr == f"translora: {what}; what is finished is kept, the same command continues\n"


def test_a_second_start_is_refused_before_the_libraries_are_loaded(tmp_path: Path) -> None:
    fleet = {"run_dir": "run", "source": {"model": "a"}, "target": {"model": "b"}, "adapters": ["x"]}
    (tmp_path / "fleet.yaml").write_text(json.dumps(fleet))
    (tmp_path / "run").mkdir()
    script = (
        "import pathlib, sys, translora.cli\n"
        "from translora.run.lease import hold\n"
        f"with hold(pathlib.Path({str(tmp_path / 'run/lock')!r})):\n"
        f"    code = translora.cli.main(['migrate', {str(tmp_path / 'fleet.yaml')!r}])\n"
        "assert not {'torch', 'ray'} & sys.modules.keys()\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "another process works on this run" in done.stderr


def test_a_full_disk_is_one_line_and_another_error_of_the_system_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_on_a_full_disk(_: object) -> int:
        with open("/dev/full", "w") as full:
            full.write("x")
        return 0

    monkeypatch.setattr(cli, "run_status", write_on_a_full_disk)
    assert cli.main(["status", "run"]) == cli.BROKEN
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "No space left on device; free some space" in text
    assert text.endswith("the same command continues\n")

    def read_nothing(_: object) -> int:
        raise FileNotFoundError(2, "No such file", "x")

    monkeypatch.setattr(cli, "run_status", read_nothing)
    assert cli.main(["status", "run"]) == cli.CRASHED not in (cli.FAILED, cli.UNUSABLE, cli.BROKEN)


def test_a_refusal_of_a_worker_is_unusable_input_and_its_death_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """As Ray's tasks and its training bring them: the same command would not help against the first."""
    import ray.exceptions
    import ray.train
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    from translora.bundle.base import UnusableBaseError
    from translora.run.faults import cluster_faults

    refusal = UnusableBaseError("model: this base cannot be packed; take another")
    task = ray.exceptions.RayTaskError("run", "Traceback ...", refusal).as_instanceof_cause()
    training = ray.train.WorkerGroupError("...", {0: RuntimeError("NCCL"), 1: UserExceptionWithTraceback(refusal, "")})
    died = ray.train.WorkerGroupError("...", {0: RuntimeError("NCCL")})
    killed = ray.exceptions.RayTaskError("run", "Traceback ...", ValueError("closed file")).as_instanceof_cause()
    for error, code in (
        (task, cli.UNUSABLE),
        (training, cli.UNUSABLE),
        (died, cli.BROKEN),
        (killed, cli.BROKEN),
        (ray.exceptions.ActorDiedError(), cli.BROKEN),
    ):

        def work(_: object, error: Exception = error) -> int:
            with cluster_faults():
                raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "run_status", work)
            assert cli.main(["status", "run"]) == code, error
        assert ("take another" in capsys.readouterr().err) is (code == cli.UNUSABLE)


@pytest.mark.parametrize(
    ("is_local", "variable", "may_grow"), [(True, None, False), (False, None, True), (False, "1", False)]
)
def test_what_the_nodes_lack_is_waited_for_only_where_nodes_can_come(
    monkeypatch: pytest.MonkeyPatch, is_local: bool, variable: str | None, may_grow: bool
) -> None:
    """On Slurm, whose nodes are all there is, a fleet that asks for more would wait until its time is over."""
    told: list[bool] = []
    monkeypatch.setattr(cluster, "start_ray", lambda **_: is_local)
    monkeypatch.setattr(cluster, "check_resources", lambda *_, may_grow: told.append(may_grow))
    monkeypatch.delenv("TRANSLORA_FIXED_CLUSTER", raising=False)
    if variable is not None:
        monkeypatch.setenv("TRANSLORA_FIXED_CLUSTER", variable)
    cli.start_cluster(ResourceConfig(), 1, verbose=False)
    assert told == [may_grow]
    assert "TRANSLORA_FIXED_CLUSTER=1" in (ROOT / "launch" / "migrate.sbatch").read_text()


def test_a_head_node_that_does_not_answer_is_named_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for a quarter of an hour, without a word."""
    ray.shutdown()  # what tests before it may have started
    monkeypatch.setattr(cluster, "HEAD_SECONDS", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # bound, and nobody listens
        address = f"127.0.0.1:{port}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(
            RunFailedError, match=rf":{port}: no Ray cluster answers.*start its head node, or correct RAY"
        ):
            cluster.start_ray()
        free.listen()
        cluster.wait_for_head(address, "RAY_ADDRESS")
    cluster.wait_for_head("ray://nowhere:1", "RAY_ADDRESS")


def test_an_error_that_nobody_foresaw_is_no_fault_of_the_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it is one of Python's own ValueErrors."""

    def buggy(_: object) -> int:
        return len(list(zip([1], [], strict=True)))

    monkeypatch.setattr(cli, "run_status", buggy)
    assert main(["status", "run"]) == cli.CRASHED
    shown = capsys.readouterr().err
    assert "zip() argument 2 is shorter" in shown + caplog.text and "translora: zip" not in shown


@pytest.fixture
def run_of_one(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"run_dir": "run"}')
    save_state(tmp_path, AdapterState(name="orders", bundle="orders", status="quarantined", reason="a → b"))
    return tmp_path


@pytest.mark.parametrize("arguments", [["status"], ["status", "--watch", "0.1"], ["report"]])
def test_a_reader_that_goes_away_changes_no_exit_code(run_of_one: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command, *flags = arguments
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "translora", command, str(run_of_one), *flags],
            cwd=ROOT,
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_terminal_without_arrows_is_written_to(run_of_one: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "translora", "status", str(run_of_one)],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "a ? b" in done.stdout, done.stderr


def test_a_path_that_cannot_be_reached_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / ("long" * 80))]) == 2
    said = capsys.readouterr().err
    assert "File name too long; correct the path" in said and said.count("\n") == 1


def test_samples_without_adapters_are_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("run_dir: run\nsource: {model: ./a}\ntarget: {model: ./b}\nadapters: [c]\n")
    assert main(["plan", str(path), "--samples", "300"]) == 2
    assert "--samples: is of the N adapters of --adapters; give both" in capsys.readouterr().err
