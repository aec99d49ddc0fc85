"""Put the modules of benchmarks/, which is no package, on Python's path, and begin tiny runs."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@pytest.fixture
def on_backend() -> Callable[..., Any]:
    """Return what gives an operator's example, its result changed where a backend is forced."""
    import dataclasses

    from anyflow.ops.backend import forced_backend

    def changed(example: Any, backend: str, change: Callable[[Any], Any]) -> Any:
        def call(device: torch.device, dtype: torch.dtype) -> Any:
            made = example.call(device, dtype)

            def function(*inputs: torch.Tensor) -> Any:
                result = made.function(*inputs)
                return change(result) if (forced_backend() or ("",))[0] == backend else result

            return dataclasses.replace(made, function=function)

        fields = ("op", "dtype", "forward_bytes", "backward_bytes")
        known = {name: getattr(example, name) for name in fields}
        return SimpleNamespace(**known, name=backend, call=call)

    return changed
