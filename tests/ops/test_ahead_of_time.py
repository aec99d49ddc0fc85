"""Every kernel compiles for sm_80, sm_90 and sm_100 without spilling a register; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anyflow.ops.backend import OPERATORS

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
TRITON = [op for op, kernels in OPERATORS.items() if "triton" in kernels]
KERNELS = {f"{op}_{direction}" for op in TRITON for direction in ("forward", "backward")}
COMPILES = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
# Barriers of a token on sm_90 in bf16, at D = 1536 and at D = 5120; only a measurement on a GPU is
# a reason to raise one.
BARRIERS = {
    ("layer_norm_modulate_forward", ""): (6, 6),
    ("layer_norm_modulate_backward", ""): (6, 6),
    ("residual_layer_norm_forward", "gate+affine"): (6, 6),
    ("residual_layer_norm_backward", "gate+affine"): (6, 6),
    ("residual_layer_norm_forward", "modulation"): (2, 6),
    ("residual_layer_norm_backward", "modulation"): (6, 6),
    ("gated_residual_forward", ""): (2, 0),
    ("gated_residual_backward", ""): (2, 0),
    ("rms_norm_rope_forward", "rotary"): (0, 3),
    ("rms_norm_rope_backward", "rotary"): (3, 3),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run in another process: this one interprets the kernels, and cannot compile them."""
    command = [sys.executable, "-m", "anyflow.kernels.ahead_of_time", *arguments]
    return subprocess.run(command, cwd=ROOT.parent, env=COMPILES, capture_output=True, text=True)


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """Return the table as dictionaries, and print it for the output of the test."""
    process = run("--json", *arguments)
    entries = [json.loads(line) for line in process.stdout.splitlines()]
    for e in entries:
        print(*(f"{k}={v}" for k, v in e.items()))
    assert entries, process.stderr
    assert process.returncode == 0 or any(e["spills"] for e in entries), process.stderr
    return entries


def check(
    entries: list[dict[str, Any]], capabilities: set[int], dims: set[int], edges: bool
) -> None:
    assert {e["kernel"] for e in entries} == KERNELS | {"finish_sums"}
    assert {e["capability"] for e in entries} == capabilities
    assert {e["dim"] for e in entries if e["variant"] != "size 1"} - {0} == dims
    small = {e["kernel"] for e in entries if e["variant"] == "size 1"}
    assert small == (KERNELS | {"finish_sums"} if edges else set())
    assert all(0 < e["registers"] <= 255 for e in entries)
    spilling = [e for e in entries if e["spills"]]
    assert not spilling, spilling


@pytest.mark.slow
def test_every_kernel_everywhere() -> None:
    """Compile every width for sm_90, and the widest, with the most registers, for the others.

    A size of one is a constant, which the compiler folds before it knows the architecture.
    """
    check(compiled("--capabilities", "90"), {90}, {1536, 2048, 3072, 5120}, edges=True)
    others = compiled("--capabilities", "80", "100", "--dims", "5120", "--no-edges")
    check(others, {80, 100}, {5120}, edges=False)


@pytest.mark.slow
def test_the_machine_code_gets_no_worse() -> None:
    """Accesses have 16 bytes, nothing spills, and loads come before reductions where they fit."""
    entries = compiled("--report", "--rows", "1")
    assert {e["kernel"] for e in entries} == KERNELS
    shared = [e for e in entries if e["share"] is not None and e["dim"]]
    over_rows = {(e["kernel"], e["variant"], e["dim"]): e for e in shared}
    assert len(over_rows) == 20
    assert {(kernel, variant) for kernel, variant, _ in over_rows} == set(BARRIERS)
    for (kernel, variant, dim), e in over_rows.items():
        assert e["narrow"] == 0, e
        assert e["barriers"] <= BARRIERS[kernel, variant][dim == 5120], e
        assert 0.5 < e["share"]["H200"] <= e["share"]["H100"] < 1, e
    assert not [e for e in entries if e["spills"]]
    # times, widths, weights and gates, one number each
    assert all(e["narrow"] <= 6 for e in entries)
    late = {key for key, e in over_rows.items() if e["late_loads"]}
    assert late <= {
        ("residual_layer_norm_backward", "gate+affine", 5120),
        ("rms_norm_rope_forward", "rotary", 5120),
    }


@pytest.mark.slow
def test_a_spill_is_found(tmp_path: Path) -> None:
    """8192 fp32 numbers that are live at once in one warp do not fit into its registers."""
    script = tmp_path / "spill.py"
    script.write_text(
        "import torch, triton, triton.language as tl\n"
        "from anyflow.kernels.ahead_of_time import compile_launch\n"
        "from anyflow.kernels.launch import Launch\n"
        "@triton.jit\n"
        "def greedy(x_ptr, N: tl.constexpr):\n"
        "    i = tl.arange(0, N)\n"
        "    x = tl.load(x_ptr + i)\n"
        "    tl.store(x_ptr + i, x - tl.sum(x, 0) * tl.max(x, 0))\n"
        "x = torch.empty(16384, device='meta')\n"
        "print(compile_launch(Launch(greedy, (1,), (x,), {'N': 16384, 'num_warps': 1}), "
        "90)['spills'])\n"
    )
    command = [sys.executable, str(script)]
    process = subprocess.run(command, env=COMPILES, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 0


def test_an_interpreting_process_says_that_it_cannot() -> None:
    command = [sys.executable, "-m", "anyflow.kernels.ahead_of_time"]
    variables = COMPILES | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert process.returncode == 2 and "TRITON_INTERPRET=1 is set" in process.stderr
