"""Write and read the files of torch.distributed.checkpoint (DCP) with an index in JSON.

DCP's own index is a pickle.

``tensors.json`` maps each name to its dtype, its shape and the chunks that ranks wrote: offsets and
sizes in the tensor, and the file, position and length in bytes of the chunk's ``torch.save``, which
is read with ``weights_only``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from anyflow.training.manifest import CheckpointError
from anyflow.utils.documents import read_json
from anyflow.utils.writing import write_text, writing

INDEX = "tensors.json"
MAX_INDEX_BYTES = 2**30  # 14B parameters in pieces of hundreds of ranks


class TensorWriter(FileSystemWriter):
    """Write tensors only, as DCP does; a refusal of the system stays an OSError.

    The error reaches rank 0 with its number.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks."""
        with writing(Path(self.path)):
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; runs on rank 0, after every rank has written its chunks."""
        stored = {
            (result.index.fqn, result.index.offset): result.storage_data
            for rank in results
            for result in rank
        }
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            index[name] = {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "shape": list(tensor.size),
                "chunks": [
                    _chunk_entry(chunk, stored[name, chunk.offsets]) for chunk in tensor.chunks
                ],
            }
        write_text(Path(self.path) / INDEX, json.dumps(index))


class TensorReader(FileSystemReader):
    """Read tensors as DCP does, with an index that :func:`read_index` has read."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


def read_index(folder: Path, files: Collection[str]) -> Metadata:
    """Read the index in DCP's types.

    Raises:
        CheckpointError: it is damaged, or refers to something else than ``files``.
    """
    file = folder / INDEX
    tensors: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    try:
        for name, entry in read_json(file, max_bytes=MAX_INDEX_BYTES).items():
            chunks = []
            for chunk in entry["chunks"]:
                if chunk["file"] not in files:
                    raise CheckpointError(
                        f"{file}: {name} is in {chunk['file']!r}, which the manifest does not list"
                    )
                chunks.append(
                    ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
                )
                where = _StorageInfo(chunk["file"], chunk["position"], chunk["length"])
                stored[MetadataIndex(name, chunks[-1].offsets)] = where
            properties = TensorProperties(_dtype(entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    return Metadata(tensors, storage_data=stored)


def difference(index: Metadata, tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    """List every name under ``prefix`` by which a checkpoint and the tensors to fill differ."""
    saved = {
        name: entry for name, entry in index.state_dict_metadata.items() if name.startswith(prefix)
    }
    lines = [f"missing in the checkpoint: {name}" for name in tensors if name not in saved]
    lines += [f"only in the checkpoint: {name}" for name in saved if name not in tensors]
    for name in sorted(saved.keys() & tensors.keys()):
        entry, tensor = saved[name], tensors[name]
        assert isinstance(entry, TensorStorageMetadata)
        has, wanted = (
            (entry.properties.dtype, tuple(entry.size)),
            (tensor.dtype, tuple(tensor.shape)),
        )
        if has != wanted:
            lines.append(
                f"{name}: the checkpoint has {_describe(*has)}, wanted is {_describe(*wanted)}"
            )
    return lines


def _chunk_entry(chunk: ChunkStorageMetadata, where: _StorageInfo) -> dict[str, Any]:
    return {
        "offsets": list(chunk.offsets),
        "sizes": list(chunk.sizes),
        "file": where.relative_path,
        "position": where.offset,
        "length": where.length,
    }


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is not a dtype")
    return dtype


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
