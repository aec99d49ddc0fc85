"""Videos as latents on disk: the format, its writer and its reader.

A folder holds

    dataset.json                  a :class:`DatasetInfo`, and the number of rows once all are written
    negative_prompt.safetensors   ``prompt_embeds`` [S, text_dim] fp32, unpadded
    shard-000000.arrow, ...       the rows, in order; the schema is ``SCHEMA``

A shard is an Arrow stream with one record batch per row (``datasets.Dataset.from_file`` opens one too). Numbers are
fp32 and come back bit for bit. Reading maps the shards into memory: opening costs no more than their headers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from anyflow.data.sample import Sample
from anyflow.writing import write_bytes, writing

try:
    import pyarrow as pa
    import pyarrow.compute
except ImportError as error:
    raise ImportError("latent datasets need pyarrow: pip install 'anyflow[train]'") from error

FORMAT = "anyflow-latents"
VERSION = 1
INFO_FILE = "dataset.json"
NEGATIVE_FILE = "negative_prompt.safetensors"
SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("caption", pa.string()),
        ("latents", pa.large_list(pa.float32())),
        ("latents_shape", pa.list_(pa.int32(), 4)),  # F, C, H, W
        ("prompt_embeds", pa.large_list(pa.float32())),  # [tokens, text_dim], unpadded
        ("digest", pa.string()),  # of the row's numbers
    ]
)


@dataclass(frozen=True)
class DatasetInfo:
    """What all rows of a dataset share.

    Args:
        latent_shape: ``(F, C, H, W)``.
        text_length: tokens that prompts are zero-padded to when they are read.
        text_dim: width of a token.
        source: what made the numbers, as JSON values; two datasets with equal sources were made alike.
    """

    latent_shape: tuple[int, int, int, int]
    text_length: int
    text_dim: int
    source: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(self.latent_shape) != 4 or min(*self.latent_shape, self.text_length, self.text_dim) < 1:
            raise ValueError(
                "latent_shape must be four positive sizes (F, C, H, W), text_length and text_dim positive, got "
                f"{self.latent_shape}, {self.text_length}, {self.text_dim}"
            )


def read_info(folder: Path) -> tuple[DatasetInfo, int | None]:
    """``dataset.json`` of a folder: its facts, and the number of rows or None while they are being written.

    Raises:
        ValueError: there is none, it is damaged, or of another version.
    """
    path = folder / INFO_FILE
    names = {field.name for field in fields(DatasetInfo)}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or set(raw) != {"format", "version", "rows"} | names:
            raise ValueError(f"expected an object with the keys {sorted({'format', 'version', 'rows'} | names)}")
        if (raw["format"], raw["version"]) != (FORMAT, VERSION):
            raise ValueError(f"this release reads {FORMAT} {VERSION}, not {raw['format']} {raw['version']}")
        values = {name: raw[name] for name in names}
        return DatasetInfo(**values | {"latent_shape": tuple(values["latent_shape"])}), raw["rows"]
    except FileNotFoundError:
        raise ValueError(
            f"no latent dataset at {folder}: it has no {INFO_FILE} (`anyflow preprocess` writes one)"
        ) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not usable: {error}") from None


class LatentDataset:
    """The reader.

    Args:
        folder: written by :class:`LatentWriter`.

    Raises:
        ValueError: the folder is no finished dataset, a shard is damaged or missing, or a row has a shape of its own;
            when a row is read, it holds NaN or infinity. The message names the row and the video.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info, rows = read_info(folder)
        if rows is None:
            raise ValueError(f"{folder} is not finished: run the same `anyflow preprocess` again")
        self._table = pa.concat_tables([_map_shard(path) for path in shards(folder)] or [SCHEMA.empty_table()])
        if len(self._table) != rows:
            raise ValueError(f"{folder} should have {rows} rows, not {len(self._table)}: a shard is missing or cut off")
        if rows == 0:
            raise ValueError(f"{folder} holds no videos")
        self._check_shapes()
        self._negative = self._read_negative()

    def __reduce__(self) -> tuple[type[LatentDataset], tuple[Path]]:
        return type(self), (self.folder,)  # to a worker process goes the path, not the data

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in 0..{len(self) - 1}, got {index}")
        latents = self._numbers("latents", index).view(self.info.latent_shape)
        return Sample(latents, self._padded(self._numbers("prompt_embeds", index).view(-1, self.info.text_dim)))

    def file(self, index: int) -> str:
        """The video a row was made from, relative to the folder of videos."""
        return str(self._table["file"][index])

    def caption(self, index: int) -> str:
        """The caption of a row, as written by its author."""
        return str(self._table["caption"][index])

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
        """Of ``dataset.json`` and of the numbers of every row, in order."""
        content = hashlib.blake2b(json.dumps(asdict(self.info), sort_keys=True).encode(), digest_size=16)
        content.update(self._negative.numpy().tobytes())
        for digest in self._table["digest"].to_pylist():
            content.update(digest.encode())
        return content.hexdigest()

    def _read_negative(self) -> Tensor:
        path = self.folder / NEGATIVE_FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        embeds = tensors.get("prompt_embeds", torch.empty(0))
        if embeds.ndim != 2 or embeds.shape[1] != self.info.text_dim or not 1 <= len(embeds) <= self.info.text_length:
            raise ValueError(f"{path} must hold prompt_embeds [1..{self.info.text_length}, {self.info.text_dim}]")
        return embeds

    def _numbers(self, column: str, index: int) -> Tensor:
        values = torch.from_numpy(self._table[column][index].values.to_numpy().copy())
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{self._name(index)}: its {column} hold NaN or infinite values")
        return values

    def _padded(self, embeds: Tensor) -> Tensor:
        return torch.nn.functional.pad(embeds, (0, 0, 0, self.info.text_length - len(embeds)))

    def _check_shapes(self) -> None:
        """Compare the shapes of all rows, which Arrow has without reading a single number."""
        expected = self.info.latent_shape
        shapes = np.concatenate([chunk.flatten().to_numpy() for chunk in self._table["latents_shape"].chunks])
        for row in np.flatnonzero((shapes.reshape(-1, 4) != expected).any(axis=1)).tolist():
            shape = tuple(shapes.reshape(-1, 4)[row].tolist())
            raise ValueError(f"{self._name(row)}: its latents are {shape}, those of the dataset {expected}")
        for row in np.flatnonzero(self._lengths("latents") != math.prod(expected)).tolist():
            raise ValueError(f"{self._name(row)}: its latents are not as many values as {expected} has")
        tokens, rest = np.divmod(self._lengths("prompt_embeds"), self.info.text_dim)
        for row in np.flatnonzero((rest != 0) | (tokens < 1) | (tokens > self.info.text_length)).tolist():
            raise ValueError(
                f"{self._name(row)}: its prompt has {self._lengths('prompt_embeds')[row]} values, which are not 1 to "
                f"{self.info.text_length} tokens of {self.info.text_dim}"
            )

    def _lengths(self, column: str) -> np.ndarray:
        return pa.compute.list_value_length(self._table[column]).to_numpy()

    def _name(self, row: int) -> str:
        return f"row {row} ({self.file(row)}) of {self.folder}"


class LatentWriter:
    """Writes a dataset, shard by shard; a context manager.

    A shard appears under its name only when all of it is on the disk. Opened on the folder of a run that was killed, it
    goes on after the last such shard; :func:`written_rows` says what is there.

    Args:
        folder: made if need be.
        info: of the dataset; the same as in the earlier run.
        negative_prompt_embeds: ``[S, text_dim]`` fp32, unpadded.
        rows_per_shard: rows that a kill can cost.

    Raises:
        ValueError: the folder holds a dataset that was made otherwise.
    """

    def __init__(
        self, folder: Path, info: DatasetInfo, negative_prompt_embeds: Tensor, *, rows_per_shard: int = 32
    ) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be >= 1, got {rows_per_shard}")
        self._folder, self._info, self._rows_per_shard = folder, info, rows_per_shard
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INFO_FILE).exists():
            check_same(folder, asdict(read_info(folder)[0]), asdict(info))
        elif shards(folder):
            raise ValueError(f"{folder} has shards but no {INFO_FILE}")
        else:
            embeds = negative_prompt_embeds.float().contiguous()
            _write_atomically(folder / NEGATIVE_FILE, save({"prompt_embeds": embeds}))
        self._write_info(rows=None)
        self._rows = len(written_rows(folder))
        self._shard = max((int(path.stem.removeprefix("shard-")) + 1 for path in shards(folder)), default=0)
        self._stream: Any = None
        self._in_shard = 0

    def add(self, file: str, caption: str, latents: Tensor, prompt_embeds: Tensor) -> None:
        """Append a row: ``latents[F, C, H, W]`` and ``prompt_embeds[S, text_dim]``, unpadded."""
        if tuple(latents.shape) != self._info.latent_shape:
            raise ValueError(f"{file}: latents must be {list(self._info.latent_shape)}, got {list(latents.shape)}")
        values = latents.float().contiguous().numpy()
        tokens = prompt_embeds.float().contiguous().numpy()
        digest = hashlib.blake2b(values.tobytes() + tokens.tobytes(), digest_size=16).hexdigest()
        columns = [[file], [caption], [values.reshape(-1)], [values.shape], [tokens.reshape(-1)], [digest]]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        with writing(self._temporary):
            if self._stream is None:
                self._stream = pa.ipc.new_stream(str(self._temporary), SCHEMA)
            self._stream.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self._in_shard += 1
        if self._in_shard == self._rows_per_shard:
            self._close_shard()

    def finish(self) -> None:
        """Write what is left and declare the dataset complete."""
        if self._stream is not None:
            self._close_shard()
        self._write_info(rows=self._rows)

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._stream is not None:
            with suppress(OSError):  # on a full disk, closing fails as writing did
                self._stream.close()
        self._temporary.unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self._folder / f".shard-{self._shard:06d}.arrow.tmp"

    def _close_shard(self) -> None:
        with writing(self._temporary):
            self._stream.close()
            self._stream = None
            _publish(self._temporary, self._folder / f"shard-{self._shard:06d}.arrow")
        self._rows += self._in_shard
        self._shard += 1
        self._in_shard = 0

    def _write_info(self, rows: int | None) -> None:
        facts = {"format": FORMAT, "version": VERSION, "rows": rows, **asdict(self._info)}
        _write_atomically(self._folder / INFO_FILE, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())


def shards(folder: Path) -> list[Path]:
    """The shards of a dataset, in order."""
    return sorted(folder.glob("shard-*.arrow"))


def written_rows(folder: Path) -> list[tuple[str, str]]:
    """``(file, caption)`` of every row in a finished shard, in order."""
    rows: list[tuple[str, str]] = []
    for path in shards(folder):
        table = _map_shard(path)
        rows += zip(table["file"].to_pylist(), table["caption"].to_pylist(), strict=True)
    return rows


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError that lists every fact in which a dataset differs from what is about to be added to it."""
    before, now = (json.loads(json.dumps(facts)) for facts in (before, now))
    changes = [f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in now if before.get(key) != now[key]]
    if changes:
        raise ValueError(f"{folder} was made with other settings ({'; '.join(changes)}); choose another folder")


def _map_shard(path: Path) -> Any:
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if table.schema != SCHEMA:
        raise ValueError(f"{path} has columns {table.schema.names} of other types or names than {SCHEMA.names}")
    return table


def _write_atomically(path: Path, content: bytes) -> None:
    write_bytes(path, content)
    _sync(path.parent)


def _publish(temporary: Path, path: Path) -> None:
    """Rename a finished file, with its content on the disk before and its name after."""
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
