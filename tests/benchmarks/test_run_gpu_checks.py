"""Test what the device checks of benchmarks/run_gpu.py say of kernels, and what follows from it."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gpu import checks, device_checks, kernels, programs, worker
from gpu.device_checks import NETWORKS, OPERATOR, RECORD, Backends, DeviceCheck, Outcome
from gpu.run import DeviceRun, RunSection, Skip
from gpu.sections import FORWARD, PRETRAIN

from anyflow.ops import examples
from anyflow.ops.backend import forced_backend
from anyflow.ops.examples import OperatorCall

CPU = torch.device("cpu")


def outcome(
    name: str, accuses: Backends, stops: str, numbers: bool = True, ok: bool = False
) -> dict[str, object]:
    problem = None if ok else "the error is 1.0e+00, allowed are 1.0e-03"
    return dataclasses.asdict(Outcome(name, ok, 1.0, 1e-3, problem, numbers, 0.1, accuses, stops))


def test_a_wrong_kernel_stops_only_what_runs_it(device_run: DeviceRun) -> None:
    """Test that a wrong network, and sizes that no network has, are warnings and stop nothing."""
    device_run.name = "checks"
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
    checks.conclude(device_run, found)
    device_run.require_right_kernels(FORWARD)
    with pytest.raises(Skip, match=r"not timed: wrong numbers of flow_map_loss \(native\)$"):
        device_run.require_right_kernels(PRETRAIN)
    section = RunSection("pretrain", "pretrain", 1.0, lambda r: r.put("x", 1), PRETRAIN)
    worker._run(section, device_run)
    assert device_run.file.status("pretrain") == "skipped"
    warnings = device_run.file.data["warnings"]
    assert warnings[-1] == "a network: the error is 1.0e+00, allowed are 1.0e-03"
    assert len(warnings) == 6
    wrong = {"flow_map_loss", "gated_residual", "layer_norm_modulate", "rms_norm_rope"}
    assert device_run.wrong_kernels().keys() == wrong

    device_run.name, example = "ops", kernels.on_device(device_run)[0]
    directions = ("forward", "backward")
    kernels._measure_examples(device_run, [example], ("native", "eager"), directions, 1)
    entry = device_run.get(example.name)
    assert entry["forward"]["not_timed"] == {"native": "wrong: a check of it failed"}
    assert all(set(entry[direction]["ms"]) == {"eager"} for direction in directions)


def with_native_result(example: examples.Example, how: str) -> SimpleNamespace:
    """Return the same operator with a native kernel that is wrong in one way."""

    def call(device: torch.device, dtype: torch.dtype) -> OperatorCall:
        made = example.call(device, dtype)

        def function(*inputs: Tensor) -> Tensor:
            result = made.function(*inputs)
            if how == "right" or forced_backend() != ("native", "forced by use_backend()"):
                return result
            if how == "numbers":
                return result * 1.01
            return torch.where(torch.arange(42)[:, None] < 41, result, torch.nan)

        return dataclasses.replace(made, function=function)

    return SimpleNamespace(op=example.op, dtype=example.dtype, call=call)


def test_wrong_kernels_are_found_out() -> None:
    example, found = examples.row_examples(42, 64, 21)[0], {}
    for how in ("right", "numbers", "unwritten"):
        made = with_native_result(example, how)
        check = DeviceCheck(how, 5e-3, lambda e=made: device_checks._compare(e, "native", CPU))
        found[how] = device_checks.evaluate(check)
    assert found["right"].ok and 1e-4 < (found["right"].error or 0.0)
    for how, message in (("numbers", "the error is"), ("unwritten", "not the same bits twice")):
        assert not found[how].ok and found[how].numbers
        assert (found[how].problem or "").startswith(message)
    raised = device_checks.evaluate(DeviceCheck("x", 1.0, lambda: [][0]))
    assert not raised.ok and not raised.numbers
    assert raised.problem == "IndexError: list index out of range"


def test_the_catalogue_covers_every_operator_with_kernels() -> None:
    found = device_checks.catalogue(CPU, True)
    accused = {op for c in found for op in c.accuses if c.stops == NETWORKS}
    assert accused == set(PRETRAIN)


@pytest.mark.slow
def test_a_check_that_takes_its_process_down_costs_no_other_check(
    device_run: DeviceRun, tmp_path: Path
) -> None:
    wanted = device_checks.catalogue(CPU, True)[:6]
    part = checks.Part(device_run, tmp_path / "part", wanted, time.monotonic() + 200)
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

    unknown = [DeviceCheck("of another device", 1.0, float)]
    part = checks.Part(device_run, tmp_path / "other", unknown, part._deadline)
    while part.runs():
        time.sleep(0.05)
    # nothing is accused
    assert "KeyError: 'of another device'" in (part.problem or "") and part.outcomes == {}


# Other programs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tests_that_fail_and_tests_that_hang_are_reported(tmp_path: Path) -> None:
    """Test this in the background too, where processes ignore the interrupt."""
    file = tmp_path / "test_gelu.py"
    file.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    report = programs.pytest([str(file)], "cpu", limit_s=300.0)
    assert report["exit_status"] == 1 and not report["stopped"]
    assert (report["passed"], report["failed"]) == (1, 1), report
    assert "test_wrong" in report["failures"][0]
    file.write_text("import time\ndef test_hangs(): time.sleep(1000)\n")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        report = programs.pytest([str(file)], "cpu", limit_s=1.0, stop_s=10.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert report["stopped"] and report["seconds"] < 60


@pytest.mark.slow
def test_what_the_tuner_has_written_is_kept_when_it_is_killed(
    device_run: DeviceRun, tmp_path: Path
) -> None:
    script = tmp_path / "tuner.py"
    script.write_text(
        "import argparse, os, pathlib\n"
        "import anyflow.kernels.tokens as tokens\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('seconds', 'out', 'device'): parser.add_argument(f'--{name}')\n"
        "parser.add_argument('--tiny', action='store_true')\n"
        "options = parser.parse_args()\n"
        "assert options.device == 'cpu' and options.tiny and float(options.seconds) == 60\n"
        "pathlib.Path(options.out).write_text('{\"rows\": 1}')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(RuntimeError, match="ended with signal 9"):
        programs.run_tuner(device_run, script)
    assert device_run.get("tune_rows") == {"rows": 1}
