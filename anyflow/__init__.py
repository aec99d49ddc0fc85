"""anyflow: any-step video diffusion with flow maps.

Submodules and the names below load on first use, so that ``import anyflow`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AnyFlowTransformer3DModel": "anyflow.models",
    "FlowMapEulerDiscreteScheduler": "anyflow.schedulers",
    "accelerate": "anyflow.acceleration",
    "restore": "anyflow.acceleration",
    "sample": "anyflow.sampling",
}
_SUBMODULES = (
    *("checkpoints", "data", "evaluation", "kernels", "methods", "models", "ops", "pipelines"),
    *("sampling", "schedulers", "training"),
)

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"anyflow.{name}")
    raise AttributeError(f"module 'anyflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
