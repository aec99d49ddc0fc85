"""Files of ``torch.save`` without ``torch.load``: which tensors they have, checked against the bytes that are there.

The pickle in such a file is looked through before it is read, and read with every function in it replaced by a record
of its arguments, so that nothing in a file is executed and no file makes the process ask for more memory than its own
size. A tensor's bytes are then read from its place in the file, after its storage's size has been compared with that of
the file's entry: ``torch.load(mmap=True)`` does not compare them, and takes compressed entries for numbers.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow.checkpoints.errors import CheckpointFormatError

MAX_PICKLE_BYTES = 16 * 2**20  # 100,000 tensors
MAX_DIRECTORY_BYTES = 16 * 2**20
MAX_TUPLE_DEPTH = 32  # hashing a nested tuple takes C stack
MAX_EXPANSION = 20  # of compressed entries
_MAX_AXES = 64
_PIECE = 2**22
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = pickle.dumps(_LEGACY_MAGIC, protocol=2)

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
    "_Untyped": torch.uint8,
}


@dataclass(frozen=True, eq=False)
class StorageRecord:
    """The bytes that tensors share: the name of their entry, their type and the number of elements."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A tensor as a file describes it; ``offset`` and ``stride`` count elements of the storage."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Number of elements of the storage from the first one to the last one."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.numel else 0

    def problem(self) -> str | None:
        """Say what cannot be in such a record, or return None for a tensor that is dense and inside its storage."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or len(self.shape) > _MAX_AXES:
            return f"a tensor of {len(self.shape)} axes with {len(self.stride)} strides"
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            return f"a tensor of {list(self.shape)} with strides {list(self.stride)} from {self.offset}"
        available = self.storage.numel * self.storage.dtype.itemsize // self.dtype.itemsize
        if self.numel > available:
            return f"a tensor of {self.shape} that is not dense: its storage has {available} elements"
        if self.offset + self.span > available:
            return f"a tensor of {self.shape} that ends behind the {available} elements of its storage"
        return None


class TorchFile:
    """An open file of ``torch.save``: its object with tensors as :class:`TensorRecord`, and their values.

    Args:
        path: of a regular file.

    Raises:
        CheckpointFormatError: the file is damaged, is not of ``torch.save``, needs Python code to be unpickled, or has
            storages of other sizes than it says.
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
                raise _Unreadable("it is not a file of torch.save")
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
                raw = bytearray(torch.frombuffer(raw, dtype=torch.uint8).view(-1, width).flip(1).numpy().tobytes())
        return torch.frombuffer(raw, dtype=record.dtype).as_strided(record.shape, record.stride)

    def verify(self, record: TensorRecord) -> None:
        """Compare a tensor's storage with the checksum that the file has of it, if any; once for each storage.

        Raises:
            CheckpointFormatError: they differ.
        """
        with _described(self.path):
            self._source.verify(record.storage)


class _Unreadable(Exception):
    """Why a file cannot be read, without its name."""


class _NeedsCode(Exception):
    """The name of what a file would call."""


@contextmanager
def _described(path: Path) -> Iterator[None]:
    try:
        yield
    except _NeedsCode as error:
        raise CheckpointFormatError(
            f"{path} needs Python code to be unpickled, which is refused: save a dictionary of tensors alone. ({error})"
        ) from None
    except _Unreadable as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # a damaged pickle or zip can raise anything
        raise CheckpointFormatError(
            f"{path} is damaged or not a file of torch.save: {type(error).__name__}: {str(error)[:200]}"
        ) from error


class _Source(Protocol):
    """The object in a file, and the bytes of its storages."""

    content: Any
    little_endian: bool

    def read(self, storage: StorageRecord, start: int, length: int) -> bytearray: ...

    def verify(self, storage: StorageRecord) -> None: ...


class _Archive:
    """A zip archive, as torch writes since version 1.6."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _require_small_directory(path)
        self._zip = zipfile.ZipFile(path)
        entries = self._zip.infolist()
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise _Unreadable("several entries of the archive have one name")
        pickles = [name for name in self._entries if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1]
        if len(pickles) != 1:
            raise _Unreadable("it is a zip archive, but not of torch.save: it has no data.pkl")
        self._top = pickles[0].removesuffix("data.pkl")
        if f"{self._top}constants.pkl" in self._entries:
            raise _Unreadable("it is a TorchScript archive, whose code is not run; save its state_dict()")
        self._starts = _data_starts(path, entries)
        size, room = sum(entry.file_size for entry in entries), path.stat().st_size
        if size > MAX_EXPANSION * room + MAX_PICKLE_BYTES:
            raise _Unreadable(f"its entries would unpack to {size} bytes, from {room}")
        self._unpacked: tuple[str, bytes] | None = None
        self._verified: set[str] = set()
        order = f"{self._top}byteorder"
        self.little_endian = order not in self._entries or self._bytes_of(order, 16).strip() == b"little"
        self.content = _unpickled(self._bytes_of(pickles[0], MAX_PICKLE_BYTES), self._require_entry)

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
            raise _Unreadable(f"{name} in it has {entry.file_size} bytes, and {limit} are allowed")
        if entry.compress_type == zipfile.ZIP_STORED:
            self._verify(entry)
            return bytes(_read_range(self._path, self._starts[name], entry.file_size))
        with self._zip.open(entry) as stream:  # which checks the CRC
            content = stream.read(limit + 1)
        if len(content) != entry.file_size:
            raise _Unreadable(f"{name} in it unpacks to {len(content)} bytes, and {entry.file_size} are declared")
        return content

    def verify(self, storage: StorageRecord) -> None:
        self._verify(self._entries[f"{self._top}data/{storage.key}"])

    def _verify(self, entry: zipfile.ZipInfo) -> None:
        """Compare an entry with its CRC-32, in pieces; 0 is what torch writes where it was told not to compute it."""
        if entry.filename in self._verified or entry.CRC == 0:
            return
        crc = 0
        if entry.compress_type == zipfile.ZIP_STORED:
            start, end = self._starts[entry.filename], self._starts[entry.filename] + entry.file_size
            for position in range(start, end, _PIECE):
                crc = zlib.crc32(_read_range(self._path, position, min(_PIECE, end - position)), crc)
        else:
            with self._zip.open(entry) as stream:
                while piece := stream.read(_PIECE):
                    crc = zlib.crc32(piece, crc)
        if crc != entry.CRC:
            raise _Unreadable(f"{entry.filename} in it is damaged: its CRC-32 is not the one recorded")
        self._verified.add(entry.filename)

    def _require_entry(self, storage: StorageRecord) -> None:
        name, size = f"{self._top}data/{storage.key}", storage.numel * storage.dtype.itemsize
        entry = self._entries.get(name)
        if entry is None:
            raise _Unreadable(f"it has no {name}, which a tensor needs")
        if entry.file_size != size:
            raise _Unreadable(f"{name} in it has {entry.file_size} bytes, but its tensors need {size}")


class _Legacy:
    """Pickles followed by the storages, as torch wrote before version 1.6."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            head = file.read(2 * MAX_PICKLE_BYTES)
        records: dict[str, StorageRecord] = {}

        def remember(storage: StorageRecord) -> None:
            known = records.setdefault(storage.key, storage)
            if (known.dtype, known.numel) != (storage.dtype, storage.numel):
                raise _Unreadable(f"storage {storage.key} has two sizes or types")

        values, position = [], 0
        for _ in range(5):
            end = _end_of_pickle(head, position)
            values.append(_unpickled(head[position:end], remember))
            position = end
        _, _, system, self.content, keys = values
        self.little_endian = not (isinstance(system, dict) and system.get("little_endian") is False)
        if not isinstance(keys, list) or set(records) - set(map(str, keys)):
            raise _Unreadable("its list of storages is not complete")
        self._starts: dict[str, int] = {}
        for key in map(str, keys):
            if key not in records:
                raise _Unreadable(f"storage {key} is of no tensor")
            order = "<q" if self.little_endian else ">q"
            (numel,) = struct.unpack(order, _read_range(path, position, 8))
            if numel != records[key].numel:
                raise _Unreadable(f"storage {key} has {numel} elements, but its tensors need {records[key].numel}")
            self._starts[key] = position + 8
            position += 8 + numel * records[key].dtype.itemsize
        if position > path.stat().st_size:
            raise _Unreadable(f"it is cut off: its tensors need {position} bytes")

    def read(self, storage: StorageRecord, start: int, length: int) -> bytearray:
        return _read_range(self._path, self._starts[storage.key] + start, length)

    def verify(self, storage: StorageRecord) -> None:
        """There is nothing to compare with."""


def _read_range(path: Path, start: int, length: int) -> bytearray:
    content = bytearray(length)
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(content) != length:
            raise _Unreadable("it is cut off")
    return content


def _require_small_directory(path: Path) -> None:
    """Refuse a zip directory that would fill the memory; its size stands at the end of the file."""
    size = path.stat().st_size
    tail = bytes(_read_range(path, max(0, size - 2**16 - 100), min(size, 2**16 + 100)))
    end = tail.rfind(b"PK\5\6")
    wide = tail.rfind(b"PK\6\6")
    if end < 0 or len(tail) < end + 22:
        raise _Unreadable("it is cut off: the directory of the zip archive at its end is absent")
    sizes = [struct.unpack_from("<L", tail, end + 12)[0]]
    if sizes[0] == 0xFFFFFFFF and 0 <= wide <= len(tail) - 56:
        sizes = [struct.unpack_from("<Q", tail, wide + 40)[0]]
    if sizes[0] > MAX_DIRECTORY_BYTES:
        raise _Unreadable(f"the directory of the zip archive has {sizes[0]} bytes, {MAX_DIRECTORY_BYTES} are allowed")


def _data_starts(path: Path, entries: list[zipfile.ZipInfo]) -> dict[str, int]:
    """Return where the bytes of each entry start, after a check that no two entries share any."""
    starts, previous = {}, ("", 0)
    with path.open("rb") as file:
        for entry in sorted(entries, key=lambda e: e.header_offset):
            file.seek(entry.header_offset)
            header = file.read(30)
            if len(header) < 30 or not header.startswith(b"PK\3\4"):
                raise _Unreadable(f"{entry.filename} in it has no header")
            if entry.flag_bits & 1:
                raise _Unreadable(f"{entry.filename} in it is encrypted")
            name, extra = struct.unpack_from("<HH", header, 26)
            start = entry.header_offset + 30 + name + extra
            if file.read(name) != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437"):
                raise _Unreadable(f"{entry.filename} in it has another name in its header")
            if entry.header_offset < previous[1]:
                raise _Unreadable(f"{previous[0]} and {entry.filename} in it overlap")
            if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
                raise _Unreadable(f"{entry.filename} in it has two sizes")
            starts[entry.filename], previous = start, (entry.filename, start + entry.compress_size)
    if previous[1] > path.stat().st_size:
        raise _Unreadable(f"{previous[0]} in it is cut off")
    return starts


def _end_of_pickle(content: bytes, start: int) -> int:
    stream = io.BytesIO(content)
    stream.seek(start)
    for _ in pickletools.genops(stream):
        pass
    return stream.tell()


def _require_bounded(content: bytes) -> None:
    """Refuse a pickle that would take more memory or C stack than its size, before anything of it is read.

    Raises:
        _Unreadable: it is larger than ``MAX_PICKLE_BYTES``, asks for a buffer or a place in the memo beyond its own
            size, or nests tuples more than ``MAX_TUPLE_DEPTH`` deep.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise _Unreadable(f"its pickle is larger than the {MAX_PICKLE_BYTES} bytes allowed")
    depths: list[int | None] = []  # of the tuples on the stack; None is a mark
    memo: dict[int, int] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4"):
            raise _Unreadable(f"{name} in its pickle is not of torch.save")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else argument
            if not 0 <= place <= len(content):
                raise _Unreadable(f"its pickle asks for {place} places in the memo")
            memo[place] = depths[-1] or 0
            continue
        if name == "MARK":
            depths.append(None)
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            depths.append(memo.get(argument, 0))
            continue
        popped = _pop(depths, opcode)
        if name == "DUP":
            popped = [*popped, *popped]
            depths.extend(popped)
            continue
        nests = name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")
        depth = 1 + max(popped, default=0) if nests else 0
        if depth > MAX_TUPLE_DEPTH:
            raise _Unreadable(f"its pickle nests tuples more than {MAX_TUPLE_DEPTH} deep")
        depths.extend([depth] * len(opcode.stack_after))


def _pop(depths: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Take from the stack what an opcode takes, and return the depths of it."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        popped = list(itertools.takewhile(lambda depth: depth is not None, iter(depths.pop, object())))
        for _ in range(before.index(pickletools.markobject)):
            depths.pop()
    else:
        popped = [depths.pop() for _ in before]
    return [depth or 0 for depth in popped]


def _unpickled(content: bytes, seen: Callable[[StorageRecord], None]) -> Any:
    _require_bounded(content)
    return _Unpickler(content, seen).load()


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, whose every function is one of this module's; ``seen`` is called with each storage."""

    def __init__(self, content: bytes, seen: Callable[[StorageRecord], None]) -> None:
        super().__init__(io.BytesIO(content))
        self._seen = seen

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 writes it
        full = f"{module}.{name}"
        if full in _CALLS:
            return _CALLS[full]
        if module in ("torch", "torch.storage"):
            kind = name.removesuffix("Storage")
            if kind != name and kind in _STORAGES:
                return _STORAGES[kind]
            if isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
        raise _NeedsCode(full[:200])

    def persistent_load(self, pid: Any) -> StorageRecord:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise _Unreadable("it refers to something else than storages")
        _, dtype, key, _, numel = pid[:5]
        if len(pid) == 6 and pid[5] is not None:
            raise _Unreadable("its storages are parts of others, as torch wrote before version 0.4")
        if not isinstance(dtype, torch.dtype) or type(numel) is not int or not 0 <= numel < 2**63:
            raise _Unreadable(f"storage {str(key)[:80]} has no possible size or type")
        storage = StorageRecord(str(key), dtype, numel)
        self._seen(storage)
        return storage


class _Opaque:
    """A value that is no tensor and of no interest; its arguments are dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


class _Table(dict[Any, Any]):
    """An ``OrderedDict``, whose attributes are dropped."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    if not isinstance(storage, StorageRecord) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise _Unreadable("a tensor in it has no storage, size or strides")
    if any(rest[2:]):
        raise _Unreadable(f"a tensor in it is to be read as {str(rest[2])[:80]}, which is not supported")
    return TensorRecord(storage, storage.dtype, offset, size, stride)


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    record = _tensor(storage, offset, size, stride, grad, hooks, *rest)
    if not isinstance(dtype, torch.dtype):
        raise _Unreadable("a tensor in it has no type")
    return TensorRecord(record.storage, dtype, offset, size, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    if function not in (_tensor, _typed_tensor, _parameter):
        raise _NeedsCode("torch._tensor._rebuild_from_type_v2")
    return function(*arguments)


_CALLS: dict[str, Any] = {
    "collections.OrderedDict": _Table,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    # What torch.load(weights_only=True) would call, too, and what is no tensor of a model.
    **dict.fromkeys(
        (
            "builtins.bytearray", "builtins.complex", "builtins.set", "_codecs.encode", "collections.Counter",
            "collections.defaultdict", "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter",
            "torch.nn.parameter.UninitializedParameter", "torch.serialization._get_layout",
            "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_meta_tensor_no_storage",
            "torch._utils._rebuild_qtensor", "torch._utils._rebuild_device_tensor_from_numpy",
            "torch._utils._rebuild_device_tensor_from_cpu_tensor", "torch._utils._rebuild_nested_tensor",
            "torch._utils._rebuild_wrapper_subclass",
        ),
        _Opaque,
    ),
}  # fmt: skip
