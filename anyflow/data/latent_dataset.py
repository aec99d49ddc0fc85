"""Videos as latents on disk: the reader and the writer of the files that ``latent_format``
describes.

Numbers are fp32 and come back bit for bit. Reading maps the shards into memory: opening costs their
headers, their digests and a few rows; every row that is read is compared with its digest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from anyflow.data.latent_format import (
    INFO_FILE,
    NEGATIVE_FILE,
    SCHEMA,
    DatasetInfo,
    DatasetRecord,
    check_same,
    check_shard,
    file_digest,
    map_shard,
    matches_digest,
    pa,
    read_record,
    row_digest,
    shard_digest,
    shards,
    write_record,
    written_rows,
)
from anyflow.data.sample import Sample
from anyflow.utils.documents import require_regular_file
from anyflow.utils.writing import hidden, publish, write_bytes, writing

__all__ = [
    "INFO_FILE",
    "NEGATIVE_FILE",
    "SCHEMA",
    "DatasetInfo",
    "DatasetRecord",
    "LatentDataset",
    "LatentWriter",
    "check_same",
    "damages",
    "read_record",
    "shards",
    "written_rows",
]

_SAMPLED_ROWS = 4  # that opening reads whole


class LatentDataset:
    """Reads a dataset.

    Args:
        folder: written by :class:`LatentWriter`.
        sampled_rows: rows, evenly spaced, that are compared with their digests at once; all others
            when they are read.

    Raises:
        ValueError: the folder is no finished dataset, a shard is damaged, missing, exchanged or of
            another dataset, or a row has a shape of its own; when a row is read, its content is not
            what was written, or holds NaN or infinity. The message names the row and the video.
    """

    def __init__(self, folder: Path, *, sampled_rows: int = _SAMPLED_ROWS) -> None:
        self.folder = folder
        self.record = read_record(folder)
        self.info, rows = self.record.info, self.record.rows
        if rows is None:
            raise ValueError(f"{folder} is not finished: run the same `anyflow preprocess` again")
        self._table = pa.concat_tables([*self._checked_shards()] or [SCHEMA.empty_table()])
        if len(self._table) != rows:
            raise ValueError(
                f"{folder} should have {rows} rows, not {len(self._table)}: a shard is missing or "
                "cut off"
            )
        if rows == 0:
            raise ValueError(f"{folder} holds no videos")
        self._check_shapes()
        self._negative = _read_negative(folder, self.record)
        for row in sorted({*np.linspace(0, rows - 1, num=sampled_rows, dtype=int).tolist()}):
            self._numbers(row)

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return _reopened, (self.folder,)  # to a worker process goes the path, not the data

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in 0..{len(self) - 1}, got {index}")
        latents, embeds = (torch.from_numpy(values.copy()) for values in self._numbers(index))
        return Sample(
            latents.view(self.info.latent_shape), self._padded(embeds.view(-1, self.info.text_dim))
        )

    def file(self, index: int) -> str:
        """Return the video a row was made from, relative to the folder of videos."""
        return str(self._table["file"][index])

    def caption(self, index: int) -> str:
        """Return the caption of a row, as written by its author."""
        return str(self._table["caption"][index])

    def check_row(self, index: int) -> None:
        """Compare a row with its digest.

        Raises:
            ValueError: it is damaged, or holds NaN or infinity.
        """
        self._numbers(index)

    @property
    def negative_prompt_embeds(self) -> Tensor:
        """``[1, text_length, text_dim]`` fp32, zero-padded."""
        return self._padded(self._negative)[None]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(F, C, H, W)``."""
        return self.info.latent_shape

    @property
    def text_shape(self) -> tuple[int, int]:
        """``(text_length, text_dim)``."""
        return self.info.text_length, self.info.text_dim

    @property
    def fingerprint(self) -> str:
        """Identify the facts of ``dataset.json`` and the rows that were written, in order, by their
        digests.

        A row that was damaged later has the same digest; reading it is an error, and so is opening
        a dataset whose digests are not those recorded of its shards.
        """
        content = hashlib.blake2b(
            json.dumps(asdict(self.info), sort_keys=True).encode(), digest_size=16
        )
        content.update(self._negative.numpy().tobytes())
        for digest in self._table["digest"].to_pylist():
            content.update(digest.encode())
        return content.hexdigest()

    def _checked_shards(self) -> Iterator[Any]:
        found = shards(self.folder)
        missing = sorted(set(self.record.shards or {}) - {path.name for path in found})
        if missing:
            raise ValueError(
                f"{self.folder} should have {self.record.rows} rows, not "
                f"{sum(len(map_shard(path)) for path in found)}:"
                f" {', '.join(missing)} is missing"
            )
        for path in found:
            table = map_shard(path)
            check_shard(path, table, self.record)
            yield table

    def _numbers(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return latents and prompt of a row as flat views of the mapped file, once they match
        their digest.
        """
        try:
            latents, embeds = (
                self._table[name][index].values.to_numpy() for name in ("latents", "prompt_embeds")
            )
            digest = str(self._table["digest"][index])
            sound = matches_digest(digest, self.file(index), self.caption(index), (latents, embeds))
        except (pa.ArrowException, UnicodeDecodeError):
            sound = False
        if not sound:
            raise ValueError(f"{self._name(index)} is damaged: its content is not what was written")
        for name, values in (("latents", latents), ("prompt_embeds", embeds)):
            if not np.isfinite(values).all():
                raise ValueError(f"{self._name(index)}: its {name} hold NaN or infinite values")
        return latents, embeds

    def _padded(self, embeds: Tensor) -> Tensor:
        return torch.nn.functional.pad(embeds, (0, 0, 0, self.info.text_length - len(embeds)))

    def _check_shapes(self) -> None:
        """Compare the shapes of all rows, which Arrow has without reading a single number."""
        expected = self.info.latent_shape
        shapes = np.concatenate(
            [chunk.flatten().to_numpy() for chunk in self._table["latents_shape"].chunks]
        )
        for row in np.flatnonzero((shapes.reshape(-1, 4) != expected).any(axis=1)).tolist():
            shape = tuple(shapes.reshape(-1, 4)[row].tolist())
            raise ValueError(
                f"{self._name(row)}: its latents are {shape}, those of the dataset {expected}"
            )
        for row in np.flatnonzero(self._lengths("latents") != math.prod(expected)).tolist():
            raise ValueError(
                f"{self._name(row)}: its latents are not as many values as {expected} has"
            )
        tokens, rest = np.divmod(self._lengths("prompt_embeds"), self.info.text_dim)
        for row in np.flatnonzero(
            (rest != 0) | (tokens < 1) | (tokens > self.info.text_length)
        ).tolist():
            raise ValueError(
                f"{self._name(row)}: its prompt has {self._lengths('prompt_embeds')[row]} values, "
                "which are not 1 to "
                f"{self.info.text_length} tokens of {self.info.text_dim}"
            )

    def _lengths(self, column: str) -> np.ndarray:
        import pyarrow.compute

        return pyarrow.compute.list_value_length(self._table[column]).to_numpy()

    def _name(self, row: int) -> str:
        return f"row {row} ({self.file(row)}) of {self.folder}"


class LatentWriter:
    """Writes a dataset, shard by shard; a context manager.

    A shard appears under its name only when all of it is on the disk. Opened on the folder of a run
    that was killed, it goes on after the last such shard; :func:`written_rows` says what is there.

    Args:
        folder: made if need be.
        info: of the dataset; the same as in the earlier run.
        negative_prompt_embeds: ``[S, text_dim]`` fp32, unpadded.
        rows_per_shard: rows that a kill can cost.
        packages: the versions that make the rows, by package, for the record; those of earlier runs
            stay in it.

    Raises:
        ValueError: the folder holds a dataset that was made otherwise, or a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        info: DatasetInfo,
        negative_prompt_embeds: Tensor,
        *,
        rows_per_shard: int = 32,
        packages: Mapping[str, str | None] | None = None,
    ) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be >= 1, got {rows_per_shard}")
        self._folder, self._info, self._rows_per_shard = folder, info, rows_per_shard
        folder.mkdir(parents=True, exist_ok=True)
        self._packages = (
            None if packages is None else {name: [version] for name, version in packages.items()}
        )
        self._shards: dict[str, str] = {}
        self._rows = 0
        if (folder / INFO_FILE).exists():
            self._go_on(read_record(folder))
        elif shards(folder):
            raise ValueError(f"{folder} has shards but no {INFO_FILE}")
        else:
            embeds = negative_prompt_embeds.float().contiguous()
            write_bytes(folder / NEGATIVE_FILE, save({"prompt_embeds": embeds}))
        self._negative = file_digest(require_regular_file(folder / NEGATIVE_FILE))
        self._write_record(rows=None)
        self._shard = max(
            (int(path.stem.removeprefix("shard-")) + 1 for path in shards(folder)), default=0
        )
        self._stream: Any = None
        self._digests: list[str] = []

    def add(self, file: str, caption: str, latents: Tensor, prompt_embeds: Tensor) -> None:
        """Append a row: ``latents[F, C, H, W]`` and ``prompt_embeds[S, text_dim]``, unpadded."""
        if tuple(latents.shape) != self._info.latent_shape:
            raise ValueError(
                f"{file}: latents must be {list(self._info.latent_shape)}, got "
                f"{list(latents.shape)}"
            )
        values = latents.float().contiguous().numpy()
        tokens = prompt_embeds.float().contiguous().numpy()
        digest = row_digest(file, caption, (values.reshape(-1), tokens.reshape(-1)))
        columns = [
            [file],
            [caption],
            [values.reshape(-1)],
            [values.shape],
            [tokens.reshape(-1)],
            [digest],
        ]
        arrays = [
            pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)
        ]
        with writing(self._temporary):
            if self._stream is None:
                self._stream = pa.ipc.new_stream(str(self._temporary), SCHEMA)
            self._stream.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self._digests.append(digest)
        if len(self._digests) == self._rows_per_shard:
            self._close_shard()

    def finish(self) -> None:
        """Write what is left and declare the dataset complete."""
        if self._stream is not None:
            self._close_shard()
        self._write_record(rows=self._rows)

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            with suppress(OSError):  # on a full disk, closing fails as writing did
                self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def _go_on(self, record: DatasetRecord) -> None:
        """Take over what an earlier run wrote, if it is sound."""
        check_same(self._folder, asdict(record.info), asdict(self._info))
        _read_negative(self._folder, record)
        for path in shards(self._folder):
            table = map_shard(path)
            # a run that was killed may not have recorded its last one
            if path.name in (record.shards or {}):
                check_shard(path, table, record)
            self._shards[path.name] = shard_digest(table["digest"].to_pylist())
            self._rows += len(table)
        if self._packages is not None and self._shards:
            before = (
                {name: [None] for name in self._packages}
                if record.packages is None
                else record.packages
            )
            names = {**before, **self._packages}
            self._packages = {
                name: sorted({*before.get(name, [None]), *self._packages.get(name, [])}, key=str)
                for name in names
            }
        elif self._packages is None and record.packages is not None:
            self._packages = dict(record.packages)

    @property
    def _temporary(self) -> Path:
        return hidden(self._folder / f"shard-{self._shard:06d}.arrow")

    def _close_shard(self) -> None:
        name = f"shard-{self._shard:06d}.arrow"
        with writing(self._temporary):
            self._stream.close()
            self._stream = None
            publish(self._temporary, self._folder / name)
        self._shards[name] = shard_digest(self._digests)
        self._rows += len(self._digests)
        self._shard += 1
        self._digests = []
        self._write_record(rows=None)

    def _write_record(self, rows: int | None) -> None:
        write_record(
            self._folder,
            DatasetRecord(self._info, rows, self._packages, self._shards, self._negative),
        )


def damages(folder: Path) -> list[str]:
    """Read a whole dataset and describe what is damaged in it, by shard and row; an empty list for
    a sound one.

    A dataset that is not finished is examined as far as it goes.

    Raises:
        ValueError: the folder holds no dataset, or its ``dataset.json`` is damaged.
    """
    record = read_record(folder)
    found: list[str] = []
    try:
        _read_negative(folder, record)
    except ValueError as error:
        found.append(str(error))
    there = shards(folder)
    absent = sorted(set(record.shards or {}) - {path.name for path in there})
    found += [f"{folder / name} is missing" for name in absent]
    rows = 0
    for path in there:
        try:
            table = map_shard(path)
        except ValueError as error:
            found.append(str(error))
            continue
        rows += len(table)
        found += _shard_damages(path, table, record)
    if record.rows is not None and not found and rows != record.rows:
        found.append(
            f"{folder} should have {record.rows} rows, not {rows}: a shard is missing or cut off"
        )
    return found


def _shard_damages(path: Path, table: Any, record: DatasetRecord) -> list[str]:
    found = []
    try:
        # a killed run may not have recorded its last
        if record.rows is not None or path.name in (record.shards or {}):
            check_shard(path, table, record)
    except ValueError as error:
        found.append(str(error))
    for row in range(len(table)):
        file, caption, digest = (str(table[name][row]) for name in ("file", "caption", "digest"))
        numbers = [table[name][row].values.to_numpy() for name in ("latents", "prompt_embeds")]
        if not matches_digest(digest, file, caption, numbers):
            found.append(
                f"{path}, row {row} of it ({file}) is damaged: its content is not what was written"
            )
    return found


def _reopened(folder: Path) -> LatentDataset:
    return LatentDataset(folder, sampled_rows=0)


def _read_negative(folder: Path, record: DatasetRecord) -> Tensor:
    path, info = folder / NEGATIVE_FILE, record.info
    try:
        tensors = load_file(require_regular_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    embeds = tensors.get("prompt_embeds", torch.empty(0))
    if (
        embeds.ndim != 2
        or embeds.shape[1] != info.text_dim
        or not 1 <= len(embeds) <= info.text_length
    ):
        raise ValueError(f"{path} must hold prompt_embeds [1..{info.text_length}, {info.text_dim}]")
    if embeds.dtype != torch.float32:
        raise ValueError(f"{path} must hold prompt_embeds in float32, not {embeds.dtype}")
    if record.negative is not None and file_digest(path) != record.negative:
        raise ValueError(f"{path} is damaged: its content is not what was written")
    if not bool(torch.isfinite(embeds).all()):
        raise ValueError(f"{path}: its prompt_embeds hold NaN or infinite values")
    return embeds
