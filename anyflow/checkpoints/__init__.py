"""Checkpoints of every origin: diffusers, the older hub layout, training files, the original Wan,
FastVideo.
"""

from anyflow.checkpoints.architecture import Architecture, FlowMap
from anyflow.checkpoints.checkpoint import CheckpointFormat, detect
from anyflow.checkpoints.errors import CheckpointFormatError
from anyflow.checkpoints.inspection import CheckpointInfo, inspect
from anyflow.checkpoints.loading import load_transformer
from anyflow.checkpoints.saving import convert, load_scheduler, save

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
