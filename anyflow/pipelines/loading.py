"""Where the parts of a model lie, how large they are, and onto which device they go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from anyflow.pipelines.request import ModelLayout
from anyflow.pipelines.wan import part_folder

if TYPE_CHECKING:
    from anyflow.models import AnyFlowTransformer3DModel

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
# Of a call beside the weights: the VAE at 832 x 480 in fp32, or 33 000 tokens through a feed-forward layer of 14B.
_WORKSPACE = 12 * 2**30


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
        model = _local_folder(path)
        own = transformer is None or isinstance(transformer, nn.Module)
        other = model if own else _local_folder(transformer)  # type: ignore[arg-type]
        return cls(model, other, other if (other / "scheduler").is_dir() else model)

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
    """The device named, or a GPU if there is one; ValueError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(device)


def fits(
    paths: ModelPaths,
    transformer: nn.Module | None,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> bool:
    """Whether all parts fit into the free memory of the device beside what a call needs; always on a CPU."""
    if device.type != "cuda":
        return True
    weights = _num_parameters(paths.transformer / "transformer") * dtype.itemsize
    if transformer is not None:
        weights = sum(p.nbytes for p in transformer.parameters() if p.device != device)
    weights += _num_parameters(paths.model / "text_encoder") * dtype.itemsize
    weights += _num_parameters(paths.model / "vae") * vae_dtype.itemsize
    return torch.cuda.mem_get_info(device)[0] >= weights + _WORKSPACE


def _num_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a folder, of which only the headers are read."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _local_folder(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", *(f"{part}/*" for part in PARTS)]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except (OSError, ValueError) as error:  # all of the hub's, and names that cannot be
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"there is no folder {path}, and no model of this name could be had from the Hugging Face Hub: {reason}"
        ) from None
