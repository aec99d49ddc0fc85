"""Read and write checkpoints of diffusers, the older hub layout, NVlabs, Wan and FastVideo."""

from anyflow.formats.architecture import CausalSettings, CheckpointArchitecture, FlowMap
from anyflow.formats.checkpoint import CheckpointFormat, detect
from anyflow.formats.errors import CheckpointFormatError
from anyflow.formats.inspection import CheckpointInfo, inspect
from anyflow.formats.loading import load_transformer
from anyflow.formats.saving import convert, load_scheduler, save

__all__ = [
    "CausalSettings",
    "CheckpointArchitecture",
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
