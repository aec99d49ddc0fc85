"""Where the parts of a model lie, and onto which device they go."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from anyflow.checkpoints.hub import PIPELINE, SCHEDULER, TRANSFORMER, local_folder
from anyflow.pipelines.request import ModelLayout
from anyflow.pipelines.wan import part_folder

if TYPE_CHECKING:
    from anyflow.models import AnyFlowTransformer3DModel


@dataclass(frozen=True)
class ModelPaths:
    """The folders of a model: ``model`` has ``vae``, ``text_encoder`` and ``tokenizer``, the others what they say."""

    model: Path
    transformer: Path
    scheduler: Path

    @classmethod
    def find(cls, path: str | Path, transformer: nn.Module | str | Path | None = None) -> ModelPaths:
        """A model's, with another transformer and its scheduler if ``transformer`` is a folder.

        Raises:
            ValueError: a folder does not exist, and neither does a model of this name on the Hugging Face Hub.
        """
        if transformer is None:
            model = local_folder(path, PIPELINE)
            return cls(model, model, model)
        model = local_folder(path, [pattern for pattern in PIPELINE if pattern != TRANSFORMER])
        if isinstance(transformer, nn.Module):
            return cls(model, model, model)
        other = local_folder(transformer, (TRANSFORMER, SCHEDULER))
        return cls(model, other, other if os.path.isdir(other / "scheduler") else model)

    def layout(self, transformer: nn.Module | None = None) -> ModelLayout:
        """See :meth:`ModelLayout.read`; ``transformer`` is a model in place of the folder's."""
        own = self.transformer / "transformer"
        return ModelLayout.read(self.model, own if transformer is None else cast(Any, transformer).config)


def load_transformer(folder: Path, dtype: torch.dtype) -> AnyFlowTransformer3DModel:
    """The ``transformer`` of a folder of any format, on the CPU in eval mode.

    Raises:
        ValueError: weights are missing or left over.
    """
    from anyflow.checkpoints import load_transformer

    return load_transformer(part_folder(folder, "transformer"), dtype=dtype)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device named, or a GPU if there is one, as tensors on it name it; ValueError for one that is not there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
