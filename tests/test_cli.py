"""The command line itself: entry points, version, help."""

import subprocess
import sys
from pathlib import Path

import anyflow


def anyflow_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "anyflow", *arguments], cwd=cwd, capture_output=True, text=True)


def test_version_and_help(tmp_path: Path) -> None:
    assert anyflow_command("--version", cwd=tmp_path).stdout.strip() == f"anyflow {anyflow.__version__}"
    assert "demo" in anyflow_command("--help", cwd=tmp_path).stdout
    assert "--budget" in anyflow_command("demo", "--help", cwd=tmp_path).stdout


def test_unknown_command_is_a_usage_error(tmp_path: Path) -> None:
    result = anyflow_command("fly", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "fly" in result.stderr
