"""Write a latent dataset shard by shard, so that a killed run loses at most one shard."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save
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
    pa,
    read_negative,
    read_record,
    sample_digest,
    shard_digest,
    shards,
    write_record,
)
from anyflow.utils.documents import require_regular_file
from anyflow.utils.writing import hidden, publish, write_bytes, writing


class LatentWriter:
    """Write a latent dataset shard by shard; a context manager.

    A shard appears under its name only when all of it is on the disk. On the folder of a killed run
    the writer continues after the last such shard; ``written_samples`` says what the shards hold.

    Args:
        folder: made if need be.
        info: description of the dataset; the same as in the earlier run.
        negative_prompt_embeds: ``[S, text_dim]`` fp32, unpadded.
        samples_per_shard: samples that a kill can cost.
        packages: the versions that make the samples, by package, for the record, which keeps those
            of earlier runs.

    Raises:
        ValueError: the folder holds a dataset that was made otherwise, or a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        info: DatasetInfo,
        negative_prompt_embeds: Tensor,
        *,
        samples_per_shard: int = 32,
        packages: Mapping[str, str | None] | None = None,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be >= 1, got {samples_per_shard}")
        self._folder, self._info, self._samples_per_shard = folder, info, samples_per_shard
        folder.mkdir(parents=True, exist_ok=True)
        self._packages = (
            None if packages is None else {name: [version] for name, version in packages.items()}
        )
        self._shards: dict[str, str] = {}
        self._num_samples = 0
        if (folder / INFO_FILE).exists():
            self._go_on(read_record(folder))
        elif shards(folder):
            raise ValueError(f"{folder} has shards but no {INFO_FILE}")
        else:
            embeds = negative_prompt_embeds.float().contiguous()
            write_bytes(folder / NEGATIVE_FILE, save({"prompt_embeds": embeds}))
        self._negative = file_digest(require_regular_file(folder / NEGATIVE_FILE))
        self._write_record(num_samples=None)
        self._shard = max(
            (int(path.stem.removeprefix("shard-")) + 1 for path in shards(folder)), default=0
        )
        self._stream: Any = None
        self._digests: list[str] = []

    def add(self, file: str, caption: str, latents: Tensor, prompt_embeds: Tensor) -> None:
        """Append a sample: ``latents[F, C, H, W]`` and ``prompt_embeds[S, text_dim]``, unpadded."""
        if tuple(latents.shape) != self._info.latent_shape:
            raise ValueError(
                f"{file}: latents must be {list(self._info.latent_shape)}, got "
                f"{list(latents.shape)}"
            )
        values = latents.float().contiguous().numpy()
        tokens = prompt_embeds.float().contiguous().numpy()
        digest = sample_digest(file, caption, (values.reshape(-1), tokens.reshape(-1)))
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
        if len(self._digests) == self._samples_per_shard:
            self._close_shard()

    def finish(self) -> None:
        """Write what is left and declare the dataset complete."""
        if self._stream is not None:
            self._close_shard()
        self._write_record(num_samples=self._num_samples)

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
        read_negative(self._folder, record)
        for path in shards(self._folder):
            table = map_shard(path)
            # a run that was killed may not have recorded its last one
            if record.shards is not None and path.name in record.shards:
                check_shard(path, table, record)
            self._shards[path.name] = shard_digest(table["digest"].to_pylist())
            self._num_samples += len(table)
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
        self._num_samples += len(self._digests)
        self._shard += 1
        self._digests = []
        self._write_record(num_samples=None)

    def _write_record(self, num_samples: int | None) -> None:
        write_record(
            self._folder,
            DatasetRecord(self._info, num_samples, self._packages, self._shards, self._negative),
        )
