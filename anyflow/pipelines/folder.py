"""The files of a pipeline's folder beside its parts: ``model_index.json`` and the scheduler's settings."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anyflow.schedulers import FlowMapEulerDiscreteScheduler

INDEX = "model_index.json"


def write_index(folder: Path, *, plain: bool, tokenizer: str) -> None:
    """Write the ``model_index.json`` by which diffusers knows the classes of a pipeline and its parts.

    Args:
        folder: of the pipeline.
        plain: the transformer is a plain Wan model, for ``WanPipeline``; else a flow map, for ``AnyFlowPipeline``.
        tokenizer: its class in transformers.
    """
    parts: dict[str, Any] = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler" if plain else "FlowMapEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "WanTransformer3DModel" if plain else "AnyFlowTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if plain:
        parts |= {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}
    index = {
        "_class_name": "WanPipeline" if plain else "AnyFlowPipeline",
        "_diffusers_version": version("diffusers"),
        **parts,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_scheduler(scheduler: FlowMapEulerDiscreteScheduler, folder: Path, *, plain: bool) -> None:
    """Write ``scheduler`` of a pipeline's folder: for a plain Wan model diffusers' flow-match Euler of that shift."""
    if not plain:
        scheduler.save_pretrained(folder / "scheduler")
        return
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, config.shift).save_pretrained(folder / "scheduler")
