"""Run other programs as sections: the tuner of the row kernels and the operators' tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu import build
from gpu.run import DeviceRun, Skip
from gpu.state import FOLDER, ROOT
from gpu.supervisor import ended

TUNER = ROOT / "benchmarks" / "tune_rows.py"
TUNER_S, TUNER_SHARE = 60.0, 0.45  # at most, of the time that is left: probes and tests follow
TUNER_GRACE_S = 25.0  # for the kernel that it measures at the end of its time
STOP_S = 25.0  # of the budget that is kept for the tests that run at its end, and for the report
TESTS = ROOT / "tests" / "ops"
# Tests of kernels alone: those of the reference say nothing of a device's kernels, and two files
# test installations.
SELECTED = ("-m", "not slow", "-k", "triton or native")
IGNORED = ("test_ahead_of_time.py", "test_backend.py")
# A part of the tests, for --tiny.
TINY_KERNELS = "gelu and native and not compile"
TINY_TESTS = (str(TESTS / "test_operators.py"), "-m", "not slow", "-k", TINY_KERNELS)
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def run_tuner(run: DeviceRun, script: Path = TUNER) -> None:
    """Run ``tune_rows.py``, and keep what it has written whenever that changes."""
    seconds, out = min(TUNER_S, TUNER_SHARE * run.remaining()), FOLDER / "tune_rows.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(script), "--seconds", f"{seconds:.0f}", "--out", str(out)]
    command += ["--device", "cpu", "--tiny"] if run.tiny else []
    written = 0.0

    def keep() -> None:
        nonlocal written
        with contextlib.suppress(OSError, json.JSONDecodeError):  # not there yet, or half written
            changed = out.stat().st_mtime
            if changed > written:
                run.put("tune_rows", json.loads(out.read_text()))
                written = changed

    limit = min(seconds + TUNER_GRACE_S, run.remaining())
    status, stopped = build.run_program(command, limit, meanwhile=keep)
    if stopped:
        what = f"stopped, though it was asked to end after {seconds:.0f} s"
        raise Skip(f"budget: {what}; what it had written is kept")
    if status:
        raise RuntimeError(f"{script.name} {ended(status)}")


def run_tests(run: DeviceRun) -> None:
    """Run the operators' tests, which stop nothing, and record their counts and failures.

    The section is done when pytest has run to its end, also where tests failed; stopped earlier, it
    reports what it has and runs again in the next call.
    """
    absent = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if absent:
        raise Skip(f"not installed: {', '.join(absent)}")
    selected = [str(TESTS), *SELECTED, *(f"--ignore={TESTS / name}" for name in IGNORED)]
    limit = run.remaining() - (5.0 if run.tiny else STOP_S)
    report = pytest(list(TINY_TESTS) if run.tiny else selected, run.device.type, limit)
    run.put("pytest", report)
    passed, failed = report["passed"], report["failed"]
    if report["stopped"]:
        raise Skip(f"budget: stopped after {report['seconds']:.0f} s with {passed} passed")
    if failed:
        run.note(f"{failed} of {failed + passed} tests failed")
    if report["exit_status"] not in (0, 1):  # 1: tests have failed
        raise RuntimeError(f"pytest {ended(report['exit_status'])}: {report['output'][-300:]}")


def pytest(
    selected: list[str], device: str, limit_s: float, stop_s: float = STOP_S - 5.0
) -> dict[str, Any]:
    """Run tests with the runner's plugin, interrupted after a limit, and return their report.

    Args:
        selected: files and options that choose tests.
        device: ``"cuda"`` or ``"cpu"``.
        limit_s: seconds after which pytest is interrupted.
        stop_s: seconds after which it is killed if the interrupt has not ended it.
    """
    # Without the project's settings, which ask for plugins that may not be installed.
    options = ["-p", "gpu.pytest_plugin", "-c", os.devnull, f"--rootdir={ROOT}", "-q", "-rfE"]
    options += ["--import-mode=importlib", "-p", "no:cacheprovider", "--tb=line"]
    if device == "cuda" and importlib.util.find_spec("xdist") is not None:
        processors = len(os.sched_getaffinity(0))
        options += ["-n", str(max(1, processors - 2))]  # most of the time is a compiler's
    command, started = [sys.executable, "-m", "pytest", *options, *selected], time.monotonic()
    variables, log = {"ANYFLOW_TEST_DEVICE": device}, build.workplace() / "pytest.log"
    with log.open("wb") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        environment = build.environment() | variables
        limit = max(limit_s, 1.0)
        status, stopped = build.run_program(command, limit, stop_s, env=environment, **streams)
    seconds = round(time.monotonic() - started, 1)
    text = log.read_text(errors="replace")
    lines = text.strip().splitlines()
    counts = {kind: int(count) for count, kind in _COUNT.findall(lines[-1] if lines else "")}
    return {
        "exit_status": status,
        "stopped": stopped,
        "seconds": seconds,
        "passed": counts.get("passed", 0),
        "failed": sum(counts.get(kind, 0) for kind in ("failed", "error", "errors")),
        "skipped_tests": counts.get("skipped", 0),
        "failures": [line[:240] for line in lines if line.startswith(("FAILED ", "ERROR "))][:60],
        "output": text[-4000:],
    }
