"""Keys are planted in environment and configs; no file, log line or message of a run may hold one."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reports import HOSTILE, make_run
from tests.secrets import PLANTED, URLS
from translora.cli import main
from translora.config import FleetConfig
from translora.report.html import write_report
from translora.run.cluster import ray_arguments
from translora.run.log import SafeFormatter
from translora.run.redact import printable, redact, without_secrets
from translora.run.rundir import open_run
from translora.run.state import AdapterState, save_state
from translora.run.tracker import Tracker

SECRETS = [*PLANTED.values(), *URLS.values()]


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def assert_clean(text: str) -> None:
    assert not [secret for secret in SECRETS if secret in text], text


def config(run_dir: Path) -> FleetConfig:
    """A fleet whose every free value holds a key in a URL."""
    store, models, signed = URLS
    return FleetConfig.model_validate(
        {
            "run_dir": run_dir,
            "source": {"model": models},
            "target": {"model": signed},
            "adapters": [{"bundle": f"{store}/*", "eval_data": f"{store}/held-out.jsonl"}],
            "distill": {"ds_config": f"{models}/zero3.json"},
            "resources": {"ray_address": "ray://me:planted-url-password@head:10001"},
            "tracking": {"wandb_project": "fleet", "wandb_mode": "offline"},
        }
    )


def test_nothing_that_a_run_writes_holds_a_key(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = config(run_dir)
    said = " ".join([*URLS, *PLANTED.values()])
    with (
        open_run(run_dir, settings),
        Tracker(run_dir, settings.tracking, settings.model_dump(mode="json"), "demo") as tracker,
    ):
        tracker.log({"loss/student": 1.0}, step=1, adapter="orders")
        save_state(run_dir, AdapterState(name="orders", bundle=f"{next(iter(URLS))}/orders", reason="damaged"))
    write_report(run_dir)
    written = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert {"config.json", "versions.json", "metrics.jsonl", "report.html", "state.json"} <= {p.name for p in written}
    assert any(path.suffix == ".wandb" for path in written)
    for path, content in written.items():
        found = [secret for secret in SECRETS if secret.encode() in content]
        assert not found, f"{path} holds {found}"
    assert b"***@models.example" in written[run_dir / "config.json"]
    assert_clean(redact(said))


def test_a_rerun_takes_the_same_config_with_its_keys_for_the_same(tmp_path: Path) -> None:
    for _ in range(2):
        with open_run(tmp_path / "run", config(tmp_path / "run")):
            (tmp_path / "run" / "rounds").mkdir(exist_ok=True)
    other = config(tmp_path / "run").model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match="other settings") as fault, open_run(tmp_path / "run", other):
        pass
    assert_clean(str(fault.value))


@pytest.mark.parametrize("verbose", [False, True])
def test_ray_gives_the_workers_no_key(verbose: bool) -> None:
    assert_clean(json.dumps(ray_arguments(address="10.0.0.1:6379", verbose=verbose)))


def test_log_lines_and_tracebacks_hold_neither_keys_nor_control_characters() -> None:
    try:
        raise OSError(f"cannot reach {next(iter(URLS))} with {PLANTED['HF_TOKEN']} \x1b[2J")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", ("a\x1b]0;owned\x07",), sys.exc_info())
    line = SafeFormatter("%(message)s").format(record)
    assert_clean(line)
    assert line.startswith("a\\x1b]0;owned\\x07\n") and "Traceback" in line
    assert line.replace("\n", "").isprintable()


def test_the_driver_logs_through_that_formatter() -> None:
    code = (
        "import logging\n"
        "from translora.run.log import setup_logging\n"
        "setup_logging()\n"
        "logging.getLogger('elsewhere').warning('token %s \\x1b[2J', __import__('os').environ['HF_TOKEN'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "token *** \\x1b[2J" in done.stderr


def test_the_last_line_of_a_command_is_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"no\x1b[2Jrun-{PLANTED['HF_TOKEN']}"
    assert main(["status", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert_clean(error)
    assert error.count("\n") == 1 and "no\\x1b[2Jrun-***: not a run directory" in error


def test_what_is_hidden_and_what_is_not() -> None:
    config = {
        "hub_token": "hf_abc",
        "nested": [{"api_key": "k", "password": "p"}],
        "source": "https://me:hunter2@models.example/base",
        "max_new_tokens": 96,
        "max_answer_tokens": 64,
        "token": None,
    }
    assert without_secrets(config) == {
        "hub_token": "***",
        "nested": [{"api_key": "***", "password": "***"}],
        "source": "https://***@models.example/base",
        "max_new_tokens": 96,
        "max_answer_tokens": 64,
        "token": None,
    }


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/adapters/v1@2", "http://host:8080/a@b", "/data/me@work/base", "org/base", "a|b: c", "key=value"],
)
def test_ordinary_values_stay(text: str) -> None:
    assert redact(text) == text and printable(text) == text


def test_short_values_of_secret_variables_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "base")
    assert redact("a base") == "a base"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202egnp", "\\u202egnp"),
        ("\u2028", "\\u2028"),
        ("ρ – 東", "ρ – 東"),
    ],
)
def test_control_characters_are_spelt_out(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text, keep="\n") == (text if text == "a\nb" else shown)


def test_the_page_shows_hostile_names_as_text(tmp_path: Path) -> None:
    hostile = AdapterState(name="orders", bundle=HOSTILE, task_name=HOSTILE, status="quarantined", reason=HOSTILE)
    hostile.synthesis.classes = {HOSTILE: 3}
    hostile.synthesis.screen = hostile.synthesis.warning = HOSTILE
    run_dir = make_run(tmp_path / "run", [hostile])
    (run_dir / "config.json").write_text(json.dumps({"run_dir": HOSTILE, "source": {"model": HOSTILE}}))
    page = write_report(run_dir).read_text()
    assert page.count("<script>") == 1 and "alert('x')" not in page and page.count("&lt;script&gt;") >= 7
