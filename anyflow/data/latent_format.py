"""Define the files of a latent dataset: names, schema, and digests that tell when one is damaged.

A folder holds

    dataset.json                  a :class:`DatasetRecord`
    negative_prompt.safetensors   ``prompt_embeds`` [S, text_dim] fp32, unpadded
    shard-000000.arrow, ...       the samples, in order; the schema is ``SCHEMA``

A shard is an Arrow stream with one record batch per sample, which ``datasets.Dataset.from_file``
opens too. Every sample has a digest of its content, and ``dataset.json`` one of each shard's
digests, of the negative prompt and of itself. The digests reveal a flipped bit, and a shard that is
cut off, exchanged or of another dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from anyflow.utils.documents import read_json, require_regular_file
from anyflow.utils.packages import missing
from anyflow.utils.writing import write_bytes

try:
    import pyarrow as pa
except ImportError as error:
    raise ImportError(missing("a dataset of latents", "pyarrow"), name="pyarrow") from error

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
        ("digest", pa.string()),  # sample_digest of the other fields
    ]
)
_AGAIN = "delete it and run the same `anyflow preprocess` again, which encodes its videos anew"
# in front of a digest that covers the names, too; older datasets have one of the numbers
_WHOLE_SAMPLE = "row:"


@dataclass(frozen=True)
class DatasetInfo:
    """Hold what all samples of a dataset share.

    Args:
        latent_shape: ``(F, C, H, W)``.
        text_length: tokens that prompts are zero-padded to when they are read.
        text_dim: width of a token.
        source: what made the numbers, as JSON values; two datasets with equal sources were made
            alike.
    """

    latent_shape: tuple[int, int, int, int]
    text_length: int
    text_dim: int
    source: Mapping[str, Any]

    def __post_init__(self) -> None:
        sizes = (*self.latent_shape, self.text_length, self.text_dim)
        if len(self.latent_shape) != 4 or not all(
            type(size) is int and size >= 1 for size in sizes
        ):
            raise ValueError(
                "latent_shape must be four positive sizes (F, C, H, W), text_length and text_dim "
                "positive, got "
                f"{self.latent_shape}, {self.text_length}, {self.text_dim}"
            )
        if not isinstance(self.source, Mapping):
            raise ValueError(f"source must be an object, got {self.source!r}")


@dataclass(frozen=True)
class DatasetRecord:
    """Hold the content of ``dataset.json``, whose key of ``num_samples`` is ``rows``.

    Args:
        info: what all samples share.
        num_samples: how many samples the dataset has, or None while they are being written.
        packages: the versions that made the samples, by package, several where a resumed run had
            another one; None in a dataset without the record.
        shards: :func:`shard_digest` by the name of the file; None in a dataset without the record.
        negative: digest of the file of the negative prompt; None in a dataset without the record.
    """

    info: DatasetInfo
    num_samples: int | None
    packages: Mapping[str, list[str | None]] | None = None
    shards: Mapping[str, str] | None = None
    negative: str | None = None


def read_record(folder: Path) -> DatasetRecord:
    """Read ``dataset.json`` of a folder.

    Raises:
        ValueError: the record is missing, damaged, or of another version.
    """
    path = folder / INFO_FILE
    if not os.path.lexists(path):
        raise ValueError(
            f"no latent dataset at {folder}: it has no {INFO_FILE} (`anyflow preprocess` writes "
            "one)"
        )
    raw = read_json(path, finite=True)
    names = {entry.name for entry in fields(DatasetInfo)}
    old = {"format", "version", "rows"} | names
    new = old | {"packages", "shards", "negative", "digest"}
    try:
        if not isinstance(raw, dict) or set(raw) not in (old, new):
            raise ValueError(f"expected an object with the keys {sorted(new)}")
        if (raw["format"], raw["version"]) != (FORMAT, VERSION):
            raise ValueError(
                f"this release reads {FORMAT} {VERSION}, not {raw['format']} {raw['version']}"
            )
        values = {name: raw[name] for name in names}
        info = DatasetInfo(**values | {"latent_shape": tuple(values["latent_shape"])})
        num_samples = raw["rows"]
        if num_samples is not None and not (type(num_samples) is int and num_samples >= 0):
            raise ValueError(f"rows must be a number >= 0 or null, got {num_samples!r}")
        if set(raw) == old:
            return DatasetRecord(info, num_samples)
        if raw["digest"] != _record_digest(raw):
            raise ValueError("its digest is not that of its content: it was damaged or edited")
        digests, packages = raw["shards"], raw["packages"]
        if not isinstance(digests, dict) or not isinstance(packages, dict | None):
            raise ValueError("shards must be an object, and packages one or null")
        return DatasetRecord(info, num_samples, packages, digests, raw["negative"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not usable: {error}") from None


def write_record(folder: Path, record: DatasetRecord) -> None:
    """Write ``dataset.json``, whole or not at all."""
    content = asdict(record)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "rows": content.pop("num_samples"),
        **content.pop("info"),
        **content,
    }
    facts = json.loads(json.dumps(facts))
    facts["digest"] = _record_digest(facts)
    write_bytes(
        folder / INFO_FILE, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()
    )


def remove_empty(folder: Path) -> bool:
    """Remove the record of a dataset that has no shard, and return whether there was one to remove.

    Raises:
        ValueError: the record is damaged, or of another version.
    """
    if not os.path.lexists(folder / INFO_FILE) or read_record(folder).num_samples or shards(folder):
        return False
    for name in (INFO_FILE, NEGATIVE_FILE):
        (folder / name).unlink(missing_ok=True)
    return True


def sample_digest(file: str, caption: str, numbers: Iterable[Any]) -> str:
    """Return the digest of a sample: of its texts, and of its ``latents`` and ``prompt_embeds``."""
    content = hashlib.blake2b(digest_size=16)
    for text in (file.encode(), caption.encode()):
        content.update(len(text).to_bytes(8, "little") + text)
    for values in numbers:
        content.update(values.nbytes.to_bytes(8, "little"))
        content.update(values)
    return _WHOLE_SAMPLE + content.hexdigest()


def matches_digest(digest: str, file: str, caption: str, numbers: Iterable[Any]) -> bool:
    """Tell whether a sample has its digest; samples of older datasets have one of their numbers."""
    if digest.startswith(_WHOLE_SAMPLE):
        return digest == sample_digest(file, caption, numbers)
    content = hashlib.blake2b(digest_size=16)
    for values in numbers:
        content.update(values)
    return digest == content.hexdigest()


def shard_digest(sample_digests: Iterable[str]) -> str:
    """Return the digest of the digests of a shard's samples, in their order."""
    return hashlib.blake2b("\n".join(sample_digests).encode(), digest_size=16).hexdigest()


def shards(folder: Path) -> list[Path]:
    """Return the shards of a dataset, in order."""
    return sorted(folder.glob("shard-*.arrow"))


def written_samples(folder: Path) -> list[tuple[str, str]]:
    """Return ``(file, caption)`` of every sample in a finished shard, in order."""
    samples: list[tuple[str, str]] = []
    for path in shards(folder):
        table = map_shard(path)
        samples += zip(table["file"].to_pylist(), table["caption"].to_pylist(), strict=True)
    return samples


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` that lists every fact in which a dataset differs from its addition."""
    before, now = (json.loads(json.dumps(facts)) for facts in (before, now))
    changes = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in now
        if before.get(key) != now[key]
    ]
    if changes:
        raise ValueError(
            f"{folder} was made with other settings ({'; '.join(changes)}); choose another folder"
        )


def map_shard(path: Path) -> Any:
    """Map a shard into memory as an Arrow table whose structure is sound; its numbers are not read.

    Raises:
        ValueError: it is no such file, or cut off or damaged in what describes its samples.
    """
    require_regular_file(path)
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        if table.schema == SCHEMA:
            table.validate(full=True)  # offsets out of bounds would be read
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {_one_line(error)}; {_AGAIN}") from None
    if table.schema != SCHEMA:
        raise ValueError(
            f"{path} has columns {table.schema.names} of other types or names than {SCHEMA.names}"
        )
    if any(column.null_count for column in table.columns):
        raise ValueError(f"{path} is damaged: a sample of it lacks a value; {_AGAIN}")
    return table


def check_shard(path: Path, table: Any, record: DatasetRecord) -> None:
    """Raise a ``ValueError`` unless a shard's samples are those that ``dataset.json`` records."""
    if record.shards is None:
        return
    if path.name not in record.shards:
        raise ValueError(f"{path} is not of this dataset: {INFO_FILE} does not have it")
    if shard_digest(table["digest"].to_pylist()) != record.shards[path.name]:
        raise ValueError(
            f"{path} is damaged or of another dataset: its samples are not those that were "
            f"written; {_AGAIN}"
        )


def read_negative(folder: Path, record: DatasetRecord) -> Tensor:
    """Read the tokens of the negative prompt, ``[S, text_dim]`` fp32, unpadded.

    Raises:
        ValueError: the file is missing or damaged, or does not hold such tokens.
    """
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


def file_digest(path: Path) -> str:
    """Return the digest of a small file's bytes."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _record_digest(facts: Mapping[str, Any]) -> str:
    content = {name: value for name, value in facts.items() if name != "digest"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
