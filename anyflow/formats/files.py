"""Find the files of a checkpoint: a pipeline's or transformer's folder, or a single file."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from anyflow.formats.errors import CheckpointFormatError, listed
from anyflow.utils import documents
from anyflow.utils.documents import shortened

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class CheckpointFiles:
    """Hold the files of one transformer.

    Attributes:
        weights: the files of its tensors, in the order in which they are read.
        index: ``{tensor: file name}`` of an index, or None without one.
        config: the ``config.json`` in the same folder, or None.
        scheduler: the ``scheduler_config.json`` of the pipeline that the folder belongs to, or
            None.
        named: whether the caller named a file rather than a folder, whose neighbors may be another
            model's.
    """

    weights: tuple[Path, ...]
    index: Mapping[str, str] | None
    config: Path | None
    scheduler: Path | None
    named: bool


def find_files(path: Path, subfolder: str | None) -> CheckpointFiles:
    """Find the files of a folder with weights, of its ``transformer/`` or subfolder, or of a file.

    Symbolic links are followed, as the cache of the hub is made of them. The names in an index must
    be names of files beside it.

    Raises:
        CheckpointFormatError: the path holds no weights, or more than one set of them.
    """
    if not _is_folder(path):
        if subfolder is not None:
            raise CheckpointFormatError(
                f"subfolder={subfolder!r} is of a folder, but {shortened(path)} is a file"
            )
        return _of_folder(path.parent, path)
    if subfolder is not None:
        if not os.path.isdir(path / subfolder):
            raise CheckpointFormatError(f"{shortened(path)} has no folder {shortened(subfolder)}")
        return _of_folder(path / subfolder, None)
    inner = path / "transformer"
    return _of_folder(inner if os.path.isdir(inner) and not _candidates(path) else path, None)


def regular_file(path: Path) -> Path | None:
    """Return ``path`` if it is a regular file, and None if nothing has this name.

    Raises:
        CheckpointFormatError: it is something else, or a link to nothing.
    """
    if not os.path.lexists(path):
        return None
    try:
        return documents.require_regular_file(path)
    except ValueError as error:
        raise CheckpointFormatError(str(error)) from None


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointFormatError: it cannot be read, or is not an object.
    """
    try:
        value = documents.read_json(file)
    except ValueError as error:
        raise CheckpointFormatError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _of_folder(folder: Path, named: Path | None) -> CheckpointFiles:
    weights = _choose(folder) if named is None else named
    index = None
    files: tuple[Path, ...]
    if isinstance(weights, tuple):
        files = weights
    elif weights.name.endswith(INDEX_SUFFIX):
        index = _read_index(weights)
        files = tuple(folder / name for name in dict.fromkeys(index.values()))
    else:
        files = (weights,)
    in_pipeline = folder.name.startswith("transformer")
    return CheckpointFiles(
        weights=files,
        index=index,
        config=regular_file(folder / CONFIG),
        scheduler=regular_file(folder.parent / "scheduler" / "scheduler_config.json")
        if in_pipeline
        else None,
        named=named is not None,
    )


def _is_folder(path: Path) -> bool:
    """Tell whether ``path`` is a folder; CheckpointFormatError if it is no file either."""
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return True
        documents.require_regular_file(path)
    except FileNotFoundError:
        raise CheckpointFormatError(
            f"{shortened(path)} does not exist; a model on the Hugging Face Hub is named owner/name"
        ) from None
    except (OSError, ValueError) as error:
        reason = documents.system_reason(error)
        named = (
            reason
            if isinstance(error, ValueError)
            else f"{shortened(path)} cannot be read: {reason}"
        )
        raise CheckpointFormatError(named) from None
    return False


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointFormatError(
            f"{shortened(folder)} cannot be read: {documents.system_reason(error)}"
        ) from None


def _candidates(folder: Path) -> list[Path]:
    return [
        f for f in _entries(folder) if f.suffix == ".safetensors" or f.name.endswith(INDEX_SUFFIX)
    ]


def _choose(folder: Path) -> Path | tuple[Path, ...]:
    """Choose a folder's index, its file or its files; safetensors come before torch's files."""
    found = _candidates(folder)
    indices = [f for f in found if f.name.endswith(INDEX_SUFFIX)]
    if len(indices) > 1 or (indices and folder / WEIGHTS in found):
        several = [f.name for f in (*indices, folder / WEIGHTS) if f in found]
        raise CheckpointFormatError(
            f"{folder} holds more than one set of weights; name one of the files:{listed(several)}"
        )
    if indices:
        return indices[0]
    if folder / WEIGHTS in found:
        return folder / WEIGHTS
    if found:
        return tuple(found)
    torch_files = [f for f in _entries(folder) if f.suffix in TORCH_SUFFIXES]
    if len(torch_files) != 1:
        what = (
            f"several of torch's files; name one:{listed([f.name for f in torch_files])}"
            if torch_files
            else "none"
        )
        raise CheckpointFormatError(
            f"{folder} should hold .safetensors or one .pt file of a transformer, but has {what}"
        )
    return torch_files[0]


def _read_index(file: Path) -> dict[str, str]:
    index = read_json(file).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointFormatError(f"{file} has no weight_map of tensors to files")
    wrong = sorted({repr(name)[:200] for name in index.values() if not _is_file_name(name)})
    if wrong:
        raise CheckpointFormatError(
            f"{file} refers to what is not a .safetensors file beside it:{listed(wrong)}"
        )
    absent = sorted({name for name in index.values() if not os.path.isfile(file.parent / name)})
    if absent:
        raise CheckpointFormatError(f"{file} refers to files that are absent:{listed(absent)}")
    return index


def _is_file_name(name: object) -> bool:
    if not isinstance(name, str) or "\0" in name or not name.endswith(".safetensors"):
        return False
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name
