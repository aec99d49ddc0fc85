"""Keep the former name of :mod:`anyflow.formats` working; importing a name from here warns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyflow.utils.moved import moved

__all__ = [
    "Architecture",
    "CheckpointFormat",
    "CheckpointFormatError",
    "CheckpointInfo",
    "FlowMap",
    "convert",
    "detect",
    "inspect",
    "load_scheduler",
    "load_transformer",
    "save",
]

if TYPE_CHECKING:
    from anyflow.formats import CheckpointArchitecture as Architecture
    from anyflow.formats import (
        CheckpointFormat,
        CheckpointFormatError,
        CheckpointInfo,
        FlowMap,
        convert,
        detect,
        inspect,
        load_scheduler,
        load_transformer,
        save,
    )
else:
    __getattr__ = moved(
        __name__, "anyflow.formats", __all__, {"Architecture": "CheckpointArchitecture"}
    )
