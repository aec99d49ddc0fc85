"""benchmarks/run_gpu.py: what its device checks and its operator tests say of kernels, and what
follows from that.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import op_cases
from gpu import checks, device_checks, kernels, operator_tests, tuner, worker
from gpu.context import Context, Section, Skip
from gpu.device_checks import NETWORKS, OPERATOR, RECORD, Backends, DeviceCheck, Outcome
from gpu.sections import FORWARD, PRETRAIN
from gpu.state import RunFile
from op_cases import Call, Case

from anyflow.ops.backend import forced_backend

CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A tiny run that has just begun."""
    file = RunFile(tmp_path / "cpu-tiny.json", {"runs": [{}], "sections": {}})
    return Context(CPU, True, file, time.monotonic() + 1000, "checks")


def outcome(
    name: str, accuses: Backends, stops: str, numbers: bool = True, ok: bool = False
) -> dict[str, object]:
    problem = None if ok else "the error is 1.0e+00, allowed are 1.0e-03"
    return dataclasses.asdict(Outcome(name, ok, 1.0, 1e-3, problem, numbers, 0.1, accuses, stops))


def test_a_wrong_kernel_stops_only_what_runs_it(context: Context) -> None:
    """A network that is wrong, and sizes that no network has, are warnings and stop nothing."""
    found = [
        outcome("flow_map_loss: native", {"flow_map_loss": ["native"]}, NETWORKS),
        # which no network runs here
        outcome("gated_residual: triton", {"gated_residual": ["triton"]}, NETWORKS),
        # it raised
        outcome("rms_norm_rope: native", {"rms_norm_rope": ["native"]}, NETWORKS, numbers=False),
        outcome("a stream", {"layer_norm_modulate": ["native"]}, OPERATOR),
        outcome("2^31", {"residual_layer_norm": ["native"]}, RECORD),
        outcome("a network", {}, RECORD),
        outcome("gelu: native", {"gelu": ["native"]}, NETWORKS, ok=True),
    ]
    checks.conclude(context, found)
    context.require_right_kernels(FORWARD)
    with pytest.raises(Skip, match=r"not timed: wrong numbers of flow_map_loss \(native\)$"):
        context.require_right_kernels(PRETRAIN)
    worker._run(Section("pretrain", "pretrain", 1.0, lambda c: c.put("x", 1), PRETRAIN), context)
    assert context.file.status("pretrain") == "skipped"
    assert (
        context.file.data["warnings"][-1] == "a network: the error is 1.0e+00, allowed are 1.0e-03"
    )
    assert len(context.file.data["warnings"]) == 6
    wrong = {"flow_map_loss", "gated_residual", "layer_norm_modulate", "rms_norm_rope"}
    assert context.wrong_kernels().keys() == wrong

    context.name, cases = "ops", {case.op: case for case in kernels.cases(context)}
    kernels._measure_cases(context, [cases["layer_norm_modulate"]], ("native", "eager"), None)
    entry = context.file.get("ops", cases["layer_norm_modulate"].name)
    assert entry["forward"]["not_timed"] == {"native": "wrong: a check of it failed"}
    assert set(entry["forward"]["ms"]) == set(entry["backward"]["ms"]) == {"eager"}


def test_a_failing_test_skips_no_network_and_accuses_rows_by_numbers_alone(
    context: Context,
) -> None:
    accused = {"gated_residual": ["native"]}
    context.file.section("tests")["data"] = {"wrong": accused, "wrong_numbers": {}}
    assert context.wrong_kernels() == {}
    context.file.section("tests")["data"]["wrong_numbers"] = accused
    assert context.wrong_kernels() == accused
    context.require_right_kernels(PRETRAIN)


def broken(case: Case, how: str) -> Case:
    """The same operator with a native kernel that is wrong in one way."""

    def build(device: torch.device, dtype: torch.dtype) -> Call:
        call = case.build(device, dtype)

        def function(*inputs: Tensor) -> Tensor:
            result = call.function(*inputs)
            if forced_backend() != ("native", "forced by use_backend()"):
                return result
            return (
                result * 1.01
                if how == "numbers"
                else torch.where(torch.arange(42)[:, None] < 41, result, torch.nan)
            )

        return Call(function, call.inputs, call.wanted)

    return dataclasses.replace(case, build=build)


def test_wrong_kernels_are_found_out() -> None:
    case = op_cases.row_cases(42, 64, 21)[0]
    found = {}
    for how, checked in (
        ("right", case),
        *((how, broken(case, how)) for how in ("numbers", "unwritten")),
    ):
        check = DeviceCheck(
            how, 5e-3, lambda c=checked: device_checks._compare(c, "native", CPU), {"o": ["native"]}
        )
        found[how] = device_checks.evaluate(check)
    assert found["right"].ok and 1e-4 < (found["right"].error or 0.0)
    assert (
        not found["numbers"].ok
        and found["numbers"].numbers
        and (found["numbers"].error or 0.0) > 9e-3
    )
    assert not found["unwritten"].ok and found["unwritten"].numbers
    assert (found["unwritten"].problem or "").startswith("not the same bits twice, or NaN")
    raised = device_checks.evaluate(DeviceCheck("x", 1.0, lambda: [][0]))
    assert (
        not raised.ok
        and not raised.numbers
        and raised.problem == "IndexError: list index out of range"
    )


def test_the_catalogue_covers_every_operator_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyflow.doctor import self_check

    found = device_checks.catalogue(CPU, True)
    accused = {
        op
        for check in found
        for op, names in check.accuses.items()
        if check.stops == NETWORKS and names
    }
    assert accused == set(PRETRAIN)
    monkeypatch.setattr(self_check, "TOLERANCE", {torch.float32: 1e-12})  # which nothing holds
    wrong = next(check for check in found if check.name == "rms_norm_rope, small: native")
    assert "float32: values are off by" in (device_checks.evaluate(wrong).problem or "")


@pytest.mark.slow
def test_a_check_that_takes_its_process_down_costs_no_other_check(
    context: Context, tmp_path: Path
) -> None:
    wanted = device_checks.catalogue(CPU, True)[:14]
    part = checks.Part(context, tmp_path / "part", wanted, time.monotonic() + 200)
    try:
        while not part._started:  # of the first check, which takes the longest
            assert part.runs()
        first = part._process
        first.kill()
        while part.runs():
            time.sleep(0.05)
    finally:
        part.stop()
    assert part._process is not first and part.outcomes.keys() == {check.name for check in wanted}
    (failed,) = (found for found in part.outcomes.values() if not found["ok"])
    assert "its process ended with signal 9" in failed["problem"] and not failed["numbers"]

    part = checks.Part(
        context, tmp_path / "other", [DeviceCheck("of another device", 1.0, float)], part._deadline
    )
    while part.runs():
        time.sleep(0.05)
    # nothing is accused
    assert "KeyError: 'of another device'" in (part.problem or "") and part.outcomes == {}


# Operator tests -----------------------------------------------------------------------------------


def test_failures_of_pytest_accuse_operators_and_backends() -> None:
    numbers, other = (
        '<failure message="AssertionError: not close"/>',
        '<failure message="RuntimeError: no compiler"/>',
    )
    cases = [
        ("tests/ops/test_gelu.py", "test_values[native-float32]", numbers),
        ("tests/ops/test_gated_residual.py", "test_compiles", other),  # names no backend
        # the reference itself
        ("tests/ops/test_rms_norm_rope.py", "test_values[eager-float16]", "<error/>"),
        ("tests/ops/test_ahead_of_time.py", "test_values[triton]", numbers),  # no operator
        ("tests/ops/test_rms_norm_rope.py", "test_values[triton-float16]", ""),
        ("tests/ops/test_gelu.py", "test_values[triton-float32]", "<skipped/>"),
    ]
    xml = "".join(
        f'<testcase classname="c" file="{file}" name="{name}">{x}</testcase>'
        for file, name, x in cases
    )
    report = operator_tests.read_report(f"<testsuites><testsuite>{xml}</testsuite></testsuites>")
    assert (report["passed"], report["failed"], report["skipped_tests"]) == (1, 4, 1)
    assert report["wrong"] == {"gelu": ["native"], "gated_residual": ["native", "triton"]}
    assert report["wrong_numbers"] == {"gelu": ["native"]}
    assert report["failures"][0] == "c::test_values[native-float32]: AssertionError: not close"


@pytest.mark.slow
def test_tests_that_are_interrupted_report_what_they_have(tmp_path: Path) -> None:
    """With pytest-xdist, as on a GPU, and started in the background, where processes ignore the
    interrupt.
    """
    pytest.importorskip("xdist")
    (tmp_path / "test_gelu.py").write_text(
        "import os, signal, time\n"
        "def test_right_triton(): pass\n"
        "def test_wrong_triton(): assert 1 == 2\n"
        "def test_hangs():\n"
        "    time.sleep(0.5)\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "    time.sleep(1000)\n"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        report = operator_tests.pytest([str(tmp_path), "-n", "1"], "cpu", limit_s=300.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert report["exit_status"] == 2 and not report["stopped"]
    # and not the one that was interrupted
    assert (report["passed"], report["failed"]) == (1, 1), report
    (tmp_path / "test_gelu.py").write_text("import time\ndef test_hangs(): time.sleep(1000)\n")
    # it has not even started
    report = operator_tests.pytest([str(tmp_path)], "cpu", limit_s=1.0, stop_s=10.0)
    assert report["stopped"] and report["seconds"] < 60


@pytest.mark.slow
def test_what_the_tuner_has_written_is_kept_when_it_is_killed(
    context: Context, tmp_path: Path
) -> None:
    with pytest.raises(Skip, match=r"^no .*tune_rows.py$"):
        tuner.run_tuner(context, tmp_path / "tune_rows.py")
    script = tmp_path / "tuner.py"
    script.write_text(
        "import argparse, os, pathlib\n"
        "import anyflow.kernels.rows as rows\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('seconds', 'out', 'device'): parser.add_argument(f'--{name}')\n"
        "parser.add_argument('--tiny', action='store_true')\n"
        "options = parser.parse_args()\n"
        "assert options.device == 'cpu' and options.tiny and float(options.seconds) == 60\n"
        "pathlib.Path(options.out).write_text('{\"rows\": 1}')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(RuntimeError, match="exit status -9"):
        tuner.run_tuner(context, script)
    assert context.file.get("checks", "tune_rows") == {"rows": 1}
