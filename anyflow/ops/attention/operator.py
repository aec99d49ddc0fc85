"""Define the operator of softmax attention without a mask, in the layout ``[B, L, H, Dh]``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_device,
    check_same_shape,
    check_sizes,
    describe,
)
from anyflow.ops.backend import forced_backend
from anyflow.ops.library import Limit, Operator, has_tangent
from anyflow.ops.native import EXTENSION

_OP = "attention"
_DTYPES = (torch.float32, torch.bfloat16)
_MAX_HEAD_DIM = 256
_GENERIC = EXTENSION is not None and EXTENSION.cpu_instruction_set() == "generic"


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute ``softmax(q k^T / sqrt(Dh)) v`` per sample and head; without keys it is 0.

    The native kernel (CPU) keeps no matrix of scores. Scores must stay below 1e9: above, the
    log-sum-exp that the backward starts from resolves no differences. Gradients have the same bits
    in every call, and for every number of threads. Tensors that the kernel does not take run on
    torch's ``scaled_dot_product_attention``, which rounds the weights of half-precision tensors
    once more. Forcing ``"eager"`` runs the reference, which has derivatives of any order. No Triton
    kernel exists: :func:`anyflow.models.attention.attention` chooses among the kernels of a GPU.

    Args:
        q: ``[B, L, H, Dh]``. Dh: for the kernel, a multiple of 8 up to 256. The last dimension is
            copied if it is not contiguous; the strides of the others are free.
        k: ``[B, S, H, Dh]``, in q's dtype.
        v: ``[B, S, H, Dh]``, in q's dtype.

    Returns:
        ``[B, L, H, Dh]`` in q's dtype, rounded once from an fp32 accumulation (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a forced backend does not support the
            tensors.
        RuntimeError: a second derivative is taken through the kernel, or a forward-mode one through
            a forced one.
    """
    _check(q, k, v)
    if has_tangent(q, k, v) or _operator.forward.choose((q, k, v)) != "eager":
        return _operator(q, k, v)[0]
    if forced_backend() is not None:
        return attention_reference(q, k, v)[0]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`attention` and fp32 ``logsumexp[B, H, L]`` of the scores."""
    acc = accumulation_dtype(q)
    scores = _scores(q, k, acc)
    out = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v.to(acc)).to(q.dtype)
    return out, scores.detach().logsumexp(-1).float()


def attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    With the weights ``P = exp(scores - logsumexp)``, the gradient of the scores is
    ``P (grad v^T - sum(grad * out))``. For fp64 the log-sum-exp, which is fp32, is taken again.
    """
    acc = accumulation_dtype(q)
    scores = _scores(q, k, acc)
    total = logsumexp if acc == torch.float32 else scores.logsumexp(-1)
    weights = (scores - total.unsqueeze(-1)).exp()
    grad, wide_q, wide_k, wide_v = (t.to(acc) for t in (grad, q, k, v))
    mean = (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    slope = (
        weights * (torch.einsum("blhd,bshd->bhls", grad, wide_v) - mean) / math.sqrt(q.shape[-1])
    )
    grad_q = torch.einsum("bhls,bshd->blhd", slope, wide_k)
    grad_k = torch.einsum("bhls,blhd->bshd", slope, wide_q)
    grad_v = torch.einsum("bhls,blhd->bshd", weights, grad)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def unsupported_kind(dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why the native kernel does not take tensors of this kind, or None if it does."""
    if dtype not in _DTYPES:
        return f"{str(dtype).removeprefix('torch.')} (the kernel takes float32 and bfloat16)"
    if head_dim % 8 or not 0 < head_dim <= _MAX_HEAD_DIM:
        return f"Dh={head_dim} (the kernel takes multiples of 8 up to {_MAX_HEAD_DIM})"
    if _GENERIC:
        return "this processor: without AVX2 or AVX-512 torch's attention is faster"
    return None


def _scores(q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.einsum("blhd,bshd->bhls", q.to(dtype) / math.sqrt(q.shape[-1]), k.to(dtype))


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"{_OP}: q must be a floating-point [B, L, H, Dh], got {describe(q)}")
    b, _, h, d = q.shape
    if k.ndim != 4 or k.shape[0] != b or k.shape[2:] != q.shape[2:]:
        raise ValueError(
            f"{_OP}: k must be [B={b}, S, H={h}, Dh={d}] for q {tuple(q.shape)}, got "
            f"{describe(k)}{heads_first(q, k)}"
        )
    check_same_shape(_OP, "v", v, k, "k")
    check_device(_OP, "k", k, q)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"{_OP}: k and v must have the dtype of q, {q.dtype}, got {k.dtype} and {v.dtype}"
        )


def heads_first(q: Tensor, k: Tensor) -> str:
    """Return a hint for an error where shapes look like torch's ``[B, H, L, Dh]``, else nothing."""
    if k.ndim == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]:
        return "; both look like [B, H, L, Dh]: transpose(1, 2) gives [B, L, H, Dh]"
    return ""


def _check_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> None:
    _check(q, k, v)
    for name, tensor in (("grad", grad), ("out", out)):
        check_same_shape(_OP, name, tensor, q, "q")
        if tensor.dtype != q.dtype:
            raise ValueError(
                f"{_OP}: {name} must have the dtype of q, {q.dtype}, got {tensor.dtype}"
            )
    b, length, h, _ = q.shape
    check_sizes(_OP, "logsumexp", logsumexp, (b, h, length), q)
    if logsumexp.dtype != torch.float32:
        raise ValueError(f"{_OP}: logsumexp must be float32, got {logsumexp.dtype}")


def _fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, length, h, _ = q.shape
    return torch.empty_like(q), q.new_empty((b, h, length), dtype=torch.float32)


class _AttentionLimit(Limit):
    """Describe the tensors that the native kernel takes."""

    def problem(self, x: Tensor, operands: Sequence[Tensor | None]) -> str | None:
        """Return what about q the kernel does not take, or None; k and v are like it."""
        return unsupported_kind(x.dtype, x.shape[-1] if x.ndim else 0)


_operator = Operator(
    attention_reference,
    attention_backward_reference,
    check=_check,
    check_backward=_check_backward,
    limit=_AttentionLimit(),
    fake=_fake,
    backends=("native",),
    results=("out", "logsumexp"),
)
