"""Runs the tuner of the kernels over rows, a program of its own, as a section."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

from gpu import build
from gpu.context import Context, Skip
from gpu.state import FOLDER, ROOT

TUNER = ROOT / "benchmarks" / "tune_rows.py"
TUNER_S = 60.0
TUNER_SHARE = 0.45  # at most, of the time that is left: probes and tests follow
TUNER_GRACE_S = 25.0  # for the kernel that it measures at the end of its time


def run_tuner(context: Context, script: Path = TUNER) -> None:
    """Run ``tune_rows.py`` in a process of its own, and keep what it has written whenever that
    changes.
    """
    if not script.exists():
        raise Skip(f"no {script.relative_to(ROOT) if script.is_relative_to(ROOT) else script}")
    seconds = min(TUNER_S, TUNER_SHARE * context.remaining())
    out = FOLDER / "tune_rows.json"
    out.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "gpu.child",
        str(script),
        "--seconds",
        f"{seconds:.0f}",
        "--out",
        str(out),
    ]
    command += ["--device", "cpu", "--tiny"] if context.tiny else []
    process = subprocess.Popen(command, cwd=build.workplace(), env=build.environment())
    deadline, written = time.monotonic() + min(seconds + TUNER_GRACE_S, context.remaining()), 0.0
    try:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            written = _keep(context, out, written)
    finally:
        stopped = process.poll() is None
        if stopped:
            process.kill()
            process.wait()
        _keep(context, out, written)
    if stopped:
        raise Skip(
            f"budget: stopped, though it was asked to end after {seconds:.0f} s; what it had "
            "written is kept"
        )
    if process.returncode:
        raise RuntimeError(f"{script.name} ended with exit status {process.returncode}")


def _keep(context: Context, out: Path, written: float) -> float:
    """Put the tuner's file into the results if it is newer than ``written``; return the time of the
    one kept.
    """
    try:
        changed = out.stat().st_mtime
        if changed > written:
            context.put("tune_rows", json.loads(out.read_text()))
            return changed
    except (OSError, json.JSONDecodeError):  # not there yet, or half written
        pass
    return written
