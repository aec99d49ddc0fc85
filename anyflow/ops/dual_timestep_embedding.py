"""Fusion of the two timestep embeddings of a flow map, with the activation that follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import accumulation_dtype, check_device, check_same_shape, describe
from anyflow.ops.backend import register, resolve

_OP = "dual_timestep_embedding"
FUSIONS = ("gated", "additive")


def dual_timestep_embedding(
    t_emb: Tensor, r_emb: Tensor, gate: float | Tensor, fusion: str = "gated"
) -> tuple[Tensor, Tensor]:
    """Fuse the embeddings of t and r: ``gated``: ``(1 - g) t + g r``; ``additive``: ``t + g r`` (SPEC A).

    Args:
        t_emb: ``[N, D]`` embedding of the timestep.
        r_emb: ``[N, D]`` embedding of r, or of t - r.
        gate: g, a number or a one-element tensor (never read on the host).
        fusion: ``"gated"`` or ``"additive"``.

    Returns:
        ``(emb, silu(emb))``, both ``[N, D]`` in t_emb's dtype; accumulated in fp32.

    Raises:
        ValueError: shapes differ, or the fusion is unknown.
    """
    if t_emb.ndim != 2 or not t_emb.is_floating_point():
        raise ValueError(f"{_OP}: t_emb must be a floating-point [N, D] tensor, got {describe(t_emb)}")
    check_same_shape(_OP, "r_emb", r_emb, t_emb, "t_emb")
    if fusion not in FUSIONS:
        raise ValueError(f"{_OP}: unknown fusion {fusion!r}; expected one of {', '.join(FUSIONS)}")
    if isinstance(gate, Tensor):
        if gate.numel() != 1:
            raise ValueError(f"{_OP}: gate must be a number or a one-element tensor, got {describe(gate)}")
        check_device(_OP, "gate", gate, t_emb)
    return resolve(_OP)(t_emb, r_emb, gate, fusion)


@register(_OP, "eager")
def dual_timestep_embedding_reference(
    t_emb: Tensor, r_emb: Tensor, gate: float | Tensor, fusion: str
) -> tuple[Tensor, Tensor]:
    """Eager reference; see :func:`dual_timestep_embedding`."""
    acc = accumulation_dtype(t_emb, r_emb)
    t, r = t_emb.to(acc), r_emb.to(acc)
    g = gate.to(acc).reshape(()) if isinstance(gate, Tensor) else torch.tensor(gate, dtype=acc, device=t.device)
    emb = ((1 - g) * t + g * r if fusion == "gated" else t + g * r).to(t_emb.dtype)
    return emb, F.silu(emb.to(acc)).to(t_emb.dtype)
