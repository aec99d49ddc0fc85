"""Scaled dot-product attention in the model's ``[B, L, H, Dh]`` layout, on the best backend for the
device.
"""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from anyflow.models.attention_backends import (
    ATTENTION_BACKENDS,
    KERNELS,
    PACKAGES,
    Call,
    allowed,
    automatic,
    deterministic,
    enabled,
    flash_implementation,
    missing_backend,
    packaged,
    sdpa,
    torch_choice,
    unavailable,
    unsupported,
)
from anyflow.ops.attention import attention as native_attention
from anyflow.ops.attention import heads_first
from anyflow.ops.backend import forced_backend
from anyflow.ops.library import has_tangent
from anyflow.ops.setting import ATTENTION_BACKEND, Use
from anyflow.utils.devices import default_device


@dataclass(frozen=True)
class AttentionChoice:
    """One row of :func:`attention_report`.

    Attributes:
        name: the backend.
        available: whether it runs here for the tensors asked about.
        chosen: whether :func:`attention` runs it for them.
        reason: why, or why not, in one phrase.
    """

    name: str
    available: bool
    chosen: bool
    reason: str


class use_attention_backend(Use):
    """Force attention onto one backend, as a setter or as a context manager.

    ``use_attention_backend("math")`` takes effect at once; used as
    ``with use_attention_backend("math"): ...`` it ends with the block.
    ``use_attention_backend(None)`` returns to the automatic choice. Either holds in the context
    that it is called in, as :class:`anyflow.ops.use_backend`. The model's gradient checkpointing
    runs attention again as the forward pass has; with a checkpoint of the user's own, the block
    must hold the backward pass too.

    Raises:
        ValueError: the name is not one of :data:`ATTENTION_BACKENDS`.
    """

    setting = ATTENTION_BACKEND

    def __init__(self, name: str | None) -> None:
        super().__init__(None if name is None else validated_backend(name))


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, attention_backend: str | None = None
) -> Tensor:
    """Softmax attention without mask: ``softmax(query key^T / sqrt(Dh)) value``.

    A backend is forced by, nearest first: ``attention_backend``, :class:`use_attention_backend`,
    the environment variable ``ANYFLOW_ATTENTION``. Otherwise the fastest one that supports the
    tensors runs (``"flash"`` where the user has activated FlashAttention-3 or 4 in torch in place
    of its own kernel), among those that ``torch.nn.attention.sdpa_kernel`` leaves enabled: on a CPU
    ``"native"``, unless ``anyflow.ops.use_backend`` or ``ANYFLOW_BACKEND`` names another backend
    than that; else, and on other devices than CPU and CUDA, torch chooses. Under ``torch.compile``
    the environment variable and the ``sdpa_kernel`` in force are those of the compilation.

    Args:
        query: ``[B, L, H, Dh]``.
        key: ``[B, S, H, Dh]``, in query's dtype (any under autocast).
        value: ``[B, S, H, Dh]``, likewise.
        attention_backend: ``"flash_attn_3"``, ``"flash_attn_2"`` (those two packages), ``"native"``
            (:func:`anyflow.ops.attention`), ``"cudnn"``, ``"flash"``, ``"efficient"``, ``"math"``
            (torch's kernels), or None.

    Returns:
        ``[B, L, H * Dh]`` in query's dtype, or in autocast's where it is enabled.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the name of a backend is unknown; or a
            forced backend does not support these tensors.
        RuntimeError: a forced backend is not installed, or does not run on this device.
    """
    query, key, value = _autocast(query, key, value)
    _check(query, key, value)
    forced, by = _forced_backend(attention_backend)
    if forced is None and query.device.type not in ("cpu", "cuda"):
        return sdpa(query, key, value)
    grad = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )
    # a plain int under torch.compile(dynamic=True) as well
    head_dim = operator.index(query.shape[3])
    keys = 1 if key.shape[1] == 1 else 8  # all that a choice depends on
    kind = query.device, query.dtype, head_dim, grad, keys
    name, exact = _select(forced, by, *kind, torch.compiler.is_compiling(), forced_backend())

    if query.numel() == 0 or key.numel() == 0:
        name, exact = "math", True  # nothing to compute, and the kernels refuse empty tensors
    # kernels need it
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if name == "native":
        if forced is not None and has_tangent(query, key, value):
            problem = "it has no forward-mode derivative: use_attention_backend('math')"
            raise RuntimeError(f"attention: backend {forced!r} ({by}) is not available: {problem}")
        return native_attention(query, key, value).flatten(2)
    if name in PACKAGES:
        return packaged(name, query, key, value).flatten(2)
    if not exact:  # torch would choose the same: its process-wide switches stay untouched
        return sdpa(query, key, value)
    with sdpa_kernel(KERNELS[name]):
        return sdpa(query, key, value)


def attention_report(
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    requires_grad: bool = False,
) -> dict[str, AttentionChoice]:
    """For every backend, whether it runs on ``device`` for such tensors, whether it is the one
    chosen, and why.

    Args:
        device: None means CUDA where there is a CUDA device, else the CPU.
        dtype: of query, key and value.
        head_dim: Dh.
        requires_grad: whether a gradient is needed.

    Returns:
        Backend name to :class:`AttentionChoice`. None is chosen where a forced backend cannot run.
    """
    device = default_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    switches = deterministic(), enabled(), flash_implementation()
    call = Call(device, dtype, head_dim, requires_grad, 8, False, forced_backend(), *switches)
    forced, by = _forced_backend(None)
    chosen = forced if forced is not None else automatic(call)
    report = {}
    for name in ATTENTION_BACKENDS:
        problem = unavailable(name, call) or unsupported(name, call)
        available, is_chosen = problem is None, name == chosen and problem is None
        if name == forced:
            reason = by if problem is None else f"{by}: {problem}"
        elif problem is not None:
            reason = problem
        elif is_chosen:
            ours = device.type == "cuda" or name == "native"
            reason = (
                "first choice that takes the tensors" if ours else "torch's own choice off CUDA"
            )
        elif forced is not None:
            reason = f"{forced} is {by}"
        elif not allowed(name, call.enabled):
            reason = "disabled by sdpa_kernel or torch.backends.cuda"
        else:
            reason = f"{chosen} is preferred"
        if name == "flash" and device.type == "cuda" and call.flash is not None:
            reason += f" (the kernel is {call.flash}'s, activated in torch.nn.attention)"
        report[name] = AttentionChoice(name, available, is_chosen, reason)
    return report


def validated_backend(name: str, prefix: str = "") -> str:
    """The name itself; a ValueError that lists the names if it is none of them."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(
            f"{prefix}unknown attention backend {name!r}; expected one of "
            f"{', '.join(ATTENTION_BACKENDS)}"
        )
    return name


def require_backend(name: str, devices: tuple[torch.device, ...]) -> None:
    """A RuntimeError that says why, if the backend runs on none of the devices."""
    problems = [missing_backend(name, device) for device in devices]
    if all(problem is not None for problem in problems):
        raise RuntimeError(f"attention backend {name!r} is not available: {problems[-1]}")


def _forced_backend(argument: str | None) -> tuple[str | None, str]:
    if argument is not None:
        return validated_backend(argument, "attention_backend: "), "forced by attention_backend="
    forced = ATTENTION_BACKEND.get()
    if forced is not None:
        return forced, "forced by use_attention_backend()"
    name = os.environ.get("ANYFLOW_ATTENTION")
    if name:
        return validated_backend(name, "ANYFLOW_ATTENTION: "), "forced by ANYFLOW_ATTENTION"
    return None, ""


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does for torch's own attention; the packages know nothing of it."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta is an error there
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor, length in (("query", query, "L"), ("key", key, "S"), ("value", value, "S")):
        if tensor.ndim != 4:
            raise ValueError(
                f"attention: {name} must be [B, {length}, H, Dh], got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"attention: {name} must be of a floating-point dtype, got {tensor.dtype}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"attention: {name} is {tensor.dtype} on {tensor.device}, query is {query.dtype} "
                f"on {query.device}"
            )
    b, _, h, d = query.shape
    if key.shape[0] != b or key.shape[2] != h or key.shape[3] != d:
        raise ValueError(
            f"attention: key must be [B={b}, S, H={h}, Dh={d}] to fit query, "
            f"got {tuple(key.shape)}{heads_first(query, key)}"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"attention: value {tuple(value.shape)} must have the shape of key {tuple(key.shape)}"
        )


@torch.compiler.assume_constant_result  # evaluated, not traced: it reads switches and runs probes
def _select(forced: str | None, by: str, *tensors: Any) -> tuple[str, bool]:
    """The backend of a call, and whether torch must be told to run exactly that one."""
    call = Call._make((*tensors, deterministic(), enabled(), flash_implementation()))
    if forced is None:
        name = automatic(call)
        return name, name in KERNELS and torch_choice(call) != name
    problem = unavailable(forced, call)
    if problem is not None:
        raise RuntimeError(f"attention: backend {forced!r} ({by}) is not available: {problem}")
    problem = unsupported(forced, call)
    if problem is not None:
        raise ValueError(f"attention: backend {forced!r} ({by}) does not support {problem}")
    return forced, True
