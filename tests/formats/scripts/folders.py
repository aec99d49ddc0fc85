"""Change the files of a checkpoint's folder, and expect its refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow.formats import CheckpointFormatError, load_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointFormatError) as raised:
        load_transformer(path, **options)
    return str(raised.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
