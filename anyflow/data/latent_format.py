"""The files of a latent dataset: their names, their schema, and the digests that tell when they are
damaged.

A folder holds

    dataset.json                  a :class:`DatasetRecord`
    negative_prompt.safetensors   ``prompt_embeds`` [S, text_dim] fp32, unpadded
    shard-000000.arrow, ...       the rows, in order; the schema is ``SCHEMA``

A shard is an Arrow stream with one record batch per row (``datasets.Dataset.from_file`` opens one
too). Every row has a digest of its content, and ``dataset.json`` one of each shard's digests, of
the negative prompt and of itself, so that a flipped bit is found, and a shard that is cut off,
exchanged or of another dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

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
        ("digest", pa.string()),  # of the row: row_digest
    ]
)
_AGAIN = "delete it and run the same `anyflow preprocess` again, which encodes its videos anew"
# in front of a digest that covers the names, too; older datasets have one of the numbers
_WHOLE_ROW = "row:"


@dataclass(frozen=True)
class DatasetInfo:
    """What all rows of a dataset share.

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
    """The content of ``dataset.json``.

    Args:
        info: what all rows share.
        rows: how many there are, or None while they are being written.
        packages: the versions that made the rows, several where a run went on with another one, by
            package; None in a dataset without the record.
        shards: :func:`shard_digest` by the name of the file; None in a dataset without the record.
        negative: digest of the file of the negative prompt; None in a dataset without the record.
    """

    info: DatasetInfo
    rows: int | None
    packages: Mapping[str, list[str | None]] | None = None
    shards: Mapping[str, str] | None = None
    negative: str | None = None


def read_record(folder: Path) -> DatasetRecord:
    """Read ``dataset.json`` of a folder.

    Raises:
        ValueError: there is none, it is damaged, or of another version.
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
        rows = raw["rows"]
        if rows is not None and not (type(rows) is int and rows >= 0):
            raise ValueError(f"rows must be a number >= 0 or null, got {rows!r}")
        if set(raw) == old:
            return DatasetRecord(info, rows)
        if raw["digest"] != _record_digest(raw):
            raise ValueError("its digest is not that of its content: it was damaged or edited")
        digests, packages = raw["shards"], raw["packages"]
        if not isinstance(digests, dict) or not isinstance(packages, dict | None):
            raise ValueError("shards must be an object, and packages one or null")
        return DatasetRecord(info, rows, packages, digests, raw["negative"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not usable: {error}") from None


def write_record(folder: Path, record: DatasetRecord) -> None:
    """Write ``dataset.json``, whole or not at all."""
    content = asdict(record)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "rows": content.pop("rows"),
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
    if not os.path.lexists(folder / INFO_FILE) or read_record(folder).rows or shards(folder):
        return False
    for name in (INFO_FILE, NEGATIVE_FILE):
        (folder / name).unlink(missing_ok=True)
    return True


def row_digest(file: str, caption: str, numbers: Iterable[Any]) -> str:
    """Return the digest of a row: of its texts and of its ``latents`` and ``prompt_embeds``, fp32
    arrays.
    """
    content = hashlib.blake2b(digest_size=16)
    for text in (file.encode(), caption.encode()):
        content.update(len(text).to_bytes(8, "little") + text)
    for values in numbers:
        content.update(values.nbytes.to_bytes(8, "little"))
        content.update(values)
    return _WHOLE_ROW + content.hexdigest()


def matches_digest(digest: str, file: str, caption: str, numbers: Iterable[Any]) -> bool:
    """Return whether a row has its digest; rows of older datasets have one of their numbers
    alone.
    """
    if digest.startswith(_WHOLE_ROW):
        return digest == row_digest(file, caption, numbers)
    content = hashlib.blake2b(digest_size=16)
    for values in numbers:
        content.update(values)
    return digest == content.hexdigest()


def shard_digest(row_digests: Iterable[str]) -> str:
    """Return the digest of the digests of a shard's rows, in their order."""
    return hashlib.blake2b("\n".join(row_digests).encode(), digest_size=16).hexdigest()


def shards(folder: Path) -> list[Path]:
    """Return the shards of a dataset, in order."""
    return sorted(folder.glob("shard-*.arrow"))


def written_rows(folder: Path) -> list[tuple[str, str]]:
    """Return ``(file, caption)`` of every row in a finished shard, in order."""
    rows: list[tuple[str, str]] = []
    for path in shards(folder):
        table = map_shard(path)
        rows += zip(table["file"].to_pylist(), table["caption"].to_pylist(), strict=True)
    return rows


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` that lists every fact in which a dataset differs from what is about to
    be added to it.
    """
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
        ValueError: it is no such file, or cut off or damaged in what describes its rows.
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
        raise ValueError(f"{path} is damaged: a row of it lacks a value; {_AGAIN}")
    return table


def check_shard(path: Path, table: Any, record: DatasetRecord) -> None:
    """Raise a ``ValueError`` for a shard whose rows are not those that ``dataset.json`` has
    recorded of it.
    """
    if record.shards is None:
        return
    if path.name not in record.shards:
        raise ValueError(f"{path} is not of this dataset: {INFO_FILE} does not have it")
    if shard_digest(table["digest"].to_pylist()) != record.shards[path.name]:
        raise ValueError(
            f"{path} is damaged or of another dataset: its rows are not those that were written; "
            f"{_AGAIN}"
        )


def file_digest(path: Path) -> str:
    """Return the digest of a small file's bytes."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _record_digest(facts: Mapping[str, Any]) -> str:
    content = {name: value for name, value in facts.items() if name != "digest"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
