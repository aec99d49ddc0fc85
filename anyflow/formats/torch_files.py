"""Read files of ``torch.save`` without ``torch.load``, checked against the bytes in the file.

The pickle in such a file is looked through before it is read, and read with every function in it
replaced by a record of its arguments, so that nothing in a file is executed and no file makes the
process ask for more memory than its own size. A tensor's bytes are then read from its place in the
file, after its storage's size has been compared with that of the file's entry:
``torch.load(mmap=True)`` does not compare them, and takes compressed entries for numbers.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow.formats.errors import CheckpointFormatError
from anyflow.formats.torch_pickle import (
    MAX_PICKLE_BYTES,
    NeedsCode,
    StorageRecord,
    TensorRecord,
    Unreadable,
    end_of_pickle,
    unpickled,
)

MAX_DIRECTORY_BYTES = 16 * 2**20
MAX_EXPANSION = 20  # of compressed entries
_PIECE = 2**22
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = pickle.dumps(_LEGACY_MAGIC, protocol=2)


class TorchFile:
    """Open a file of ``torch.save`` and read its tensors, of which it has :class:`TensorRecord`.

    Args:
        path: path of a regular file.

    Raises:
        CheckpointFormatError: the file is damaged, is not of ``torch.save``, needs Python code to
            be unpickled, or has storages of other sizes than it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _described(path):
            with path.open("rb") as file:
                start = file.read(len(_LEGACY_START))
            if start.startswith(b"PK\3\4"):
                self._source: _Source = _Archive(path)
            elif start == _LEGACY_START:
                self._source = _Legacy(path)
            else:
                raise Unreadable("it is not a file of torch.save")
            self.content = self._source.content

    def read(self, record: TensorRecord) -> Tensor:
        """Return the values of a tensor of this file, on the CPU and in memory of their own."""
        if record.numel == 0:
            return torch.empty(record.shape, dtype=record.dtype)
        width = record.dtype.itemsize
        with _described(self.path):
            self._source.verify(record.storage)
            raw = self._source.read(record.storage, record.offset * width, record.span * width)
            if not self._source.little_endian:
                raw = bytearray(
                    torch.frombuffer(raw, dtype=torch.uint8)
                    .view(-1, width)
                    .flip(1)
                    .numpy()
                    .tobytes()
                )
        return torch.frombuffer(raw, dtype=record.dtype).as_strided(record.shape, record.stride)

    def verify(self, record: TensorRecord) -> None:
        """Compare a tensor's storage with its checksum, where the file has one, once per storage.

        Raises:
            CheckpointFormatError: they differ.
        """
        with _described(self.path):
            self._source.verify(record.storage)


@contextmanager
def _described(path: Path) -> Iterator[None]:
    try:
        yield
    except NeedsCode as error:
        raise CheckpointFormatError(
            f"{path} needs Python code to be unpickled, which is refused: save a dictionary of "
            f"tensors alone. ({error})"
        ) from None
    except Unreadable as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # a damaged pickle or zip can raise anything
        raise CheckpointFormatError(
            f"{path} is damaged or not a file of torch.save: {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error


class _Source(Protocol):
    """Provide the object in a file, and the bytes of its storages."""

    content: Any
    little_endian: bool

    def read(self, storage: StorageRecord, start: int, length: int) -> bytearray: ...

    def verify(self, storage: StorageRecord) -> None: ...


class _Archive:
    """Read a zip archive, as torch writes since version 1.6."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _require_small_directory(path)
        self._zip = zipfile.ZipFile(path)
        entries = self._zip.infolist()
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise Unreadable("several entries of the archive have one name")
        pickles = [
            name
            for name in self._entries
            if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1
        ]
        if len(pickles) != 1:
            raise Unreadable("it is a zip archive, but not of torch.save: it has no data.pkl")
        self._top = pickles[0].removesuffix("data.pkl")
        if f"{self._top}constants.pkl" in self._entries:
            raise Unreadable(
                "it is a TorchScript archive, whose code is not run; save its state_dict()"
            )
        self._starts = _data_starts(path, entries)
        size, room = sum(entry.file_size for entry in entries), path.stat().st_size
        if size > MAX_EXPANSION * room + MAX_PICKLE_BYTES:
            raise Unreadable(f"its entries would unpack to {size} bytes, from {room}")
        self._unpacked: tuple[str, bytes] | None = None
        self._verified: set[str] = set()
        order = f"{self._top}byteorder"
        self.little_endian = (
            order not in self._entries or self._bytes_of(order, 16).strip() == b"little"
        )
        self.content = unpickled(self._bytes_of(pickles[0], MAX_PICKLE_BYTES), self._require_entry)

    def read(self, storage: StorageRecord, start: int, length: int) -> bytearray:
        entry = self._entries[f"{self._top}data/{storage.key}"]
        if entry.compress_type == zipfile.ZIP_STORED:
            return _read_range(self._path, self._starts[entry.filename] + start, length)
        if self._unpacked is None or self._unpacked[0] != entry.filename:
            self._unpacked = None
            self._unpacked = (entry.filename, self._bytes_of(entry.filename, entry.file_size))
        return bytearray(memoryview(self._unpacked[1])[start : start + length])

    def _bytes_of(self, name: str, limit: int) -> bytes:
        entry = self._entries[name]
        if entry.file_size > limit:
            raise Unreadable(f"{name} in it has {entry.file_size} bytes, and {limit} are allowed")
        if entry.compress_type == zipfile.ZIP_STORED:
            self._verify(entry)
            return bytes(_read_range(self._path, self._starts[name], entry.file_size))
        with self._zip.open(entry) as stream:  # which checks the CRC
            content = stream.read(limit + 1)
        if len(content) != entry.file_size:
            raise Unreadable(
                f"{name} in it unpacks to {len(content)} bytes, and {entry.file_size} are declared"
            )
        return content

    def verify(self, storage: StorageRecord) -> None:
        self._verify(self._entries[f"{self._top}data/{storage.key}"])

    def _verify(self, entry: zipfile.ZipInfo) -> None:
        """Compare an entry with its CRC-32, in pieces.

        A CRC of 0 is what torch writes where it was told not to compute one.
        """
        if entry.filename in self._verified or entry.CRC == 0:
            return
        crc = 0
        if entry.compress_type == zipfile.ZIP_STORED:
            start, end = (
                self._starts[entry.filename],
                self._starts[entry.filename] + entry.file_size,
            )
            for position in range(start, end, _PIECE):
                crc = zlib.crc32(
                    _read_range(self._path, position, min(_PIECE, end - position)), crc
                )
        else:
            with self._zip.open(entry) as stream:
                while piece := stream.read(_PIECE):
                    crc = zlib.crc32(piece, crc)
        if crc != entry.CRC:
            raise Unreadable(
                f"{entry.filename} in it is damaged: its CRC-32 is not the one recorded"
            )
        self._verified.add(entry.filename)

    def _require_entry(self, storage: StorageRecord) -> None:
        name, size = f"{self._top}data/{storage.key}", storage.numel * storage.dtype.itemsize
        entry = self._entries.get(name)
        if entry is None:
            raise Unreadable(f"it has no {name}, which a tensor needs")
        if entry.file_size != size:
            raise Unreadable(
                f"{name} in it has {entry.file_size} bytes, but its tensors need {size}"
            )


class _Legacy:
    """Read pickles followed by the storages, as torch wrote before version 1.6."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            head = file.read(2 * MAX_PICKLE_BYTES)
        records: dict[str, StorageRecord] = {}

        def remember(storage: StorageRecord) -> None:
            known = records.setdefault(storage.key, storage)
            if (known.dtype, known.numel) != (storage.dtype, storage.numel):
                raise Unreadable(f"storage {storage.key} has two sizes or types")

        values, position = [], 0
        for _ in range(5):
            end = end_of_pickle(head, position)
            values.append(unpickled(head[position:end], remember))
            position = end
        _, _, system, self.content, keys = values
        self.little_endian = not (isinstance(system, dict) and system.get("little_endian") is False)
        if not isinstance(keys, list) or set(records) - set(map(str, keys)):
            raise Unreadable("its list of storages is not complete")
        self._starts: dict[str, int] = {}
        for key in map(str, keys):
            if key not in records:
                raise Unreadable(f"storage {key} is of no tensor")
            order = "<q" if self.little_endian else ">q"
            (numel,) = struct.unpack(order, _read_range(path, position, 8))
            if numel != records[key].numel:
                raise Unreadable(
                    f"storage {key} has {numel} elements, but its tensors need {records[key].numel}"
                )
            self._starts[key] = position + 8
            position += 8 + numel * records[key].dtype.itemsize
        if position > path.stat().st_size:
            raise Unreadable(f"it is cut off: its tensors need {position} bytes")

    def read(self, storage: StorageRecord, start: int, length: int) -> bytearray:
        return _read_range(self._path, self._starts[storage.key] + start, length)

    def verify(self, storage: StorageRecord) -> None:
        """Accept every storage: this format has no checksums."""


def _read_range(path: Path, start: int, length: int) -> bytearray:
    content = bytearray(length)
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(content) != length:
            raise Unreadable("it is cut off")
    return content


def _require_small_directory(path: Path) -> None:
    """Refuse a zip directory that would fill the memory; its size stands at the end of the file."""
    size = path.stat().st_size
    tail = bytes(_read_range(path, max(0, size - 2**16 - 100), min(size, 2**16 + 100)))
    end = tail.rfind(b"PK\5\6")
    wide = tail.rfind(b"PK\6\6")
    if end < 0 or len(tail) < end + 22:
        raise Unreadable("it is cut off: the directory of the zip archive at its end is absent")
    sizes = [struct.unpack_from("<L", tail, end + 12)[0]]
    if sizes[0] == 0xFFFFFFFF and 0 <= wide <= len(tail) - 56:
        sizes = [struct.unpack_from("<Q", tail, wide + 40)[0]]
    if sizes[0] > MAX_DIRECTORY_BYTES:
        raise Unreadable(
            f"the directory of the zip archive has {sizes[0]} bytes, {MAX_DIRECTORY_BYTES} are "
            "allowed"
        )


def _data_starts(path: Path, entries: list[zipfile.ZipInfo]) -> dict[str, int]:
    """Return where the bytes of each entry start, after a check that no two entries share any."""
    starts, previous = {}, ("", 0)
    with path.open("rb") as file:
        for entry in sorted(entries, key=lambda e: e.header_offset):
            file.seek(entry.header_offset)
            header = file.read(30)
            if len(header) < 30 or not header.startswith(b"PK\3\4"):
                raise Unreadable(f"{entry.filename} in it has no header")
            if entry.flag_bits & 1:
                raise Unreadable(f"{entry.filename} in it is encrypted")
            name, extra = struct.unpack_from("<HH", header, 26)
            start = entry.header_offset + 30 + name + extra
            if file.read(name) != entry.orig_filename.encode(
                "utf-8" if entry.flag_bits & 0x800 else "cp437"
            ):
                raise Unreadable(f"{entry.filename} in it has another name in its header")
            if entry.header_offset < previous[1]:
                raise Unreadable(f"{previous[0]} and {entry.filename} in it overlap")
            if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
                raise Unreadable(f"{entry.filename} in it has two sizes")
            starts[entry.filename], previous = start, (entry.filename, start + entry.compress_size)
    if previous[1] > path.stat().st_size:
        raise Unreadable(f"{previous[0]} in it is cut off")
    return starts
