"""Tensors of a checkpoint's files by name, one at a time: safetensors, and torch's files without their pickled code."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anyflow.checkpoints.errors import CheckpointFormatError, listed

FLOATS: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SAFETENSORS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Where a training file keeps the average and the parameters themselves.
SECTIONS = {"ema": "ema", "raw": "model_state_dict_g"}

# Pages of a mapped file count as the process's memory until it is unmapped, so it is mapped anew after so many bytes.
_REMAP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it; ``dtype`` is torch's name, or the file's where torch has none."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Reader(Protocol):
    """Tensors by name, in the order of the files."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, possibly a view of the file: copy it, do not write to it."""
        ...


class SafetensorsReader:
    """The tensors of safetensors files, whose headers are checked against their sizes when they are opened.

    Raises:
        CheckpointFormatError: a file is damaged, two files have the same tensor, or an index does not agree with them.
    """

    def __init__(self, files: Sequence[Path], index: Mapping[str, str] | None) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            for name, info in _read_header(file).items():
                if name in self._files:
                    raise CheckpointFormatError(f"{name} is in both {self._files[name]} and {file}; name one file")
                self.infos[name], self._files[name] = info, file
        if index is not None:
            self._compare(index, files[0].parent)
        self._open: tuple[Path, Any, int] | None = None

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        if self._open is None or self._open[0] != file or self._open[2] > _REMAP_BYTES:
            self._open = None  # unmaps the last one before the next is mapped
            with _reading(file):
                self._open = (file, safe_open(file, "pt"), 0)
        _, handle, count = self._open
        with _reading(file):
            tensor = handle.get_tensor(name)
        self._open = (file, handle, count + tensor.nbytes)
        return tensor

    def _compare(self, index: Mapping[str, str], folder: Path) -> None:
        lines = [f"{name}: not in {file}" for name, file in index.items() if self._files.get(name) != folder / file]
        lines += [
            f"{name}: in {file.name}, but not in the index" for name, file in self._files.items() if name not in index
        ]
        if lines:
            raise CheckpointFormatError(f"the index and the files in {folder} do not agree:{listed(lines)}")


class TorchReader:
    """The tensors of a file of ``torch.save``: a state dict, or a training file with ``ema`` or ``model_state_dict_g``.

    Nothing in the file is executed (``weights_only=True``).

    Args:
        file: path.
        weights: ``"ema"`` or ``"raw"`` of a training file; None takes the average, or what there is.

    Raises:
        CheckpointFormatError: the file is damaged or holds other things than tensors, or has no such weights.
    """

    def __init__(self, file: Path, weights: str | None) -> None:
        self._file, self._weights = file, weights
        self._tensors = self._load()
        self.infos = {
            name: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel() * t.element_size())
            for name, t in self._tensors.items()
        }
        self._count = 0

    def read(self, name: str) -> Tensor:
        if self._count > _REMAP_BYTES:
            self._tensors, self._count = {}, 0
            self._tensors = self._load()
        tensor = self._tensors[name]
        self._count += tensor.nbytes
        return tensor

    def _load(self) -> dict[str, Tensor]:
        file = self._file
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:
            raise CheckpointFormatError(
                f"{file} is damaged, or needs Python code to be unpickled, which is refused: save a dictionary of "
                f"tensors alone. ({str(error).splitlines()[0]})"
            ) from error
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointFormatError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
        tensors = self._section(content)
        wrong = [f"{name}: {_what(value)}" for name, value in tensors.items() if not _is_plain(name, value)]
        if wrong or not tensors:
            raise CheckpointFormatError(
                f"{file} should hold tensors by name, but has{listed(wrong) if wrong else ' none'}"
            )
        return tensors

    def _section(self, content: object) -> dict[str, Tensor]:
        if not isinstance(content, dict):
            raise CheckpointFormatError(f"{self._file} should hold a dictionary, not {type(content).__name__}")
        present = [kind for kind, key in SECTIONS.items() if isinstance(content.get(key), dict)]
        if self._weights is None:
            return content[SECTIONS[present[0]]] if present else content
        if self._weights not in present:
            has = " and ".join(present) if present else "one set of weights only"
            raise CheckpointFormatError(f"weights={self._weights!r}: {self._file} has {has}")
        return content[SECTIONS[self._weights]]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointFormatError(f"{file} is not a complete safetensors file: {error}") from error


def _read_header(file: Path) -> dict[str, TensorInfo]:
    infos = {}
    with _reading(file), safe_open(file, "pt") as handle:
        for name in handle.offset_keys():
            part = handle.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            kind = _SAFETENSORS.get(dtype, dtype)
            width = FLOATS[kind].itemsize if kind in FLOATS else 0
            infos[name] = TensorInfo(kind, shape, math.prod(shape) * width)
    return infos


def _is_plain(name: object, value: object) -> bool:
    """A dense tensor whose elements are all in the file, and not repeated by strides."""
    if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


def _what(value: object) -> str:
    return f"a tensor of {tuple(value.shape)} that is not dense" if isinstance(value, Tensor) else type(value).__name__
