"""Which kernels are right on this device: the operators' self-check, then their tests in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from gpu.context import Context
from gpu.state import ROOT

TEST_LIMIT_S = 150.0
KERNELS = ("triton", "native")
# A part of the tests, for --tiny: every kind of answer that a run can get, in seconds.
TINY_TESTS = ("tests/ops/test_dual_timestep_embedding.py", "-k", "empty or bad_input")


def run_checks(context: Context) -> None:
    """Record ``wrong``, operator to backends, from both; a test that fails without naming a backend condemns all."""
    wrong = _self_check(context)
    context.put("wrong", wrong)
    tests = _pytest(context)
    context.put("pytest", tests)
    for op, backends in tests.get("wrong", {}).items():
        wrong[op] = sorted({*wrong.get(op, []), *backends})
    context.put("wrong", wrong)
    if wrong:
        names = ", ".join(f"{op} ({', '.join(backends)})" for op, backends in sorted(wrong.items()))
        context.fail(f"wrong kernels: {names}")
    elif tests.get("exit_status", 0):
        context.fail(f"pytest ended with exit status {tests['exit_status']}")


def _self_check(context: Context) -> dict[str, list[str]]:
    """``anyflow doctor``'s check of every operator on every backend against its reference in fp64."""
    from anyflow.doctor.self_check import CASES, Check, self_check

    wrong: dict[str, set[str]] = {}
    results = [result for result in self_check(context.device) if isinstance(result, Check)]
    checks = [check for check in results if check.op in CASES]  # one without a case says nothing of its kernel
    for check in checks:
        if check.problem is not None and check.backend in KERNELS:
            wrong.setdefault(check.op, set()).add(check.backend)
    fields = ("op", "backend", "dtype", "forward_error", "backward_error", "problem")
    context.put("self_check", [{name: getattr(check, name) for name in fields} for check in checks])
    return {op: sorted(backends) for op, backends in wrong.items()}


def _pytest(context: Context) -> dict[str, Any]:
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}; the self-check alone has looked at the kernels"}
    limit = TEST_LIMIT_S if context.tiny else min(TEST_LIMIT_S * context.slowness, context.remaining() / 3)
    # As the worker finds the package. Without the project's settings, which ask for plugins that may not be installed.
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); from gpu import build; "
        f"build.find_package({context.device.type!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    selected = TINY_TESTS if context.tiny else ("tests/ops",)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-c", os.devnull, "--rootdir=.", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
        options += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        if context.cuda and importlib.util.find_spec("xdist") is not None:
            options += ["-n", "4"]  # most of the time is the compiler's, on the CPU
        variables = os.environ | {"ANYFLOW_TEST_DEVICE": context.device.type, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, *options, *selected]
        try:
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"skipped": f"stopped after {limit:.0f} s; the self-check alone has looked at the kernels"}
        if not report.exists():
            return {"exit_status": done.returncode, "output": (done.stdout + done.stderr)[-4000:], "wrong": {}}
        return {"exit_status": done.returncode, "output": done.stdout[-4000:], **read_report(report.read_text())}


def read_report(xml: str) -> dict[str, Any]:
    """Counts of a JUnit report, and the operators and backends that its failures accuse."""
    cases = list(ET.fromstring(xml).iter("testcase"))
    failures = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    wrong: dict[str, set[str]] = {}
    for case in failures:
        module = re.search(r"test_(\w+?)(?:\.py)?$", case.get("file") or case.get("classname") or "")
        if module is None:
            continue
        name = case.get("name") or ""
        named = [backend for backend in KERNELS if re.search(rf"\b{backend}\b", name)]
        if not named and re.search(r"\beager\b", name):
            continue  # the reference itself: the device's torch, not a kernel of ours
        wrong.setdefault(module.group(1), set()).update(named or KERNELS)
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped_tests": skipped,
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failures[:40]],
        "wrong": {op: sorted(backends) for op, backends in wrong.items()},
    }
