"""Read the tensors of safetensors files and of files of ``torch.save``, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from anyflow.formats.errors import CheckpointFormatError, listed
from anyflow.formats.nvlabs import training_weights
from anyflow.formats.torch_files import TensorRecord, TorchFile
from anyflow.utils.documents import require_content, shortened

FLOATS: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SAFETENSORS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Pages of a mapped file count as the process's memory until the file is unmapped, so it is mapped
# anew after this number of bytes.
_REMAP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Hold what is known of a tensor without reading it.

    ``dtype`` is torch's name, or the file's where torch has none.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Reader(Protocol):
    """Read tensors by name, in the order of the files."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Tensor:
        """Return the tensor on the CPU; it may be a view of the file, so do not write to it."""
        ...


class SafetensorsReader:
    """Read safetensors files, whose headers are compared with their sizes when they are opened.

    Raises:
        CheckpointFormatError: a file is damaged, two files have the same tensor, or an index does
            not agree with them.
    """

    def __init__(self, files: Sequence[Path], index: Mapping[str, str] | None) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            for name, info in read_header(file).items():
                if name in self._files:
                    raise CheckpointFormatError(
                        f"{name} is in both {self._files[name]} and {file}; name one file"
                    )
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
        lines = [
            f"{name}: not in {file}"
            for name, file in index.items()
            if self._files.get(name) != folder / file
        ]
        lines += [
            f"{name}: in {file.name}, but not in the index"
            for name, file in self._files.items()
            if name not in index
        ]
        if lines:
            raise CheckpointFormatError(
                f"the index and the files in {folder} do not agree:{listed(lines)}"
            )


class TorchReader:
    """Read a state dict of ``torch.save``, or a training file with averaged or raw weights.

    Nothing in the file is executed, and each storage has the size that its tensors need
    (:class:`TorchFile`).

    Args:
        file: path.
        weights: ``"ema"`` or ``"raw"`` of a training file; None takes the average, or the only
            weights.

    Raises:
        CheckpointFormatError: the file is damaged or holds other things than tensors, or has no
            such weights.
    """

    def __init__(self, file: Path, weights: str | None) -> None:
        require_weights_file(file)
        self._file = TorchFile(file)
        content = self._section(self._file.content, weights)
        wrong = [
            f"{str(name)[:200]}: {what}"
            for name, value in content.items()
            if (what := _problem(name, value))
        ]
        if wrong or not content:
            raise CheckpointFormatError(
                f"{file} should hold tensors by name, but has{listed(wrong) if wrong else ' none'}"
            )
        self._tensors: dict[str, TensorRecord] = content
        self.infos = {
            name: TensorInfo(
                str(t.dtype).removeprefix("torch."), t.shape, t.numel * t.dtype.itemsize
            )
            for name, t in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._file.read(self._tensors[name])

    def verify(self) -> None:
        """Compare every tensor's bytes with the checksums in the file, or raise an error."""
        for record in self._tensors.values():
            if record.numel:
                self._file.verify(record)

    def _section(self, content: object, weights: str | None) -> dict[str, Any]:
        path = self._file.path
        if not isinstance(content, dict):
            raise CheckpointFormatError(f"{path} should hold a dictionary, not {_kind(content)}")
        return training_weights(content, weights, path)


def require_weights_file(file: Path) -> None:
    """Refuse what cannot be weights by its kind or its first bytes, before anything else opens it.

    Raises:
        CheckpointFormatError: the file is absent, a folder, FIFO or device, empty, a pointer of
            git-lfs or a web page.
    """
    try:
        require_content(file)
    except ValueError as error:
        raise CheckpointFormatError(str(error)) from None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return what the header of a safetensors file says of each tensor.

    Raises:
        CheckpointFormatError: the file is not a complete safetensors file; the message says what
            it is.
    """
    require_weights_file(file)
    infos = {}
    with _reading(file), safe_open(file, "pt") as handle:
        for name in handle.offset_keys():
            part = handle.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            kind = _SAFETENSORS.get(dtype, dtype)
            width = FLOATS[kind].itemsize if kind in FLOATS else 0
            infos[name] = TensorInfo(kind, shape, math.prod(shape) * width)
    return infos


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors raises errors of many kinds
        raise CheckpointFormatError(
            f"{shortened(file)} is not a complete safetensors file: {str(error)[:200]}"
        ) from error


def _problem(name: object, value: object) -> str | None:
    if isinstance(name, str) and isinstance(value, TensorRecord):
        return value.problem()
    return (
        f"{_kind(value)} under a name that is {_kind(name)}"
        if isinstance(value, TensorRecord)
        else _kind(value)
    )


def _kind(value: object) -> str:
    if isinstance(value, TensorRecord):
        return "a tensor"
    if isinstance(value, dict):
        return "a dictionary"
    return type(value).__name__ if type(value).__module__ == "builtins" else "another value"
