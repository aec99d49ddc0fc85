"""Test how commands end: after a system error, after Ctrl-C, with streams closed or full."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from anyflow.cli.errors import Commands

ANYFLOW = f"{sys.executable} -m anyflow"


def _shell(command: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=cwd,
        capture_output=True,
        env={**os.environ, **environment},
    )


def _end_of(command: object) -> tuple[int, str]:
    app = typer.Typer(cls=Commands)
    app.command("run")(command)  # type: ignore[type-var]
    app.command("other")(lambda: None)
    result = CliRunner().invoke(app, ["run"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_what_the_system_refuses_is_one_line_with_path_and_reason(tmp_path: Path) -> None:
    assert _end_of(lambda: os.mkdir(tmp_path)) == (1, f"anyflow: {tmp_path}: File exists\n")
    both = f"anyflow: {tmp_path} to {tmp_path / 'a' / 'b'}: No such file or directory\n"
    assert _end_of(lambda: os.rename(tmp_path, tmp_path / "a" / "b")) == (1, both)

    def library() -> None:
        raise OSError("Error no file named\n  model.bin")

    assert _end_of(library) == (1, "anyflow: Error no file named model.bin\n")


def test_ctrl_c_ends_every_command_with_130() -> None:
    # a shell's background ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert _end_of(lambda: signal.raise_signal(signal.SIGINT)) == (130, "\nStopped.\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_bug_stays_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        _end_of(lambda: 1 / 0)


def test_output_that_nobody_can_read_is_no_traceback(tmp_path: Path) -> None:
    full = _shell(f"{ANYFLOW} --version > /dev/full", tmp_path)
    assert (full.returncode, full.stderr) == (
        1,
        b"anyflow: standard output: No space left on device\n",
    )
    assert _shell(f"{ANYFLOW} --version >&-", tmp_path).returncode == 0
    both = _shell(f"{ANYFLOW} fly <&- >&- 2>&-", tmp_path)
    assert both.returncode == 2
    gone = _shell(f"({ANYFLOW} --version; echo $? >&2) | true", tmp_path)
    assert gone.stderr in (b"0\n", b"1\n")  # as the shell's `true` ends before or after it


def test_names_that_the_terminal_has_no_characters_for_are_printed_all_the_same(
    tmp_path: Path,
) -> None:
    done = _shell(
        f"{ANYFLOW} $'\\xc3\\xa9\\xff'", tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"No such command" in done.stderr


def test_a_command_runs_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = _shell(f"cd gone && rmdir ../gone && {ANYFLOW} --version", tmp_path)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
