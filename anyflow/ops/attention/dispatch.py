"""Run scaled dot-product attention in the layout ``[B, L, H, Dh]`` on the chosen backend."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from anyflow.ops.attention.backends import BACKENDS, missing, sdpa
from anyflow.ops.attention.choice import select
from anyflow.ops.attention.operator import heads_first
from anyflow.ops.backend import forced_backend
from anyflow.ops.library import has_tangent
from anyflow.ops.setting import ATTENTION_BACKEND, Use


class use_attention_backend(Use):
    """Force attention onto one backend, as a setter or as a context manager.

    ``use_attention_backend("math")`` takes effect at once; used as
    ``with use_attention_backend("math"): ...`` it ends with the block.
    ``use_attention_backend(None)`` returns to the automatic choice. Either holds in the context
    that it is called in, as :class:`anyflow.ops.use_backend`. The model's gradient checkpointing
    runs attention again as the forward pass has; with a checkpoint of the user's own, the block
    must hold the backward pass too.

    Raises:
        ValueError: the name is not one of ``anyflow.models.attention.ATTENTION_BACKENDS``.
    """

    setting = ATTENTION_BACKEND

    def __init__(self, name: str | None) -> None:
        super().__init__(name)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, attention_backend: str | None = None
) -> Tensor:
    """Compute softmax attention without a mask: ``softmax(query key^T / sqrt(Dh)) value``.

    A backend is forced by, nearest first: ``attention_backend``, :class:`use_attention_backend`,
    the environment variable ``ANYFLOW_ATTENTION``.

    Otherwise, on a CUDA device, the first backend runs that takes the tensors, in the order of
    :func:`anyflow.models.attention.preference`, among those that
    ``torch.nn.attention.sdpa_kernel`` leaves enabled. ``"flash"`` comes first where the user has
    activated FlashAttention-3 or 4 in torch in place of its own kernel. On a CPU ``"native"`` runs
    unless ``anyflow.ops.use_backend`` or ``ANYFLOW_BACKEND`` names another backend. Where neither
    applies, and on other devices, torch chooses.

    Under ``torch.compile`` the environment variable and the ``sdpa_kernel`` in force are those of
    the compilation.

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
    # torch.compile(dynamic=True) has a symbol there; the choice needs a plain int
    head_dim = operator.index(query.shape[3])
    keys = 1 if key.shape[1] == 1 else 8  # cuDNN refuses one key; other lengths make no difference
    kind = query.device, query.dtype, head_dim, grad, keys
    name, exact = select(forced, by, *kind, torch.compiler.is_compiling(), forced_backend())

    if query.numel() == 0 or key.numel() == 0:
        name, exact = "math", True  # nothing to compute, and the kernels refuse empty tensors
    # the kernels need a contiguous last dimension
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if name == "native" and forced is not None and has_tangent(query, key, value):
        problem = "it has no forward-mode derivative: use_attention_backend('math')"
        raise RuntimeError(f"attention: backend {forced!r} ({by}) is not available: {problem}")
    if not exact:  # torch's process-wide switches stay untouched
        return sdpa(query, key, value)
    return BACKENDS[name].run(query, key, value)


def require_backend(name: str, devices: tuple[torch.device, ...]) -> None:
    """Raise a RuntimeError that says why, if a backend runs on none of the devices."""
    problems = [missing(name, device) for device in devices]
    if all(problem is not None for problem in problems):
        raise RuntimeError(f"attention backend {name!r} is not available: {problems[-1]}")


def _forced_backend(argument: str | None) -> tuple[str | None, str]:
    """Return the forced backend and who forces it, or None and nothing."""
    if argument is not None:
        name = ATTENTION_BACKEND.checked(argument, "attention_backend: ")
        return name, "forced by attention_backend="
    forced = ATTENTION_BACKEND.forced()
    return (None, "") if forced is None else forced


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for torch's own attention, since the packages know nothing of it."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch raises for meta
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
