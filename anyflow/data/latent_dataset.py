"""Read a latent dataset: the files that ``latent_format`` describes.

Numbers are fp32 and come back bit for bit. Reading maps the shards into memory: opening costs their
headers, their digests and a few samples; every sample that is read is compared with its digest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyflow.data.latent_format import (
    INFO_FILE,
    NEGATIVE_FILE,
    SCHEMA,
    DatasetInfo,
    DatasetRecord,
    check_same,
    check_shard,
    map_shard,
    matches_digest,
    pa,
    read_negative,
    read_record,
    shards,
    written_samples,
)
from anyflow.data.latent_writer import LatentWriter
from anyflow.data.sample import Sample

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
    "written_samples",
]

_CHECKED_SAMPLES = 4  # that opening reads whole


class LatentDataset:
    """Read a latent dataset.

    Args:
        folder: written by :class:`LatentWriter`.
        checked_samples: number of samples, evenly spaced, that are compared with their digests when
            the dataset is opened; all others when they are read.

    Raises:
        ValueError: the folder is no finished dataset, a shard is damaged, missing, exchanged or of
            another dataset, or a sample has a shape of its own; when a sample is read, its content
            is not what was written, or holds NaN or infinity. The message names the sample and the
            video.
    """

    def __init__(self, folder: Path, *, checked_samples: int = _CHECKED_SAMPLES) -> None:
        self.folder = folder
        self.record = read_record(folder)
        self.info, samples = self.record.info, self.record.num_samples
        if samples is None:
            raise ValueError(f"{folder} is not finished: run the same `anyflow preprocess` again")
        self._table = pa.concat_tables([SCHEMA.empty_table(), *self._checked_shards()])
        if len(self._table) != samples:
            raise ValueError(
                f"{folder} should have {samples} samples, not {len(self._table)}: a shard is "
                "missing or cut off"
            )
        if samples == 0:
            raise ValueError(f"{folder} holds no videos")
        self._check_shapes()
        self._negative = read_negative(folder, self.record)
        for sample in sorted(
            {*np.linspace(0, samples - 1, num=checked_samples, dtype=int).tolist()}
        ):
            self._numbers(sample)

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return _reopened, (self.folder,)  # to a worker process goes the path, not the data

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample must be in 0..{len(self) - 1}, got {index}")
        latents, embeds = (torch.from_numpy(values.copy()) for values in self._numbers(index))
        return Sample(
            latents.view(self.info.latent_shape), self._padded(embeds.view(-1, self.info.text_dim))
        )

    def file(self, index: int) -> str:
        """Return the video a sample was made from, relative to the folder of videos."""
        return str(self._table["file"][index])

    def caption(self, index: int) -> str:
        """Return the caption of a sample, as written by its author."""
        return str(self._table["caption"][index])

    def check_sample(self, index: int) -> None:
        """Compare a sample with its digest.

        Raises:
            ValueError: it is damaged, or holds NaN or infinity.
        """
        self._numbers(index)

    @property
    def negative_prompt_embeds(self) -> Tensor:
        """Return the negative prompt, ``[1, text_length, text_dim]`` fp32, zero-padded."""
        return self._padded(self._negative)[None]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Return ``(F, C, H, W)``."""
        return self.info.latent_shape

    @property
    def text_shape(self) -> tuple[int, int]:
        """Return ``(text_length, text_dim)``."""
        return self.info.text_length, self.info.text_dim

    @property
    def fingerprint(self) -> str:
        """Identify the facts of ``dataset.json`` and the digests of the samples, in order.

        A sample that was damaged later has the same digest; reading it is an error, and so is
        opening a dataset whose digests are not those recorded of its shards.
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
        missing = _missing(self.record, found)
        if missing:
            raise ValueError(
                f"{self.folder} should have {self.record.num_samples} samples, not "
                f"{sum(len(map_shard(path)) for path in found)}:"
                f" {', '.join(missing)} is missing"
            )
        for path in found:
            table = map_shard(path)
            check_shard(path, table, self.record)
            yield table

    def _numbers(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return latents and prompt as flat views of the mapped file, if they match the digest."""
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
        """Compare the shapes of all samples, which Arrow has without reading a single number."""
        expected = self.info.latent_shape
        shapes = np.concatenate(
            [chunk.flatten().to_numpy() for chunk in self._table["latents_shape"].chunks]
        )
        for sample in np.flatnonzero((shapes.reshape(-1, 4) != expected).any(axis=1)).tolist():
            shape = tuple(shapes.reshape(-1, 4)[sample].tolist())
            raise ValueError(
                f"{self._name(sample)}: its latents are {shape}, those of the dataset {expected}"
            )
        for sample in np.flatnonzero(self._lengths("latents") != math.prod(expected)).tolist():
            raise ValueError(
                f"{self._name(sample)}: its latents are not as many values as {expected} has"
            )
        tokens, rest = np.divmod(self._lengths("prompt_embeds"), self.info.text_dim)
        for sample in np.flatnonzero(
            (rest != 0) | (tokens < 1) | (tokens > self.info.text_length)
        ).tolist():
            raise ValueError(
                f"{self._name(sample)}: its prompt has "
                f"{self._lengths('prompt_embeds')[sample]} values, which are not 1 to "
                f"{self.info.text_length} tokens of {self.info.text_dim}"
            )

    def _lengths(self, column: str) -> np.ndarray:
        import pyarrow.compute

        return pyarrow.compute.list_value_length(self._table[column]).to_numpy()

    def _name(self, sample: int) -> str:
        return f"sample {sample} ({self.file(sample)}) of {self.folder}"


def damages(folder: Path) -> list[str]:
    """Read a whole dataset and describe what is damaged in it, by shard and sample.

    The list is empty for a sound dataset. A dataset that is not finished is examined as far as it
    is written.

    Raises:
        ValueError: the folder holds no dataset, or its ``dataset.json`` is damaged.
    """
    record = read_record(folder)
    found: list[str] = []
    try:
        read_negative(folder, record)
    except ValueError as error:
        found.append(str(error))
    there = shards(folder)
    found += [f"{folder / name} is missing" for name in _missing(record, there)]
    samples = 0
    for path in there:
        try:
            table = map_shard(path)
        except ValueError as error:
            found.append(str(error))
            continue
        samples += len(table)
        found += _shard_damages(path, table, record)
    if record.num_samples is not None and not found and samples != record.num_samples:
        found.append(
            f"{folder} should have {record.num_samples} samples, not {samples}: a shard is missing "
            "or cut off"
        )
    return found


def _shard_damages(path: Path, table: Any, record: DatasetRecord) -> list[str]:
    found = []
    recorded = {} if record.shards is None else record.shards
    try:
        # a killed run may not have recorded its last
        if record.num_samples is not None or path.name in recorded:
            check_shard(path, table, record)
    except ValueError as error:
        found.append(str(error))
    for sample in range(len(table)):
        file, caption, digest = (str(table[name][sample]) for name in ("file", "caption", "digest"))
        numbers = [table[name][sample].values.to_numpy() for name in ("latents", "prompt_embeds")]
        if not matches_digest(digest, file, caption, numbers):
            found.append(
                f"{path}, sample {sample} of it ({file}) is damaged: its content is not what was "
                "written"
            )
    return found


def _reopened(folder: Path) -> LatentDataset:
    return LatentDataset(folder, checked_samples=0)


def _missing(record: DatasetRecord, found: Sequence[Path]) -> list[str]:
    """Return the names of the shards that are recorded and were not found."""
    recorded = {} if record.shards is None else record.shards
    return sorted(set(recorded) - {path.name for path in found})
