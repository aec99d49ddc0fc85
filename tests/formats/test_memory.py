"""Measure the memory of loading, in processes that do nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "peak_memory.py"
MARGIN = 90  # MB: the mapped part of a file, one tensor in another type, and what allocators keep


@pytest.mark.slow
def test_loading_does_not_need_the_model_twice(tmp_path: Path) -> None:
    """Load one file, several, a training file with two sets of weights, and merged adapters."""
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    found = json.loads(done.stdout)
    size = found["size"]
    assert size > 200
    for name, share in (("one", 1.0), ("several", 0.5), ("training.pt", 1.0)):
        peak, held = found[name]
        assert share * size < held < share * size + 30, (name, peak, held)
        assert peak < share * size + MARGIN, (name, peak, held)
    peak, held = found["lora.pt"]
    # a weight of 4.2 million elements and its sum, in fp64
    assert peak < size + MARGIN + 2 * 8 * 4.2, (peak, held)
