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


Backends = dict[str, list[str]]  # by operator


def run_checks(context: Context) -> None:
    """Record two lists of kernels by operator: ``wrong``, of which a test failed, and ``wrong_numbers`` among them."""
    wrong, wrong_numbers = _self_check(context)
    context.put("wrong_numbers", wrong_numbers)  # at once: a stop during the tests must not lose it
    context.put("wrong", wrong)
    tests = _pytest(context)
    context.put("pytest", tests)
    wrong = _merged(wrong, tests.get("wrong", {}))
    context.put("wrong_numbers", _merged(wrong_numbers, tests.get("wrong_numbers", {})))
    context.put("wrong", wrong)
    if wrong:
        names = ", ".join(f"{op} ({', '.join(backends)})" for op, backends in sorted(wrong.items()))
        context.fail(f"tests failed: {names}")
    elif tests.get("exit_status", 0):
        context.fail(f"pytest ended with exit status {tests['exit_status']}")


def _merged(*lists: Backends) -> Backends:
    operators = sorted({op for found in lists for op in found})
    return {op: sorted({backend for found in lists for backend in found.get(op, [])}) for op in operators}


def _self_check(context: Context) -> tuple[Backends, Backends]:
    """``anyflow doctor``'s check of every operator on every backend against its reference in fp64."""
    from anyflow.doctor.self_check import CASES, Check, self_check

    results = [result for result in self_check(context.device) if isinstance(result, Check)]
    checks = [check for check in results if check.op in CASES]  # one without a case says nothing of its kernel
    bad = [check for check in checks if check.problem is not None and check.backend in KERNELS]
    numbers = [check for check in bad if (check.problem or "").startswith(("values", "gradients"))]
    fields = ("op", "backend", "dtype", "forward_error", "backward_error", "problem")
    context.put("self_check", [{name: getattr(check, name) for name in fields} for check in checks])
    wrong, wrong_numbers = (_merged(*({check.op: [check.backend]} for check in found)) for found in (bad, numbers))
    return wrong, wrong_numbers


def _pytest(context: Context) -> dict[str, Any]:
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}; the self-check alone has looked at the kernels"}
    limit = TEST_LIMIT_S if context.tiny else min(TEST_LIMIT_S * context.slowness, context.remaining() / 3)
    selected = TINY_TESTS if context.tiny else ("tests/ops",)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Without the project's settings, which ask for plugins that may not be installed.
        options = ["-p", "gpu.pytest_plugin", "-c", os.devnull, "--rootdir=.", "--import-mode=importlib", "-q"]
        options += ["-p", "no:cacheprovider"]
        options += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        if context.cuda and importlib.util.find_spec("xdist") is not None:
            workers = max(1, min(8, (os.cpu_count() or 1) // 2))  # most of the time is the compiler's, on the CPU
            options += ["-n", str(workers)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        variables = os.environ | {"ANYFLOW_TEST_DEVICE": context.device.type, "PYTHONPATH": path}
        command = [sys.executable, "-m", "pytest", *options, *selected]
        try:
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"skipped": f"stopped after {limit:.0f} s; the self-check alone has looked at the kernels"}
        if not report.exists():
            return {"exit_status": done.returncode, "output": (done.stdout + done.stderr)[-4000:], "wrong": {}}
        return {"exit_status": done.returncode, "output": done.stdout[-4000:], **read_report(report.read_text())}


def read_report(xml: str) -> dict[str, Any]:
    """Counts of a JUnit report, and the operators and backends that its failures accuse.

    A failure that names no backend accuses all of the operator's kernels. One by an assertion is of wrong numbers, any
    other exception may be of the installation.
    """
    from anyflow.ops.backend import OPERATORS

    cases = list(ET.fromstring(xml).iter("testcase"))
    failures = [(case, found) for case in cases if (found := _failure(case)) is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    wrong, wrong_numbers = [], []
    for case, message in failures:
        module = re.search(r"test_(\w+?)(?:\.py)?$", case.get("file") or case.get("classname") or "")
        name = case.get("name") or ""
        op = "" if module is None else module.group(1)
        named = [backend for backend in KERNELS if re.search(rf"\b{backend}\b", name)]
        if op not in OPERATORS or (not named and re.search(r"\beager\b", name)):
            continue  # of no operator, or of the reference itself: torch's on this device, not a kernel of ours
        wrong.append({op: named or list(KERNELS)})
        if message.startswith(("AssertionError", "assert")):
            wrong_numbers.append(wrong[-1])
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped_tests": skipped,
        "failures": [f"{c.get('classname')}::{c.get('name')}: {message[:160]}" for c, message in failures[:60]],
        "wrong": _merged(*wrong),
        "wrong_numbers": _merged(*wrong_numbers),
    }


def _failure(case: ET.Element) -> str | None:
    """The message of a test that failed, else None."""
    for tag in ("failure", "error"):
        found = case.find(tag)
        if found is not None:
            return found.get("message") or ""
    return None
