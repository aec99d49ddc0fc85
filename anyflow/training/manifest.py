"""Describe a checkpoint folder in ``manifest.json``, with the size and hash of every file.

The manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyflow.utils.documents import read_json
from anyflow.utils.writing import write_text

MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(ValueError):
    """Say that a checkpoint is missing, damaged, or not the one that was asked for."""


@dataclass(frozen=True)
class FileRecord:
    """Hold a file's size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileRecord:
        """Make the record of a file on disk, read in pieces."""
        digest, size = hashlib.sha256(), 0
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
                size += len(piece)
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Hold the contents of ``manifest.json``.

    Args:
        step: step of the checkpoint.
        world_size: processes that wrote it.
        files: every other file of the folder, by name.
        info: JSON values of the caller.
    """

    step: int
    world_size: int
    files: dict[str, FileRecord]
    info: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write it durably, with a hash of its own contents."""
        contents = {"format": FORMAT, **asdict(self)}
        write_text(
            folder / MANIFEST,
            json.dumps({**contents, "sha256": _digest(contents)}, indent=1) + "\n",
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it back.

        Raises:
            CheckpointError: it is missing or damaged, or has another format.
        """
        file = folder / MANIFEST
        if not os.path.lexists(file):
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
        try:
            contents = read_json(file)
            recorded = contents.pop("sha256")
            if contents["format"] != FORMAT:
                raise CheckpointError(
                    f"{file} has format {contents['format']!r}; this version reads {FORMAT}"
                )
            if _digest(contents) != recorded:
                raise CheckpointError(
                    f"{file} is damaged: its hash differs from the one recorded in it"
                )
            files = {name: FileRecord(**record) for name, record in contents["files"].items()}
            manifest = cls(contents["step"], contents["world_size"], files, contents["info"])
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error
        if outside := [name for name in files if name == ".." or Path(name).name != name]:
            raise CheckpointError(f"{file} names files outside its folder: {', '.join(outside)}")
        return manifest

    def problems(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Return one sentence for each damaged file among some of the files."""
        found = []
        for name in names:
            record, file = self.files[name], folder / name
            if not os.path.isfile(file):
                found.append(f"{name} is missing")
            elif (size := file.stat().st_size) != record.size:
                found.append(f"{name} has {size} bytes, {record.size} were written")
            elif FileRecord.of(file) != record:
                found.append(f"{name} is corrupted: its SHA-256 differs from the one recorded")
        return found


def _digest(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
