"""benchmarks/run_gpu.py without a GPU: whole runs on tiny shapes, in real processes, some of which are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "run_gpu.py"
TINY = ("--device", "cpu", "--tiny")
SECTIONS = (
    *("build", "tests", "limits", "forward_1.3b", "attention", "ops", "forward_14b", "sampling_1.3b", "sampling_14b"),
    *("pretrain_1.3b", "on_policy_1.3b", "profile_1.3b", "native"),
)


def start(out: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """From another folder, as a checkout that is not installed would be used."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
    return subprocess.Popen(
        command, cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(out: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit status and output."""
    process = start(out, *arguments, **variables)
    output = process.communicate()[0]
    return process.returncode, output


def result(out: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / "cpu-tiny.json").read_text())
    return data


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def status(out: Path, section: str) -> str | None:
    path = out / "cpu-tiny.json"
    return result(out)["sections"].get(section, {}).get("status") if path.exists() else None


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_every_section_runs(tmp_path: Path) -> None:
    code, output = run(tmp_path, *TINY)
    assert code == 0, output
    data = result(tmp_path)
    assert tuple(data["sections"]) == SECTIONS
    assert {name: s["status"] for name, s in data["sections"].items() if s["status"] != "done"} == {"build": "skipped"}
    found = {name: section.get("data", {}) for name, section in data["sections"].items()}
    assert found["tests"]["wrong"] == {} and found["tests"]["pytest"]["passed"] > 5
    assert found["limits"]["matmul_flops"] > 0 and found["limits"]["copy"]["samples_ms"]

    for name in ("forward_1.3b", "forward_14b"):
        for variant in ("ours", "ours, torch's attention", "diffusers", "diffusers + compile"):
            entry = found[name][variant]
            assert entry["ms"] > 0 and len(entry["samples_ms"]) == 2, variant
        assert found[name]["diffusers: relative difference from ours"] < 1e-5
    for name in ("sampling_1.3b", "sampling_14b"):
        steps = {n: found[name][f"ours NFE {n}"] for n in (1, 4, 8, 50)}
        assert all(len(e["marks_ms"]) == n + 1 and not e["extrapolated"] for n, e in steps.items())
        assert found[name]["diffusers NFE 4"]["ms"] > 0
    for name in ("pretrain_1.3b", "on_policy_1.3b"):  # the same mathematics
        ours, peers = (found[name][f"{who}: losses"] for who in ("ours", "peers' formulation"))
        torch.testing.assert_close(list(ours.values()), list(peers.values()), rtol=1e-3, atol=0)
        assert found[name]["ours"]["ms"] > 0 and found[name]["peers' formulation"]["ms"] > 0

    operators = {entry["op"] for entry in found["ops"].values()}
    assert len(operators) == 7 and all(
        set(entry[direction]["ms"]) == {"triton", "native", "eager", "compile"}
        for entry in found["ops"].values()
        for direction in ("forward", "backward")
    )
    assert found["attention"]["1.3B self backward"]["ms"].keys() >= {"native", "math"}
    assert found["profile_1.3b"]["ms_by_category"]["matrix products"] > 0
    environment = data["environment"]
    assert environment["packages"]["torch"] == torch.__version__ and environment["gpu"] is None
    assert not environment["diffusers_stand_in"] and len(environment["commit"]) == 40


@pytest.mark.slow
def test_without_diffusers_and_pytest_ours_is_measured(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('diffusers', 'pytest'):\n    sys.modules[name] = None  # as if not installed\n"
    )
    code, output = run(tmp_path, *TINY, "--only", "1.3b", PYTHONPATH=str(tmp_path))
    assert code == 0, output
    code, output = run(tmp_path, *TINY, "--only", "tests", PYTHONPATH=str(tmp_path))
    assert code == 0, output
    found = {name: section["data"] for name, section in result(tmp_path)["sections"].items()}
    assert result(tmp_path)["environment"]["diffusers_stand_in"]
    assert found["forward_1.3b"]["ours"]["ms"] > 0
    assert found["forward_1.3b"]["peers"] == "not measured: diffusers is not installed"
    assert found["pretrain_1.3b"]["peers' formulation"] == {"skipped": "not measured: diffusers is not installed"}
    assert found["tests"]["pytest"]["skipped"].startswith("not installed: pytest") and found["tests"]["self_check"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_keeps_what_it_has_and_the_next_one_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, *TINY, "--skip-tests")
    wait_for(lambda: status(tmp_path, "attention") is not None, "attention")
    (worker,) = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not runs(worker), "the worker's end", 10)
    left = result(tmp_path)["sections"]
    assert left["limits"]["status"] == left["forward_1.3b"]["status"] == "done"
    assert left["attention"]["status"] in ("running", "done") and "native" not in left

    code, output = run(tmp_path, *TINY, "--skip-tests")
    assert code == 0, output
    data = result(tmp_path)
    assert "limits" in data["runs"][1]["kept"] and data["sections"]["limits"] == left["limits"]
    assert all(section["status"] in ("done", "skipped") for section in data["sections"].values())
    assert data["sections"]["native"]["run"] == 1 and data["sections"]["limits"]["run"] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_crash_costs_one_section(tmp_path: Path) -> None:
    """The process that measures is killed, as a driver's error would: the rest runs in another one."""
    process = start(tmp_path, *TINY, "--only", "s")  # tests, limits, ops, sampling
    wait_for(lambda: status(tmp_path, "ops") == "running", "ops")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == 1, output
    sections = result(tmp_path)["sections"]
    assert sections["ops"]["status"] == "failed" and sections["ops"]["reason"] == "its process ended with signal 9"
    others = {name: section["status"] for name, section in sections.items() if name != "ops"}
    assert set(others.values()) == {"done"} and "sampling_14b" in others
    assert "1 failed" in output


def test_without_budget_everything_is_skipped_with_the_reason(tmp_path: Path) -> None:
    code, output = run(tmp_path, *TINY, "--budget-s", "0")
    assert code == 0, output
    sections = result(tmp_path)["sections"]
    assert set(sections) == set(SECTIONS) and all(s["status"] == "skipped" for s in sections.values())
    assert {s["reason"] for s in sections.values()} == {"budget: used up"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    code, output = run(tmp_path)
    assert code == 2 and "no CUDA device" in output and not list(tmp_path.iterdir())


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    assert run(tmp_path, "--device", "cpu")[0] == 2  # the published sizes
    without_out = subprocess.run([sys.executable, str(SCRIPT), *TINY], capture_output=True, text=True)
    assert without_out.returncode == 2 and "--tiny needs --out DIR" in without_out.stderr
    code, output = run(tmp_path, *TINY, "--only", "forwards")
    assert code == 2 and output.splitlines()[-1].startswith("run_gpu.py: error: --only 'forwards'")
