"""Lists the sections of a run, and the order in which each plan runs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from gpu.context import Context, Section

# The operators that the networks run on kernels (proven by tests/benchmarks/test_run_gpu_parts.py).
FORWARD = (
    *(
        "attention",
        "dual_timestep_embedding",
        "gated_residual",
        "gelu",
        "layer_norm_modulate",
        "linear",
    ),
    *("residual_layer_norm", "rms_norm_rope"),
)
PRETRAIN = (*FORWARD, "flow_map_inputs", "flow_map_loss")


def _late(path: str, /, **arguments: Any) -> Callable[[Context], None]:
    """Return a function of a module of :mod:`gpu` that is imported when it runs: its imports fail
    for it alone.
    """

    def run(context: Context) -> None:
        module, _, function = path.partition(".")
        getattr(importlib.import_module(f"gpu.{module}"), function)(context, **arguments)

    return run


def _model(kind: str, size: str, seconds: float) -> Section:
    title = {"forward": f"one forward at {size}, 480x832x81", "sampling": f"samples at {size}"}[
        kind
    ]
    return Section(
        f"{kind}_{size.lower()}", title, seconds, _late(f"models.run_{kind}", name=size), FORWARD
    )


def _training(kind: str, title: str, seconds: float, operators: tuple[str, ...]) -> Section:
    return Section(
        f"{kind}_1.3b", f"{title} at 1.3B", seconds, _late(f"training.run_{kind}"), operators
    )


# Seconds on an H100 or H200 with its software read once, compilation included.
SECTIONS = (
    Section(
        "checks", "is what runs on this device right?", 45, _late("checks.run_checks"), resumes=True
    ),
    Section("limits", "bf16 matrix products and a copy", 5, _late("kernels.run_limits")),
    _model("forward", "1.3B", 80),
    Section("attention", "every attention backend", 5, _late("kernels.run_attention")),
    _model("sampling", "1.3B", 12),
    _model("sampling", "14B", 60),
    _model("forward", "14B", 55),
    _training("pretrain", "a pretrain step", 85, PRETRAIN),
    _training("on_policy", "a generator and a critic step", 120, FORWARD),
    Section("ops", "every operator", 45, _late("kernels.run_operators"), resumes=True),
    Section(
        "profile_1.3b",
        "where the time of a forward at 1.3B goes",
        15,
        _late("models.run_profile"),
        FORWARD,
    ),
    Section("native", "native CUDA kernels against Triton's", 10, _late("kernels.run_native")),
    Section(
        "tune_rows", "launch options of the row kernels", 40, _late("tuner.run_tuner"), resumes=True
    ),
    Section("probes", "single questions to the device", 40, _late("probes.run_probes")),
    Section("tests", "the operators' tests on this device", 30, _late("operator_tests.run_tests")),
)
