"""Fuse the two timestep embeddings of a flow map, and activate the sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_device,
    check_same_shape,
    describe,
)
from anyflow.ops.library import ELEMENTS, Operator

_OP = "dual_timestep_embedding"
FUSIONS = ("gated", "additive")


def dual_timestep_embedding(
    t_emb: Tensor, r_emb: Tensor, gate: float | Tensor, fusion: str = "gated"
) -> tuple[Tensor, Tensor]:
    """Fuse the embeddings of t and r: gated, ``(1 - g) t + g r``, or additive, ``t + g r``.

    Args:
        t_emb: ``[N, D]`` embedding of the timestep, any N and D; the kernel copies what is not
            contiguous.
        r_emb: ``[N, D]`` embedding of r, or of t - r; any floating dtype.
        gate: g, a number or a one-element floating-point tensor (never read on the host).
        fusion: ``"gated"`` or ``"additive"``.

    Returns:
        ``(emb, silu(emb))``, both ``[N, D]`` in t_emb's dtype; accumulated in fp32. The activation
        is that of ``emb`` as it is returned, after rounding.

    Raises:
        ValueError: shapes or devices differ, the fusion is unknown, or a forced backend does not
            support dtypes.
    """
    if not isinstance(gate, Tensor):
        gate = torch.full((), gate, dtype=accumulation_dtype(t_emb, r_emb), device=t_emb.device)
    _check(t_emb, r_emb, gate, fusion)
    return _operator(t_emb, r_emb, gate, fusion)


def dual_timestep_embedding_reference(
    t_emb: Tensor, r_emb: Tensor, gate: Tensor, fusion: str
) -> tuple[Tensor, Tensor]:
    """Compute :func:`dual_timestep_embedding` eagerly."""
    emb = _fuse(t_emb, r_emb, gate, fusion)
    return emb, F.silu(emb.to(accumulation_dtype(t_emb, r_emb))).to(t_emb.dtype)


def dual_timestep_embedding_backward_reference(
    grad_emb: Tensor,
    grad_activated: Tensor,
    t_emb: Tensor,
    r_emb: Tensor,
    gate: Tensor,
    fusion: str,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of t_emb, r_emb and gate; that of gate is empty unless asked for.

    The gate of the model is a constant, and its gradient costs a reduction over all elements.
    """
    acc = accumulation_dtype(t_emb, r_emb)
    t, r, g = t_emb.to(acc), r_emb.to(acc), gate.to(acc).reshape(())
    emb = _fuse(t_emb, r_emb, gate, fusion).to(acc)
    sigmoid = emb.sigmoid()
    grad = grad_emb.to(acc) + grad_activated.to(acc) * sigmoid * (1 + emb * (1 - sigmoid))
    dt = grad * (1 - g) if fusion == "gated" else grad
    if gate_gradient:
        dgate = (
            (grad * (r - t if fusion == "gated" else r)).sum().to(gate.dtype).reshape(gate.shape)
        )
    else:
        dgate = gate.new_empty(0)
    return dt.to(t_emb.dtype), (grad * g).to(r_emb.dtype), dgate


def _fuse(t_emb: Tensor, r_emb: Tensor, gate: Tensor, fusion: str) -> Tensor:
    acc = accumulation_dtype(t_emb, r_emb)
    t, r, g = t_emb.to(acc), r_emb.to(acc), gate.to(acc).reshape(())
    return ((1 - g) * t + g * r if fusion == "gated" else t + g * r).to(t_emb.dtype)


def _check(t_emb: Tensor, r_emb: Tensor, gate: Tensor, fusion: str) -> None:
    if t_emb.ndim != 2 or not t_emb.is_floating_point():
        raise ValueError(
            f"{_OP}: t_emb must be a floating-point [N, D] tensor, got {describe(t_emb)}"
        )
    check_same_shape(_OP, "r_emb", r_emb, t_emb, "t_emb")
    if fusion not in FUSIONS:
        raise ValueError(f"{_OP}: unknown fusion {fusion!r}; expected one of {', '.join(FUSIONS)}")
    if gate.numel() != 1 or not gate.is_floating_point():
        raise ValueError(
            f"{_OP}: gate must be a number or a one-element floating-point tensor, got "
            f"{describe(gate)}"
        )
    check_device(_OP, "gate", gate, t_emb)


def _check_backward(grad_emb: Tensor, grad_activated: Tensor, t_emb: Tensor, *others: Any) -> None:
    _check(t_emb, *others[:3])
    check_same_shape(_OP, "grad_emb", grad_emb, t_emb, "t_emb")
    check_same_shape(_OP, "grad_activated", grad_activated, t_emb, "t_emb")


_operator = Operator(
    dual_timestep_embedding_reference,
    dual_timestep_embedding_backward_reference,
    check=_check,
    check_backward=_check_backward,
    limit=ELEMENTS,
)
