"""Read pickles of ``torch.save`` as records of tensors, without executing anything in them."""

from __future__ import annotations

import io
import itertools
import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MAX_PICKLE_BYTES = 16 * 2**20  # 100,000 tensors
MAX_TUPLE_DEPTH = 32  # hashing a nested tuple takes C stack
_MAX_AXES = 64

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


class Unreadable(Exception):
    """Report why a file cannot be read, without the name of the file."""


class NeedsCode(Exception):
    """Report the name of the function that a file would call."""


@dataclass(frozen=True, eq=False)
class StorageRecord:
    """Describe the bytes that tensors share: name of the entry, type, number of elements."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """Describe a tensor of a file; ``offset`` and ``stride`` count elements of the storage."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Return the number of elements of the storage from the first one to the last one."""
        return (
            1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
            if self.numel
            else 0
        )

    def problem(self) -> str | None:
        """Say why such a tensor cannot be; None for a dense one inside its storage."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or len(self.shape) > _MAX_AXES:
            return f"a tensor of {len(self.shape)} axes with {len(self.stride)} strides"
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            return (
                f"a tensor of {list(self.shape)} with strides {list(self.stride)} from "
                f"{self.offset}"
            )
        available = self.storage.numel * self.storage.dtype.itemsize // self.dtype.itemsize
        if self.numel > available:
            return (
                f"a tensor of {self.shape} that is not dense: its storage has {available} elements"
            )
        if self.offset + self.span > available:
            return (
                f"a tensor of {self.shape} that ends behind the {available} elements of its storage"
            )
        return None


def end_of_pickle(content: bytes, start: int) -> int:
    """Return the position behind the pickle that begins at ``start``."""
    stream = io.BytesIO(content)
    stream.seek(start)
    for _ in pickletools.genops(stream):
        pass
    return stream.tell()


def _require_bounded(content: bytes) -> None:
    """Refuse a pickle that would take more memory or C stack than its size, before it is read.

    Raises:
        Unreadable: it is larger than ``MAX_PICKLE_BYTES``, asks for a buffer or a place in the memo
            beyond its own size, or nests tuples more than ``MAX_TUPLE_DEPTH`` deep.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise Unreadable(f"its pickle is larger than the {MAX_PICKLE_BYTES} bytes allowed")
    depths: list[int | None] = []  # of the tuples on the stack; None is a mark
    memo: dict[int, int] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4"):
            raise Unreadable(f"{name} in its pickle is not of torch.save")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else argument
            if not 0 <= place <= len(content):
                raise Unreadable(f"its pickle asks for {place} places in the memo")
            on_top = depths[-1]
            memo[place] = 0 if on_top is None else on_top
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
            raise Unreadable(f"its pickle nests tuples more than {MAX_TUPLE_DEPTH} deep")
        depths.extend([depth] * len(opcode.stack_after))


def _pop(depths: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Take from the stack what an opcode takes, and return the depths of it."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        popped = list(
            itertools.takewhile(lambda depth: depth is not None, iter(depths.pop, object()))
        )
        for _ in range(before.index(pickletools.markobject)):
            depths.pop()
    else:
        popped = [depths.pop() for _ in before]
    return [0 if depth is None else depth for depth in popped]


def unpickled(content: bytes, seen: Callable[[StorageRecord], None]) -> Any:
    """Read the object in a pickle of ``torch.save``, with tensors as :class:`TensorRecord`.

    Args:
        content: the pickle.
        seen: called with each storage that a tensor names.

    Raises:
        Unreadable: the pickle is too large, or describes something that cannot be.
        NeedsCode: the pickle calls a function that is none of torch's for tensors.
    """
    _require_bounded(content)
    return _Unpickler(content, seen).load()


class _Unpickler(pickle.Unpickler):
    """Unpickle with functions of this module alone; ``seen`` is called with each storage."""

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
        raise NeedsCode(full[:200])

    def persistent_load(self, pid: Any) -> StorageRecord:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise Unreadable("it refers to something else than storages")
        _, dtype, key, _, numel = pid[:5]
        if len(pid) == 6 and pid[5] is not None:
            raise Unreadable("its storages are parts of others, as torch wrote before version 0.4")
        if not isinstance(dtype, torch.dtype) or type(numel) is not int or not 0 <= numel < 2**63:
            raise Unreadable(f"storage {str(key)[:80]} has no possible size or type")
        storage = StorageRecord(str(key), dtype, numel)
        self._seen(storage)
        return storage


class _Opaque:
    """Stand for a value that is no tensor; its arguments are dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


class _Table(dict[Any, Any]):
    """Stand for an ``OrderedDict``, whose attributes are dropped."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    if (
        not isinstance(storage, StorageRecord)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
    ):
        raise Unreadable("a tensor in it has no storage, size or strides")
    if any(rest[2:]):
        raise Unreadable(
            f"a tensor in it is to be read as {str(rest[2])[:80]}, which is not supported"
        )
    return TensorRecord(storage, storage.dtype, offset, size, stride)


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    record = _tensor(storage, offset, size, stride, grad, hooks, *rest)
    if not isinstance(dtype, torch.dtype):
        raise Unreadable("a tensor in it has no type")
    return TensorRecord(record.storage, dtype, offset, size, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    if function not in (_tensor, _typed_tensor, _parameter):
        raise NeedsCode("torch._tensor._rebuild_from_type_v2")
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
            "builtins.bytearray", "builtins.complex", "builtins.set", "_codecs.encode",
            "collections.Counter",
            "collections.defaultdict", "torch.Size", "torch.Tensor", "torch.device",
            "torch.nn.parameter.Parameter",
            "torch.nn.parameter.UninitializedParameter", "torch.serialization._get_layout",
            "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_meta_tensor_no_storage",
            "torch._utils._rebuild_qtensor", "torch._utils._rebuild_device_tensor_from_numpy",
            "torch._utils._rebuild_device_tensor_from_cpu_tensor",
            "torch._utils._rebuild_nested_tensor",
            "torch._utils._rebuild_wrapper_subclass",
        ),
        _Opaque,
    ),
}  # fmt: skip
