"""Runs the operators' tests on the device, last of all: they see more than a run measures, and stop
nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from gpu import build
from gpu.context import Context, Skip, merged
from gpu.state import ROOT

STOP_S = 25.0  # of the budget that is kept for the tests that run at its end, and for the report
KERNELS = ("triton", "native")
# Tests of kernels alone: those of the reference say nothing of a device's kernels, and two files
# test installations.
SELECTED = ("-m", "not slow", "-k", "triton or native")
IGNORED = ("test_ahead_of_time.py", "test_backend.py")
# A part of the tests, for --tiny: every kind of answer that a run can get, in seconds.
TINY_TESTS = ("tests/ops/test_dual_timestep_embedding.py", "-k", "empty or bad_input")


def run_tests(context: Context) -> None:
    """Record the counts, the failures and the kernels that they accuse.

    The section is done when pytest has run to its end, also where tests failed; stopped earlier, it
    reports what it has and runs again in the next call.
    """
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"not installed: {', '.join(missing)}")
    tests = ROOT / "tests" / "ops"
    selected = [str(tests), *SELECTED, *(f"--ignore={tests / name}" for name in IGNORED)]
    if context.tiny:
        selected = [str(ROOT / TINY_TESTS[0]), *TINY_TESTS[1:]]
    report = pytest(
        selected, context.device.type, context.remaining() - (5.0 if context.tiny else STOP_S)
    )
    context.put("pytest", report)
    context.put("wrong", report.get("wrong", {}))
    context.put("wrong_numbers", report.get("wrong_numbers", {}))
    if report["stopped"]:
        raise Skip(
            f"budget: stopped after {report['seconds']:.0f} s with {report.get('passed', 0)} passed"
        )
    if report.get("failed"):
        context.note(f"{report['failed']} of {report['failed'] + report['passed']} tests failed")
    if report["exit_status"] not in (0, 1):  # 1: tests have failed
        raise RuntimeError(
            f"pytest ended with exit status {report['exit_status']}: {report['output'][-300:]}"
        )


def pytest(
    selected: list[str], device: str, limit_s: float, stop_s: float = STOP_S - 5.0
) -> dict[str, Any]:
    """Run tests with the runner's plugin, interrupted after a limit; the result is their report and
    how they ended.

    Args:
        selected: files and options that choose tests.
        device: ``"cuda"`` or ``"cpu"``.
        limit_s: seconds after which pytest is interrupted.
        stop_s: seconds after which it is killed if the interrupt has not ended it; its report is
            lost then.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Without the project's settings, which ask for plugins that may not be installed.
        options = [
            "-p",
            "gpu.pytest_plugin",
            "-c",
            os.devnull,
            f"--rootdir={ROOT}",
            "--import-mode=importlib",
            "-q",
        ]
        options += ["-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        if device == "cuda" and importlib.util.find_spec("xdist") is not None:
            options += ["-n", str(workers())]  # most of the time is a compiler's
        command = [sys.executable, "-m", "pytest", *options, *selected]
        variables = build.environment() | {"ANYFLOW_TEST_DEVICE": device}
        with (Path(folder) / "output").open("w+b") as output:
            started = time.monotonic()
            process = subprocess.Popen(
                command,
                cwd=build.workplace(),
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                # the interrupt is for pytest and its workers, and for nobody else
                start_new_session=True,
            )
            stopped = False
            try:
                process.wait(timeout=max(limit_s, 1.0))
            except subprocess.TimeoutExpired:
                stopped = True
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=stop_s)
            finally:
                build.stop_group(process)
            output.seek(0)
            text = output.read().decode(errors="replace")
        found: dict[str, Any] = {
            "exit_status": process.returncode,
            "stopped": stopped,
            "output": text[-4000:],
        }
        found["seconds"] = round(time.monotonic() - started, 1)
        return found | (read_report(report.read_text()) if report.exists() else {})


def workers() -> int:
    """Return how many processes run tests: one for each processor but two."""
    processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, processors - 2)


def read_report(xml: str) -> dict[str, Any]:
    """Count the tests of a JUnit report, and list the operators and backends that its failures
    accuse.

    A failure that names no backend accuses all of the operator's kernels. One by an assertion is of
    wrong numbers, any other exception may be of the installation.
    """
    from anyflow.ops.backend import OPERATORS

    # The test during which pytest was interrupted has no name.
    cases = [case for case in ET.fromstring(xml).iter("testcase") if case.get("name")]
    failures = [(case, found) for case in cases if (found := _failure(case)) is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    wrong, wrong_numbers = [], []
    for case, message in failures:
        module = re.search(
            r"test_(\w+?)(?:\.py)?$", case.get("file") or case.get("classname") or ""
        )
        name = case.get("name") or ""
        op = "" if module is None else module.group(1)
        named = [backend for backend in KERNELS if re.search(rf"\b{backend}\b", name)]
        if op not in OPERATORS or (not named and re.search(r"\beager\b", name)):
            # of no operator, or of the reference itself: torch's on this device, not a kernel of
            # ours
            continue
        wrong.append({op: named or list(KERNELS)})
        if message.startswith(("AssertionError", "assert")):
            wrong_numbers.append(wrong[-1])
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped_tests": skipped,
        "failures": [
            f"{c.get('classname')}::{c.get('name')}: {message[:160]}"
            for c, message in failures[:60]
        ],
        "wrong": merged(*wrong),
        "wrong_numbers": merged(*wrong_numbers),
    }


def _failure(case: ET.Element) -> str | None:
    """Return the message of a test that failed, else None."""
    for tag in ("failure", "error"):
        found = case.find(tag)
        if found is not None:
            return found.get("message") or ""
    return None
