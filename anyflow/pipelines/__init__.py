"""Make videos of texts; the names of this package load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyflow.pipelines.layout import ModelLayout
    from anyflow.pipelines.pipeline import AnyFlowPipeline, VideoOutput
    from anyflow.pipelines.request import VideoRequest
    from anyflow.pipelines.video import write_comparison, write_video
    from anyflow.pipelines.video_writer import VideoWriter

_MODULES = {
    "AnyFlowPipeline": "pipeline",
    "ModelLayout": "layout",
    "VideoOutput": "pipeline",
    "VideoRequest": "request",
    "VideoWriter": "video_writer",
    "write_comparison": "video",
    "write_video": "video",
}

__all__ = [
    "AnyFlowPipeline",
    "ModelLayout",
    "VideoOutput",
    "VideoRequest",
    "VideoWriter",
    "write_comparison",
    "write_video",
]


if not TYPE_CHECKING:  # a type checker that saw it would let every misspelled name pass

    def __getattr__(name):
        if name in _MODULES:
            return getattr(importlib.import_module(f"anyflow.pipelines.{_MODULES[name]}"), name)
        raise AttributeError(f"module 'anyflow.pipelines' has no attribute {name!r}")

    def __dir__():
        return sorted(__all__)
