"""Write a pipeline's folder: its index, its scheduler, and the parts of another model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anyflow.formats.architecture import ANYFLOW, ANYFLOW_FAR, WAN
from anyflow.formats.hub import ENCODERS, local_folder
from anyflow.pipelines.layout import ModelLayout
from anyflow.pipelines.wan import load_tokenizer, part_folder, require_sound_folder
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.documents import read_json

INDEX = "model_index.json"
SHARED = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Base:
    """Hold the model that gives a pipeline its VAE, text encoder and tokenizer.

    Args:
        folder: folder of the model.
        tokenizer: the class of its tokenizer in transformers.
    """

    folder: Path
    tokenizer: str

    @classmethod
    def open(cls, path: str | Path) -> Base:
        """Find a model and look at its parts, of whose weights only the headers are read.

        Args:
            path: a diffusers folder, or the name of a model on the Hugging Face Hub.

        Raises:
            ValueError: the model or a part is missing or damaged.
        """
        folder = local_folder(path, (INDEX, *ENCODERS))
        for part in SHARED:
            part_folder(folder, part)
        for part in ("vae", "text_encoder"):
            require_sound_folder(folder / part)
        tokenizer = type(load_tokenizer(folder)).__name__
        if os.path.lexists(folder / INDEX):
            index = read_json(folder / INDEX)
            named = index.get("tokenizer") if isinstance(index, Mapping) else None
            if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
                tokenizer = named[1]
        return cls(folder, tokenizer)

    def require_fit(self, transformer: Mapping[str, Any]) -> None:
        """Raise a ValueError unless a transformer of this configuration fits the other parts."""
        ModelLayout.read(self.folder, {"transformer": transformer})

    def add_to(self, folder: Path, *, plain: bool, copy: bool) -> None:
        """Add the parts to a folder with ``transformer`` and ``scheduler``, and the index.

        Args:
            folder: folder to write to.
            plain: the transformer is a plain Wan model.
            copy: copy the parts; else the folder links to those of the base, which must stay.
        """
        for part in SHARED:
            source = self.folder / part
            if not copy:
                (folder / part).symlink_to(source.resolve(), target_is_directory=True)
                continue
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                target = folder / part / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        kind = read_json(folder / "transformer" / "config.json").get("_class_name")
        write_index(folder, plain=plain, tokenizer=self.tokenizer, causal=kind == ANYFLOW_FAR)


def write_index(folder: Path, *, plain: bool, tokenizer: str, causal: bool = False) -> None:
    """Write ``model_index.json``, by which diffusers knows the classes of a pipeline's parts.

    Args:
        folder: folder of the pipeline.
        plain: the transformer is a plain Wan model, for ``WanPipeline``; else a flow map, for
            ``AnyFlowPipeline`` or, if it is causal, ``AnyFlowFARPipeline``.
        tokenizer: its class in transformers.
        causal: the transformer is a causal flow map.
    """
    flow_map, pipeline = ANYFLOW, "AnyFlowPipeline"
    if causal:
        flow_map, pipeline = ANYFLOW_FAR, "AnyFlowFARPipeline"
    parts: dict[str, Any] = {
        "scheduler": [
            "diffusers",
            "FlowMatchEulerDiscreteScheduler" if plain else "FlowMapEulerDiscreteScheduler",
        ],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "transformer": [
            "diffusers",
            WAN if plain else flow_map,
        ],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if plain:
        parts |= {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}
    index = {
        "_class_name": "WanPipeline" if plain else pipeline,
        "_diffusers_version": version("diffusers"),
        **parts,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_scheduler(scheduler: FlowMapEulerDiscreteScheduler, folder: Path, *, plain: bool) -> None:
    """Write ``scheduler`` of a folder: for a plain Wan model diffusers' flow-match Euler."""
    if not plain:
        scheduler.save_pretrained(folder / "scheduler")
        return
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, config.shift).save_pretrained(
        folder / "scheduler"
    )
