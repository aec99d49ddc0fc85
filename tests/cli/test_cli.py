"""Test the command line: entry points, version, help."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import anyflow
from anyflow.cli import app
from anyflow.cli.examples import EPILOGS


def anyflow_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anyflow", *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_version_and_help(tmp_path: Path) -> None:
    assert (
        anyflow_command("--version", cwd=tmp_path).stdout.strip()
        == f"anyflow {anyflow.__version__}"
    )
    assert "demo" in anyflow_command("--help", cwd=tmp_path).stdout
    assert "--budget" in anyflow_command("demo", "--help", cwd=tmp_path).stdout


def test_every_command_ends_its_help_with_examples_that_it_understands() -> None:
    """Check each example's command and options against the help, and that its page exists."""
    docs = Path(__file__).parents[2] / "docs"
    names = [command.callback.__name__ for command in app.registered_commands]
    assert set(names) == set(EPILOGS)
    for name in names:
        output = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"}).output
        page = re.search(
            r"More: https://github.com/anyflow-video/anyflow/blob/main/docs/(\S+)", output
        )
        examples = re.findall(r"\$ (.*)", output)
        assert page is not None and (docs / page[1]).is_file() and examples, name
        for example in examples:
            assert f"anyflow {name} " in f"{example.strip()} ", example
            named = re.findall(r" (--[a-z][a-z-]+)", example.partition("anyflow ")[2])
            assert all(option in output.partition("Examples:")[0] for option in named), example


def test_unknown_command_is_a_usage_error(tmp_path: Path) -> None:
    result = anyflow_command("fly", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "fly" in result.stderr


def test_a_warning_is_one_line_and_names_can_be_shown_in_any_encoding() -> None:
    program = (
        "import sys, warnings; from anyflow.cli import main; sys.argv = ['anyflow', '--version']\n"
        "try: main()\n"
        "except SystemExit: warnings.warn('one thing'); print('熊猫', '\\udcff')\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stderr == "anyflow: warning: one thing\n"
    assert done.stdout.splitlines()[1] == "\\u718a\\u732b \\udcff"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "completed"), [("anyflow do", ["doctor"]), ("anyflow demo --budget fu", ["full"])]
)
def test_a_shell_completes_commands_and_choices(
    line: str, completed: list[str], tmp_path: Path
) -> None:
    command = tmp_path / "anyflow"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m anyflow "$@"\n')
    command.chmod(0o755)
    words = line.split()
    script = (
        'source <(anyflow --show-completion bash); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        '"$(complete -p anyflow | sed "s/.*-F \\([^ ]*\\).*/\\1/")" anyflow; printf "%s\\n" '
        '"${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == completed and done.stderr == ""
