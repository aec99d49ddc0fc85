"""List the sections of a run, with the seconds that each takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from anyflow.ops.backend import OPERATORS
from gpu.run import DeviceRun, RunSection

# that a network runs, and those of its pretrain loss too
PRETRAIN = tuple(OPERATORS)
FORWARD = tuple(op for op in OPERATORS if not op.startswith("flow_map"))


def _late(path: str, /, **arguments: Any) -> Callable[[DeviceRun], None]:
    """Return a function that is imported when it runs: its imports fail for its section alone."""

    def run(of: DeviceRun) -> None:
        module, _, function = path.partition(".")
        getattr(importlib.import_module(f"gpu.{module}"), function)(of, **arguments)

    return run


_forward, _sampling = "models.run_forward", "models.run_sampling"
# Seconds on an H100 or H200 with its software read once, compilation included.
SECTIONS = (
    RunSection(
        "checks", "is what runs on this device right?", 50, _late("checks.run_checks"), resumes=True
    ),
    RunSection("limits", "matrix products and copies", 5, _late("kernels.run_limits")),
    RunSection("forward_1.3b", "one forward at 1.3B", 80, _late(_forward, name="1.3B"), FORWARD),
    RunSection("attention", "every attention backend", 5, _late("kernels.run_attention")),
    RunSection("sampling_1.3b", "samples at 1.3B", 12, _late(_sampling, name="1.3B"), FORWARD),
    RunSection(
        "causal_1.3b",
        "the causal model at 1.3B, chunk by chunk",
        45,
        _late("causal.run_causal", name="1.3B"),
        FORWARD,
    ),
    RunSection("sampling_14b", "samples at 14B", 60, _late(_sampling, name="14B"), FORWARD),
    RunSection("forward_14b", "one forward at 14B", 55, _late(_forward, name="14B"), FORWARD),
    RunSection(
        "pretrain_1.3b",
        "a pretrain step at 1.3B",
        85,
        _late("models.run_training", method="pretrain"),
        PRETRAIN,
    ),
    RunSection(
        "pretrain_causal_1.3b",
        "a pretrain step of the causal model at 1.3B",
        75,
        _late("causal.run_causal_training"),
        PRETRAIN,
    ),
    RunSection(
        "on_policy_1.3b",
        "a generator and a critic step at 1.3B",
        120,
        _late("models.run_training", method="on-policy"),
        FORWARD,
    ),
    RunSection("ops", "every operator", 45, _late("kernels.run_operators"), resumes=True),
    RunSection(
        "profile_1.3b", "kernels of a forward at 1.3B", 15, _late("models.run_profile"), FORWARD
    ),
    RunSection("native", "native CUDA kernels against Triton's", 10, _late("kernels.run_native")),
    RunSection(
        "tune_rows",
        "launch options of the row kernels",
        40,
        _late("programs.run_tuner"),
        resumes=True,
    ),
    RunSection("probes", "single questions to the device", 40, _late("models.run_probes")),
    RunSection("tests", "the operators' tests", 30, _late("programs.run_tests")),
)
