"""What every registered operator does with operands that are none of its: an error in words, never
a crash.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anyflow.ops  # noqa: F401, registers the operators

FUZZER = Path(__file__).parent / "scripts" / "fuzz_operators.py"
Z = torch.zeros
# Of each operator, operands of sizes that are only read to make a result like them, and what the
# error names.
REFUSED = {
    "gated_residual_backward": [
        ((Z(1, 64, 64), Z(1, 1, 64), Z(1, 1, 64)), "y"),
        ((Z(1, 64, 64), Z(64), Z(1, 1, 64)), "y"),
        ((Z(1, 64, 64), Z(1, 64, 64), Z(1, 0, 64)), "gate"),
    ],
    "layer_norm_modulate_backward": [
        ((Z(1, 4, 64), Z(1, 4, 64), Z(8), Z(1, 1, 64), 1e-6), "shift"),
        ((Z(1, 4, 64), Z(1, 4, 64), Z(1, 1, 64), Z(1, 1, 64), float("nan")), "eps"),
        ((Z(1, 4, 64), Z(1, 4, 64), Z(1, 1, 64), Z(1, 1, 64), -1.0), "eps"),
    ],
    "residual_layer_norm_backward": [
        (
            (None, Z(1, 4, 64), None, Z(1, 4, 64), None, None, None, Z(8), Z(1, 1, 64), 1e-6),
            "shift",
        ),
        ((None, Z(1, 4, 64), None, Z(1, 4, 64), None, Z(64), Z(8), None, None, 1e-6), "bias"),
        ((None, Z(1, 4, 64), Z(1, 1, 64), Z(1, 4, 64), None, None, None, None, None, 1e-6), "y"),
    ],
    "linear": [((Z([]), Z(4, 1), None), "x"), ((Z(2, 3), Z(4, 3), Z(5)), "bias")],
    "linear_backward": [((Z(3, 4), Z(2, 3), Z(4, 3), True, True, True), "grad")],
    "gelu": [((torch.zeros(1).expand(2**40),), ".*")],
    "gelu_backward": [((Z(3), Z(4)), "grad")],
    "rms_norm_rope": [
        ((Z(1, 4, 64), Z(64), Z(4, 16), Z(4, 8), 2), "sin"),
        ((Z(1, 4, 64), Z(64), None, None, -(2**63)), "num_heads"),
    ],
    "flow_map_inputs": [
        ((Z(2, 3, 8), Z(2, 3, 8), Z(3), Z([]), Z([]), None, torch.float32, True), "t"),
        (
            (Z(2, 3, 8), Z(2, 3, 8), Z(2), Z([]), Z([]), torch.tensor([2]), torch.float32, True),
            ".*",
        ),
    ],
    "flow_map_loss_backward": [((Z(3), Z(2, 3, 8), Z(2), 1.0), "grad")],
    "attention_backward": [((Z(1, 2, 1, 8),) * 5 + (Z(1, 1, 3),), "logsumexp")],
}


@pytest.mark.parametrize("suffix", ["", "_native"])
@pytest.mark.parametrize("name", REFUSED)
def test_wrong_operands_are_refused_by_name(name, suffix) -> None:
    operator = getattr(torch.ops.anyflow, name + suffix).default
    for args, operand in REFUSED[name]:
        with pytest.raises((ValueError, RuntimeError, IndexError), match=rf"\b{operand}\b"):
            operator(*args)


@pytest.mark.parametrize("suffix", ["", "_native"])
def test_freed_memory_is_refused(suffix) -> None:
    x = Z(1, 4, 64)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="memory of 0 bytes"):
        getattr(torch.ops.anyflow, f"gelu{suffix}").default(x)


def test_meta_tensors_are_checked_too() -> None:
    x, row = Z(1, 4, 64, device="meta"), Z(1, 3, 64, device="meta")
    with pytest.raises(ValueError, match="shift"):
        torch.ops.anyflow.layer_norm_modulate(x, row, row)
    with pytest.raises(ValueError, match="on meta"):
        torch.ops.anyflow.gated_residual(Z(1, 4, 64), x, Z(1, 1, 64))


def test_fuzzed(tmp_path, process_environment) -> None:
    """In a process of its own: a crash is a failure that names the call. ``make sanitize`` makes
    thousands of calls.
    """
    trace = tmp_path / "call"
    command = [sys.executable, FUZZER, "--calls", "400", "--seed", "5", "--trace", trace]
    done = subprocess.run(
        command, env=process_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-2000:]}\n{trace.read_text()}"
    assert "400 calls of" in done.stdout
