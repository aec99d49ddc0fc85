"""Find the parts of a model, and load its transformer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anyflow.formats.hub import PIPELINE, SCHEDULER, TRANSFORMER, local_folder
from anyflow.pipelines.layout import ModelLayout
from anyflow.pipelines.wan import part_folder
from anyflow.utils.validation import brief

if TYPE_CHECKING:
    from anyflow.models import AnyFlowTransformer3DModel


@dataclass(frozen=True)
class ModelPaths:
    """Hold the folders of a model: ``model`` has ``vae``, ``text_encoder`` and ``tokenizer``."""

    model: Path
    transformer: Path
    scheduler: Path

    @classmethod
    def find(
        cls, path: str | Path, transformer: nn.Module | str | Path | None = None
    ) -> ModelPaths:
        """Find a model, with another transformer and its scheduler if ``transformer`` is a folder.

        Raises:
            ValueError: a folder does not exist, and neither does a model of this name on the
                Hugging Face Hub.
        """
        if transformer is None:
            model = local_folder(path, PIPELINE)
            return cls(model, model, model)
        model = local_folder(path, [pattern for pattern in PIPELINE if pattern != TRANSFORMER])
        if isinstance(transformer, nn.Module):
            return cls(model, model, model)
        other = local_folder(transformer, (TRANSFORMER, SCHEDULER))
        return cls(model, other, other if os.path.isdir(other / "scheduler") else model)

    def layout(self, given: Mapping[str, nn.Module | None] | None = None) -> ModelLayout:
        """Read the layout; ``given`` are modules in place of folders, by the names of parts."""
        modules = {} if given is None else given
        configs = {
            name: _configuration(module) for name, module in modules.items() if module is not None
        }
        return ModelLayout.read(
            self.model, {"transformer": self.transformer / "transformer", **configs}
        )


def _configuration(module: nn.Module) -> Mapping[str, Any]:
    """Return a module's configuration as a mapping, which transformers' are not."""
    config: Any = module.config
    return config if isinstance(config, Mapping) else config.to_dict()


def load_transformer(folder: Path, dtype: torch.dtype) -> AnyFlowTransformer3DModel:
    """Load the ``transformer`` of a folder of any format, on the CPU in eval mode.

    Raises:
        ValueError: weights are missing or left over.
    """
    from anyflow.formats import load_transformer

    return load_transformer(part_folder(folder, "transformer"), dtype=dtype)


def resolve_dtype(
    dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None
) -> torch.dtype:
    """Return the dtype that was given by either name, or bf16.

    Raises:
        ValueError: two different ones are given, or one is no floating-point dtype of the models.
    """
    from anyflow.formats.readers import FLOATS

    found = []
    for name, given in (("dtype", dtype), ("torch_dtype", torch_dtype)):
        value = FLOATS.get(given.removeprefix("torch.")) if isinstance(given, str) else given
        if given is not None and value not in FLOATS.values():
            raise ValueError(f"{name} must be one of {', '.join(FLOATS)}, got {brief(given)}")
        found += [] if value is None else [value]
    if len(set(found)) > 1:
        raise ValueError(f"dtype and torch_dtype are one setting, got {dtype} and {torch_dtype}")
    return found[0] if found else torch.bfloat16
