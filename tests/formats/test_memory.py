"""Measure the memory of loading, in processes that do nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "peak_memory.py"
MARGIN = 90  # MB: the mapped part of a file, one tensor in another type, and what allocators keep


def run(*arguments: object) -> list[float]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return [
        float(n)
        for n in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    ]


@pytest.mark.slow
def test_loading_does_not_need_the_model_twice(tmp_path: Path) -> None:
    """Load one file, several, a training file with two sets of weights, and merged adapters."""
    (size,) = run("make", tmp_path)
    assert size > 300
    for name, dtype, share in (
        ("one", "float32", 1.0),
        ("several", "bfloat16", 0.5),
        ("training.pt", "float32", 1.0),
    ):
        peak, held = run("load", tmp_path / name, dtype)
        assert share * size < held < share * size + 30, (name, peak, held)
        assert peak < share * size + MARGIN, (name, peak, held)
    peak, held = run("load", tmp_path / "lora.pt", "float32")
    # a weight of 4.2 million elements and its sum, in fp64
    assert peak < size + MARGIN + 2 * 8 * 4.2, (peak, held)
