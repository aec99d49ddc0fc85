"""Choose which implementation of an operator runs, and explain the choice in a report."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anyflow.ops.native import missing_kernel
from anyflow.ops.setting import ASSUMED_CAPABILITY, OPERATOR_BACKEND, Use
from anyflow.utils.devices import default_device

BACKENDS = OPERATOR_BACKEND.names
# operator -> the backends that have a kernel for it; filled by anyflow.ops.library
OPERATORS: dict[str, tuple[str, ...]] = {}
# operators whose native kernel is not the faster one on this processor, and why
LEFT_TO_TORCH: dict[str, str] = {}

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton compiles a launcher for each kernel on first use, with the first of these that it finds.
_HAS_COMPILER = "CC" in os.environ or any(shutil.which(name) for name in ("gcc", "clang"))
# bf16 arithmetic; the kernels are compiled and checked for sm_80, sm_90 and sm_100
_MIN_CAPABILITY = (8, 0)

# Where nothing forces another one. Triton kernels on a CPU are interpreted, which is for tests;
# native CUDA kernels are not the choice until a GPU has shown them to be faster than Triton's.
_AUTOMATIC = {"cpu": "native", "cuda": "triton"}

_MAX_FALLBACKS = 16  # reasons kept per operator: they name shapes, of which a long run may see many

_fallbacks: dict[str, tuple[str, ...]] = {}  # operator -> reasons, in order of appearance
_warned: set[tuple[str, str]] = set()  # operators and forced backends that have no kernel for them


class use_backend(Use):
    """Force every operator onto one backend, as a setter or as a context manager.

    ``use_backend("eager")`` takes effect at once; used as ``with use_backend("eager"): ...`` it
    ends with the block. ``use_backend(None)`` returns to the automatic choice. Either holds in the
    context that it is called in (a thread, an asyncio task) and in copies of that context; other
    threads are left alone, and the variable ``ANYFLOW_BACKEND`` is for all of them. A backward pass
    runs, in whatever thread, on what its forward pass was forced onto.

    A call that the forced backend cannot run (another device, a dtype or a width that its kernel
    does not take) is an error. An operator that has no kernel of the backend on any device stays
    with the eager reference, so that a model runs as a whole: ``attention``, ``gelu`` and
    ``linear`` have no Triton kernel. The first such call warns, and :func:`backend_report` says so.
    The backward of a native CUDA kernel is Triton's.

    Raises:
        ValueError: the name is not one of ``"eager"``, ``"triton"``, ``"native"``.
    """

    setting = OPERATOR_BACKEND

    def __init__(self, name: str | None) -> None:
        super().__init__(name)


class assume_capability:
    """Choose as on a CUDA device of a compute capability such as ``(9, 0)`` in a ``with`` block.

    Fake CUDA tensors (``torch.compile``, ``torch.export``, ``FakeTensorMode``) are traced on
    machines without a GPU too. Nothing can run there, and so nothing is chosen, unless the device
    that will run it is named.
    """

    def __init__(self, major: int, minor: int) -> None:
        self.capability = (major, minor)
        self._blocks: list[Any] = []

    def __enter__(self) -> assume_capability:
        self._blocks.append(ASSUMED_CAPABILITY.enter(self.capability))
        return self

    def __exit__(self, *exc: object) -> None:
        ASSUMED_CAPABILITY.leave(self._blocks)


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the assumed compute capability, or that of a CUDA device; None without a device."""
    assumed: tuple[int, int] | None = ASSUMED_CAPABILITY.get()
    if assumed is not None:
        return assumed
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


@dataclass(frozen=True)
class BackendChoice:
    """Describe the backend of an operator, and the calls that ran on the reference instead.

    Attributes:
        backend: ``"eager"``, ``"triton"``, ``"native"``, or ``"unavailable"`` when a forced one
            cannot run.
        reason: why, in one phrase.
        fallbacks: why calls that the backend does not support ran eagerly; one phrase per reason.
    """

    backend: str
    reason: str
    fallbacks: tuple[str, ...] = ()


def forced_backend() -> tuple[str, str] | None:
    """Return the forced backend and who forces it, or None for the automatic choice."""
    return OPERATOR_BACKEND.forced()


def choose(
    op: str,
    device: torch.device,
    unsupported: Callable[..., str | None],
    args: Sequence[Any],
    direction: str = "forward",
) -> str:
    """Return the backend that runs a call of ``op``.

    Args:
        op: name of the operator.
        device: where its tensors are.
        unsupported: returns what about the arguments the kernels do not support, or None; called
            only if that matters.
        args: the arguments.
        direction: ``"forward"`` or ``"backward"``. Native CUDA kernels are forward only: Triton's
            run backward.

    Raises:
        RuntimeError: a forced backend does not exist here.
        ValueError: a forced backend does not support these arguments.
    """
    forced = forced_backend()
    if forced is None:
        name = _AUTOMATIC.get(device.type, "triton")
        if missing(name, device, op, direction) is not None or (
            name == "native" and op in LEFT_TO_TORCH
        ):
            return "eager"
        problem = unsupported(*args)
        if problem is None:
            return name
        if not torch.compiler.is_compiling():
            seen = _fallbacks.get(op, ())
            if problem not in seen and len(seen) < _MAX_FALLBACKS:
                _fallbacks[op] = (*seen, problem)  # replaced whole: another thread may be reading
        return "eager"
    name, by = forced
    if name == "eager":
        return name
    if name not in OPERATORS[op]:
        if not torch.compiler.is_compiling():
            _warn_once(op, name, by)
        return "eager"  # as use_backend() says: a model runs as a whole
    if name == "native" and direction == "backward" and device.type == "cuda":
        name = "triton"
    reason = missing(name, device, op, direction)
    if reason is not None:
        raise RuntimeError(
            f"anyflow.ops.{op}: backend {name!r} ({by}) is not available: {reason}; use 'eager'"
        )
    problem = unsupported(*args)
    if problem is not None:
        raise ValueError(f"{op}: backend {name!r} ({by}) does not support {problem}")
    return name


def _warn_once(op: str, name: str, by: str) -> None:
    if (op, name) not in _warned:
        _warned.add((op, name))
        warnings.warn(
            f"anyflow.ops.{op}: backend {name!r} ({by}) has no kernel of this operator on any "
            "device; the eager reference runs",
            stacklevel=2,
        )


def missing(backend: str, device: torch.device, op: str, direction: str = "forward") -> str | None:
    """Return why a backend cannot run an operator on a device, or None if it can."""
    if backend == "eager":
        return None
    if backend not in OPERATORS[op]:
        return f"{op} has no {backend.capitalize()} kernel: the eager reference runs"
    if backend == "native":
        return missing_kernel(op if direction == "forward" else f"{op}_backward", device)
    return _missing_triton(device)


def _missing_triton(device: torch.device) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda":
        if not _HAS_COMPILER:
            return (
                "Triton needs a C compiler to launch kernels: install gcc or clang, or name one in "
                "the variable CC"
            )
        capability = cuda_capability(device)
        if capability is None:
            return "torch finds no CUDA device"
        if torch.version.hip is None and capability < _MIN_CAPABILITY:
            return (
                f"the GPU has compute capability {capability}, the Triton kernels need "
                f"{_MIN_CAPABILITY}"
            )
        return None
    if device.type in ("cpu", "meta") and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        "Triton kernels run on CUDA devices, or on the CPU with TRITON_INTERPRET=1, not on "
        f"{device.type}"
    )


def backend_report(device: torch.device | str | None = None) -> dict[str, BackendChoice]:
    """Report for every operator which backend runs on ``device``, why, and the fallbacks so far.

    Args:
        device: None means CUDA where torch finds a CUDA device, else the CPU.

    Returns:
        Operator name to :class:`BackendChoice`. A forced backend that cannot run reads
        ``unavailable``; an operator that it has no kernel for on any device, ``eager``.
    """
    device = default_device() if device is None else torch.device(device)
    forced = forced_backend()
    report = {}
    for op in sorted(OPERATORS):
        fallbacks = _fallbacks.get(op, ())
        if forced is None:
            report[op] = BackendChoice(*_automatic(op, device), fallbacks)
            continue
        name, by = forced
        reason = missing(name, device, op)
        if reason is None:
            report[op] = BackendChoice(name, by)
        else:
            report[op] = BackendChoice(
                "unavailable" if name in OPERATORS[op] else "eager", f"{by}: {reason}"
            )
    return report


def _automatic(op: str, device: torch.device) -> tuple[str, str]:
    name = _AUTOMATIC.get(device.type, "triton")
    reason = missing(name, device, op)
    if reason is None and name == "native":
        reason = LEFT_TO_TORCH.get(op)
    if reason is not None:
        return "eager", reason
    return name, "fused kernel; what it does not support runs on the eager reference"
