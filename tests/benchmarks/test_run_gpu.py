"""Test whole runs of benchmarks/run_gpu.py on tiny shapes, in processes that are killed too."""

from __future__ import annotations

import json
import os
import shutil
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

from run_gpu import ORDER, SHORT, parse
from sizes import TINY_CAUSAL

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu.py"
TINY = ("--device", "cpu", "--tiny")
DIRECTIONS = ("forward", "backward")


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start a run from another folder than the checkout, with a runner's folder of its own."""
    left_out = ("TRITON_INTERPRET", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment |= {"ANYFLOW_GPU_RUNNER": str(folder / "runner"), **variables}
    command = [sys.executable, str(SCRIPT), "--out", str(folder / "out"), *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd="/", env=environment, **streams)


def run(folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Return exit status and output."""
    process = start(folder, *arguments, **variables)
    output = process.communicate()[0]
    return process.returncode, output


def only(*names: str) -> list[str]:
    """Return the options of a short plan without all other sections."""
    others = [argument for name in SHORT if name not in names for argument in ("--skip", name)]
    return ["--plan", "short", *others]


def result(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "out" / "cpu-tiny.json").read_text())
    return data


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 900.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def status(folder: Path, section: str) -> str | None:
    path = folder / "out" / "cpu-tiny.json"
    return result(folder)["sections"].get(section, {}).get("status") if path.exists() else None


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_every_section_runs(tmp_path: Path) -> None:
    code, output = run(tmp_path, *TINY, "--budget-s", "3000")
    assert code == 0, output
    data = result(tmp_path)
    assert set(data["sections"]) == set(ORDER) and data["warnings"] == []
    assert {section["status"] for section in data["sections"].values()} == {"done"}
    found = {name: section.get("data", {}) for name, section in data["sections"].items()}
    assert found["checks"]["wrong"] == {} and found["checks"]["counts"]["passed"] > 30
    assert found["tests"]["pytest"]["passed"] > 0 and found["limits"]["matmul_flops"] > 0
    assert found["limits"]["copy: 4 MiB, by the driver"]["samples_ms"]
    assert found["probes"]["host 1.3B, one frame: until enqueued"]["ms"] > 0
    for name in ("forward_1.3b", "forward_14b"):
        for variant in ("ours", "diffusers", "diffusers + compile"):
            assert len(found[name][variant]["samples_ms"]) == 2, variant
        assert found[name]["diffusers: relative difference from ours"] < 1e-5
    for name in ("sampling_1.3b", "sampling_14b"):
        steps = {n: found[name][f"ours NFE {n}"] for n in (1, 4, 8, 50)}
        assert all(e["ms"] > 0 and not e["extrapolated"] for e in steps.values())
        assert found[name]["diffusers NFE 4"]["ms"] > 0
    causal, chunks = found["causal_1.3b"], len(TINY_CAUSAL["1.3B"].chunk_partition)
    for n in (1, 2, 4):
        assert causal[f"ours NFE {n}"]["fps"] > 0
        assert len(causal[f"ours NFE {n}"]["chunks"]) == chunks
    assert causal["cache"]["kept_bytes"] == causal["cache"]["counted_bytes"]
    assert causal["caches on the host: the same bits"] is True
    assert causal["with decoding, chunk by chunk NFE 2"]["ms"] > causal["ours NFE 2"]["ms"]
    assert causal["ours, compiled blocks: relative difference"] < 1e-5
    assert causal["step of the last chunk: until enqueued"]["ms"] > 0
    # the same mathematics
    for name in ("pretrain_1.3b", "pretrain_causal_1.3b", "on_policy_1.3b"):
        assert found[name]["peers' formulation: relative difference from ours"] < 1e-3
        assert found[name]["ours"]["ms"] > 0 and found[name]["peers' formulation"]["ms"] > 0
    timed = [entry[way]["ms"] for entry in found["ops"].values() for way in DIRECTIONS]
    assert all(set(ms) == {"triton", "native", "eager", "compile"} for ms in timed)
    assert len({entry["op"] for entry in found["ops"].values()}) == 7
    assert found["attention"]["1.3B self backward"]["ms"].keys() >= {"native", "math"}
    assert found["profile_1.3b"]["ms_by_category"]["matrix products"] > 0
    tuned = found["tune_rows"]["tune_rows"]
    entry = tuned["tasks"]["layer_norm_modulate_forward D=64"]
    assert tuned["copy_bytes_per_s"] > 0 and len(entry["candidates"]) == 3 + 4
    # x and the result, shift and scale, in fp32
    assert entry["bytes"] == 4 * (2 * 64 * 5 + 2 * 64)
    assert entry["best_ms"] == min(entry["candidates"].values()) <= entry["today_ms"]
    assert data["environment"]["gpu"] is data["environment"]["diffusers_stand_in"] is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_short_plan_continues_after_kills_and_an_emptied_folder(tmp_path: Path) -> None:
    kept = ("build", "limits", "forward_1.3b", "attention", "forward_14b", "ops", "native")
    plan = (*TINY, *only(*kept), "--budget-s", "3000")
    process = start(tmp_path, *plan)
    wait_for(lambda: status(tmp_path, "attention") is not None, "attention")
    (worker,) = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not runs(worker), "the worker's end", 10)
    left = result(tmp_path)["sections"]
    assert left["limits"]["status"] == left["forward_1.3b"]["status"] == "done"
    assert left["attention"]["status"] in ("running", "done") and "native" not in left
    shutil.rmtree(tmp_path / "out")

    # The process that measures is killed, as a driver's error would: that costs one section.
    process = start(tmp_path, *plan)
    wait_for(lambda: status(tmp_path, "ops") == "running", "ops")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == 1 and "1 failed" in output, output
    data = result(tmp_path)
    assert "limits" in data["runs"][1]["kept"] and data["sections"]["limits"] == left["limits"]
    assert data["sections"]["ops"]["status"] == "failed"
    assert data["sections"]["ops"]["reason"] == "its process ended with signal 9"
    assert data["sections"]["native"]["run"] == 1 and data["sections"]["limits"]["run"] == 0
    assert data["sections"]["forward_14b"]["data"]["diffusers + compile"] == {
        "skipped": "not in the short plan"
    }
    shutil.rmtree(tmp_path / "out")

    code, output = run(tmp_path, *plan)
    assert code == 0, output
    data = result(tmp_path)
    sections = data["sections"]
    assert [name for name, section in sections.items() if section["run"] == 2] == ["ops"]
    assert {section["status"] for section in sections.values()} == {"done"}


@pytest.mark.slow
def test_without_diffusers_and_pytest_ours_is_measured(tmp_path: Path) -> None:
    """Test without pytest, and with a diffusers that does not import."""
    absent = "import sys\nsys.modules['pytest'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(absent)
    (tmp_path / "diffusers").mkdir()
    broken = "raise RuntimeError('needs another torch')\n"
    (tmp_path / "diffusers" / "__init__.py").write_text(broken)
    wanted = ("forward_1.3b", "pretrain_1.3b", "tests")
    code, output = run(tmp_path, *TINY, *only(*wanted), PYTHONPATH=str(tmp_path))
    assert code == 0, output
    sections = result(tmp_path)["sections"]
    assert list(sections) == list(wanted)
    problem = "diffusers does not import: RuntimeError: needs another torch"
    assert result(tmp_path)["environment"]["diffusers_stand_in"] == problem
    assert sections["forward_1.3b"]["data"]["ours"]["ms"] > 0
    assert sections["forward_1.3b"]["data"]["peers"] == f"not measured: {problem}"
    skipped = {"skipped": f"not measured: {problem}"}
    assert sections["pretrain_1.3b"]["data"]["peers' formulation"] == skipped
    assert sections["tests"]["status"] == "skipped"
    assert sections["tests"]["reason"] == "not installed: pytest"


@pytest.mark.slow
def test_without_budget_everything_is_skipped_with_the_reason(tmp_path: Path) -> None:
    code, output = run(tmp_path, *TINY, "--plan", "short", "--budget-s", "0")
    assert code == 0, output
    sections = result(tmp_path)["sections"]
    assert tuple(sections) == SHORT and all(s["status"] == "skipped" for s in sections.values())
    assert {s["reason"] for s in sections.values()} == {"budget: used up"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    code, output = run(tmp_path)
    assert code == 2 and "no CUDA device" in output and not list(tmp_path.iterdir())


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path))
    for arguments, message in (
        (("--device", "cpu", *out), "--device cpu needs --tiny"),
        (TINY, "--tiny needs --out DIR"),
        ((*TINY, *out, "--only", "forwards"), "--only 'forwards' is in the name of no section"),
        ((*TINY, *out, "--skip", "test"), "--skip 'test' is no section"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse(list(arguments))
        assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]
