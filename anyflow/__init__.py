"""Sample, train and accelerate any-step video diffusion models with flow maps.

The names below and the submodules load on first use, so that ``import anyflow`` costs little more
than ``import torch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.2.0.dev0"

__all__ = [
    "AnyFlowFARPipeline",
    "AnyFlowFARTransformer3DModel",
    "AnyFlowPipeline",
    "AnyFlowTransformer3DModel",
    "FlowMapEulerDiscreteScheduler",
    "__version__",
    "accelerate",
    "data",
    "evaluation",
    "formats",
    "kernels",
    "methods",
    "models",
    "ops",
    "pipelines",
    "restore",
    "sample",
    "sample_causal",
    "sampling",
    "schedulers",
    "training",
]

if TYPE_CHECKING:
    import anyflow.kernels as kernels
    from anyflow import (
        data,
        evaluation,
        formats,
        methods,
        models,
        ops,
        pipelines,
        sampling,
        schedulers,
        training,
    )
    from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
    from anyflow.pipelines import AnyFlowFARPipeline, AnyFlowPipeline
    from anyflow.pipelines.acceleration import accelerate, restore
    from anyflow.sampling import sample, sample_causal
    from anyflow.schedulers import FlowMapEulerDiscreteScheduler
else:  # a type checker that saw __getattr__ would let every misspelled name pass
    _EXPORTS = {
        "AnyFlowFARPipeline": "pipelines",
        "AnyFlowFARTransformer3DModel": "models",
        "AnyFlowPipeline": "pipelines",
        "AnyFlowTransformer3DModel": "models",
        "FlowMapEulerDiscreteScheduler": "schedulers",
        "accelerate": "pipelines.acceleration",
        "restore": "pipelines.acceleration",
        "sample": "sampling",
        "sample_causal": "sampling",
    }

    def __getattr__(name):
        import importlib

        if name in _EXPORTS:
            return getattr(importlib.import_module(f"anyflow.{_EXPORTS[name]}"), name)
        if name in __all__ or name == "checkpoints":  # the former name of formats
            return importlib.import_module(f"anyflow.{name}")
        raise AttributeError(f"module 'anyflow' has no attribute {name!r}")

    def __dir__():
        return sorted(__all__)
