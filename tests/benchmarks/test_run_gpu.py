"""benchmarks/run_gpu.py without a GPU: its checks run on the interpreter, its table and its byte counts are right."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu.py"


@pytest.fixture
def run_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("run_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """From another folder, as a checkout that is not installed would be used."""
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


def test_checks_every_operator_on_the_interpreter(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--output", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "r.json").read_text())
    checked = {entry["case"].split("[")[0] for entry in data["checks"]}
    assert len(checked) == 7 and all(entry["passed"] for entry in data["checks"])
    assert data["environment"]["torch"] == torch.__version__ and data["environment"]["gpu"] is None
    assert data["ops"] == [] and data["copy"] is None  # off a GPU nothing is timed


def test_a_run_cut_short_keeps_what_it_has(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    done = run("--device", "cpu", "--output", str(output), "--budget", "0.0")
    assert done.returncode == 1 and "budget used up" in done.stdout
    assert json.loads(output.read_text())["checks"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "r.json"))
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_wrong_kernel_fails_the_check(run_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are relative to the largest element; NaN is never a pass."""
    one, nan = torch.ones(4, dtype=torch.float64), torch.full((4,), torch.nan)
    assert run_gpu._error([2 * one.float()], [one]) == 1.0
    assert not run_gpu._error([nan], [one]) <= 1e9
    case = run_gpu.op_cases.small_cases()[0]
    monkeypatch.setattr(run_gpu, "TOLERANCE", {torch.bfloat16: 1e-9})
    assert not run_gpu.check(case, torch.device("cpu"))["passed"]


def test_byte_counts(run_gpu: ModuleType) -> None:
    """By hand, for L = 32760, D = 1536, R = 21: x is 32760 * 1536 * 2 bytes, a modulation row set 21 * 1536 * 4."""
    cases = {(c.op, c.variant, c.dim, c.rows): c for c in run_gpu.op_cases.model_cases()}
    norm = cases["layer_norm_modulate", "bf16", 1536, 21]
    x, rows = 100_638_720, 129_024
    assert (norm.forward_bytes, norm.backward_bytes) == (2 * x + 2 * rows, 3 * x + 3 * rows)
    residual = cases["residual_layer_norm", "gate+affine", 1536, 21]
    assert (residual.forward_bytes, residual.backward_bytes) == (4 * x + rows, 6 * x + 2 * rows)
    assert {(c.dim, c.rows) for c in cases.values() if c.op == "rms_norm_rope"} == {
        (1536, 1),
        (1536, 21),
        (5120, 1),
        (5120, 21),
    }


def test_table(run_gpu: ModuleType) -> None:
    direction = {
        "ms": {"triton": 0.05, "eager": 0.5, "compile": 0.1},
        "gb_s": {"triton": 4000.0},
        "of_copy": 0.9,
        "speedup_over_eager": 10.0,
        "speedup_over_compile": 2.0,
    }
    environment = {"gpu": "G", "torch": "2", "triton": "3", "cuda": "13", "commit": "abc", "clean": True}
    ops = [{"case": "norm", "forward": direction, "backward": direction}, {"case": "rope", "error": "E: no\nmore"}]
    table = run_gpu.table({"environment": environment, "copy": 4400.0, "ops": ops})
    assert "| norm | backward | 0.0500 | 4000 | 90% | 10.00 | 2.00 |" in table
    assert "| rope | failed: E: no |" in table and "4400 GB/s" in table
