"""Test what the device checks of benchmarks/run_gpu.py say of kernels, and what follows from it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("triton")

from gpu import checks, device_checks, kernels, network_checks, outcomes, programs, worker
from gpu.outcomes import Backends, DeviceCheck, Outcome
from gpu.run import DeviceRun, RunSection, Skip
from gpu.sections import FORWARD, PRETRAIN

from anyflow.ops import examples

CPU = torch.device("cpu")


def outcome_of(name: str, accuses: Backends, numbers: bool = True, ok: bool = False) -> Outcome:
    problem = None if ok else "the error is 1.0e+00, allowed are 1.0e-03"
    return outcomes.failed(DeviceCheck(name, 1e-3, float, accuses), problem, numbers, 1.0)


def test_a_wrong_kernel_stops_only_what_runs_it(device_run: DeviceRun) -> None:
    """Test that a wrong network, and sizes that no network has, are warnings and stop nothing."""
    device_run.name = "checks"
    found = [
        outcome_of("flow_map_loss: native", {"flow_map_loss": ["native"]}),
        # which no network runs here
        outcome_of("gated_residual: triton", {"gated_residual": ["triton"]}),
        # it raised
        outcome_of("rms_norm_rope: native", {"rms_norm_rope": ["native"]}, numbers=False),
        outcome_of("a network", {}),
        outcome_of("gelu: native", {"gelu": ["native"]}, ok=True),
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
    assert len(warnings) == 4
    wrong = {"flow_map_loss", "gated_residual", "rms_norm_rope"}
    assert device_run.wrong_kernels().keys() == wrong

    device_run.name, example = "ops", kernels.on_device(device_run)[4]
    assert example.op == "rms_norm_rope"
    directions = ("forward", "backward")
    kernels._measure_examples(device_run, [example], ("native", "eager"), directions, 1)
    entry = device_run.get(example.name)
    assert entry["forward"]["not_timed"] == {"native": "wrong: a check of it failed"}
    assert all(set(entry[direction]["ms"]) == {"eager"} for direction in directions)


def test_wrong_kernels_are_found_out(on_backend: Callable[..., Any]) -> None:
    example, found = examples.row_examples(42, 64, 21)[0], {}
    written = torch.arange(42)[:, None] < 41
    for how, change in (
        ("right", lambda result: result),
        ("the error is", lambda result: result * 1.01),
        ("not the same bits twice", lambda result: torch.where(written, result, torch.nan)),
    ):
        made = on_backend(example, "native", change)
        check = DeviceCheck(how, 5e-3, lambda e=made: device_checks._compare(e, "native", CPU))
        found[how] = outcomes.evaluate(check)
    right = found.pop("right")
    assert right["ok"] and right["error"] > 1e-4
    for how, outcome in found.items():
        assert not outcome["ok"] and outcome["numbers"] and outcome["problem"].startswith(how)
    raised = outcomes.evaluate(DeviceCheck("x", 1.0, lambda: [][0]))
    assert not raised["ok"] and not raised["numbers"]
    assert raised["problem"] == "IndexError: list index out of range"


def test_the_catalogue_covers_every_operator_with_kernels() -> None:
    found = device_checks.catalogue(CPU, True)
    assert {op for check in found for op in check.accuses} == set(PRETRAIN)


def test_the_checks_of_the_causal_network_pass() -> None:
    found = [c for c in network_checks.catalogue(CPU, True) if "causal" in c.name]
    outcomes_ = [outcomes.evaluate(check) for check in found]
    assert len(found) == 4 and all(outcome["ok"] for outcome in outcomes_), outcomes_


@pytest.mark.slow
def test_a_check_that_takes_its_process_down_costs_no_other_check(device_run: DeviceRun) -> None:
    names = [check.name for check in device_checks.catalogue(CPU, True)][::-1]  # networks last
    found: list[Outcome] = []

    def keep(outcome: Outcome) -> None:
        found.append(outcome)
        if len(found) == 1:
            (child,) = (c for c in psutil.Process().children() if "gpu.check_part" in c.cmdline())
            before = sum(child.cpu_times())
            while sum(child.cpu_times()) == before:  # until it is at another check
                time.sleep(0.001)
            child.kill()

    deadline = time.monotonic() + 3000
    checks.run_part(device_run, names, deadline, keep)
    assert {outcome["name"] for outcome in found} == set(names)
    (failed,) = (outcome for outcome in found if not outcome["ok"])
    assert failed["name"] != names[0] and not failed["numbers"]
    assert "its process ended with signal 9" in failed["problem"]
    device_run.device = torch.device("meta")  # no process can measure there
    with pytest.raises(RuntimeError, match="its process ended with exit status 1"):
        checks.run_part(device_run, names, deadline, keep)


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
