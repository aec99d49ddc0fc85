"""Put the modules of benchmarks/, which is no package, on Python's path, and begin tiny runs."""

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def device_run(tmp_path: Path):
    """Begin a tiny run of the GPU runner on the CPU."""
    from gpu.run import DeviceRun
    from gpu.state import RunFile

    file = RunFile(tmp_path / "cpu-tiny.json", {"runs": [{}], "sections": {}})
    return DeviceRun(torch.device("cpu"), True, file, time.monotonic() + 1000, "section")
