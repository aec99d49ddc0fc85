"""Trace what runs on a device by fake CUDA tensors, and note every wait of the host for it.

The tests are in ``traced_*.py``; ``test_traced.py`` runs them in a process of their own.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import anyflow
from anyflow.ops import use_backend
from anyflow.ops.backend import assume_capability

aten = torch.ops.aten
PACKAGE = Path(anyflow.__file__).parent
SIZES_READ = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
)


@dataclass(frozen=True)
class Call:
    """Hold an operator that ran on the device, and its operands as (shape, stride, dtype)."""

    operator: str
    operands: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    arguments: tuple[Any, ...]
    result: Any


@dataclass(frozen=True)
class Wait:
    """Hold in which operator, and where in anyflow, the host waited for the device."""

    operator: str
    why: str
    where: str


class Device(TorchDispatchMode):
    """Run operators on CUDA tensors as fakes, all others as they are.

    Attributes:
        calls: operators on the device, in order.
        waits: those for which the host waits until the device has done everything before them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.calls: list[Call] = []
        self.waits: list[Wait] = []
        self._pinned: dict[int, Tensor] = {}

    def __enter__(self) -> "Device":
        self._lifted = torch._C._only_lift_cpu_tensors()
        # so that torch.tensor(..., device="cuda") is seen as the copy it is
        torch._C._set_only_lift_cpu_tensors(True)
        self.fakes.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.fakes.__exit__(*exc)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def clear(self) -> None:
        self.calls, self.waits = [], []

    def counts(self, namespace: str = "anyflow") -> Counter[str]:
        """Count how often each operator of a namespace ran."""
        names = (call.operator for call in self.calls)
        return Counter(n.split(".")[1] for n in names if n.startswith(f"{namespace}."))

    def parameters(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Make a module's parameters and buffers fakes on the device, parameters in a dtype."""
        with self.fakes:
            for part in module.modules():
                for table in (part._parameters, part._buffers):
                    for name, old in table.items():
                        if old is None:
                            continue
                        kind = (
                            dtype if dtype is not None and table is part._parameters else old.dtype
                        )
                        new = torch.empty(old.shape, dtype=kind, device="cuda")
                        table[name] = (
                            nn.Parameter(new, old.requires_grad)
                            if isinstance(old, nn.Parameter)
                            else new
                        )
        return module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        leaves = tree_leaves((args, kwargs))
        if func is aten._pin_memory.default or kwargs.get("pin_memory"):  # the driver would
            with unset_fake_temporarily():
                memory = (
                    args[0].clone()
                    if func is aten._pin_memory.default
                    else func(*args, **{**kwargs, "pin_memory": False})
                )
            self._pinned[memory.untyped_storage().data_ptr()] = memory
            return memory
        if not any(_on_device(leaf) for leaf in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        waited, value = self._wait(func, args, kwargs)
        result = value if waited and value is not None else func(*args, **kwargs)
        if not str(func).startswith("prim."):
            operands = ((t.shape, t.stride(), t.dtype) for t in leaves if isinstance(t, Tensor))
            self.calls.append(Call(str(func), tuple(operands), args, result))
        return result

    def _wait(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Note a wait; the host then reads zero."""
        why, value = None, None
        with unset_fake_temporarily():
            if func is aten._local_scalar_dense.default:
                why, value = "reads a number", False if args[0].dtype == torch.bool else 0
            elif func in SIZES_READ:
                why = "reads a size"
            elif func in (aten.index.Tensor, aten.index_put_.default) and any(
                i is not None and i.dtype == torch.bool for i in args[1]
            ):
                why = "reads the size of a mask"
            elif func in (aten._to_copy.default, aten.copy_.default):
                source = args[0] if func is aten._to_copy.default else args[1]
                target = kwargs.get("device") if func is aten._to_copy.default else args[0].device
                queued = kwargs.get("non_blocking", False) or (
                    func is aten.copy_.default and args[2:] == (True,)
                )
                if target is not None and target.type != source.device.type:
                    if target.type == "cpu":
                        why, value = (
                            "reads a tensor",
                            torch.zeros(source.shape, dtype=kwargs.get("dtype")),
                        )
                    elif not queued or source.untyped_storage().data_ptr() not in self._pinned:
                        why = "copies from pageable memory"
        if why is not None:
            frames = [
                frame
                for frame in traceback.extract_stack()
                if Path(frame.filename).is_relative_to(PACKAGE)
            ]
            where = (
                f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].name}"
                if frames
                else "the test"
            )
            self.waits.append(Wait(str(func), why, where))
        return why is not None, value


def _on_device(leaf: Any) -> bool:
    if isinstance(leaf, torch.device):
        return leaf.type == "cuda"
    return isinstance(leaf, FakeTensor) and leaf.device.type == "cuda"


@pytest.fixture(autouse=True)
def _as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choose as on a GPU of compute capability 9.0.

    Autocast is included, which turns itself off without a device.
    """
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with use_backend(None), assume_capability(9, 0):
        yield


@pytest.fixture
def device() -> Iterator[Device]:
    """Return an active device; a test clears it before the part that it asks about."""
    with Device() as active:
        yield active
