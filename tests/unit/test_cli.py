import subprocess
import sys
from pathlib import Path

import pytest

from translora.cli import build_parser, main


def test_help_and_configs_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys; import translora.cli, translora.config, translora.run.status, translora.report.html\n"
        "translora.cli.build_parser().format_help()\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'wandb'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["migrate", "prepare", "status", "report"])
def test_every_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


def test_bad_input_gives_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not a run directory" in error
