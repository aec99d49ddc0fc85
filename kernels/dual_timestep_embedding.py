"""Fuse two timestep embeddings, and apply SiLU: ``anyflow.ops.dual_timestep_embedding``.

The operator is element-wise over a few hundred thousand numbers at most: one launch replaces five.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from anyflow.kernels.launch import empty, launch
from anyflow.kernels.numerics import cast
from anyflow.kernels.token_sums import finish_sums, partial_sums

# One 16-byte vector of bf16 per thread, in programs that are small enough for 21 frames of D = 1536
# to occupy the GPU.
_OPTIONS = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def fuse(t, r, gate, GATED: tl.constexpr):
    """Return ``(1 - g) t + g r`` or ``t + g r``, in fp32."""
    if GATED:
        t = (1.0 - gate) * t
    return t + gate * r


@triton.jit
def dual_timestep_embedding_forward_kernel(
    t_ptr, r_ptr, gate_ptr, emb_ptr, activated_ptr,
    size,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    gate = tl.load(gate_ptr).to(tl.float32)
    t = tl.load(t_ptr + index, mask=mask).to(tl.float32)
    r = tl.load(r_ptr + index, mask=mask).to(tl.float32)
    emb = cast(fuse(t, r, gate, GATED), emb_ptr.dtype.element_ty)
    tl.store(emb_ptr + index, emb, mask=mask)
    emb = emb.to(tl.float32)  # the activation reads what is returned
    tl.store(
        activated_ptr + index,
        cast(emb * tl.sigmoid(emb), activated_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def dual_timestep_embedding_backward_kernel(
    grad_emb_ptr, grad_activated_ptr, t_ptr, r_ptr, gate_ptr, dt_ptr, dr_ptr, dgate_ptr,
    size,
    GATED: tl.constexpr, GATE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    gate = tl.load(gate_ptr).to(tl.float32)
    t = tl.load(t_ptr + index, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + index, mask=mask, other=0.0).to(tl.float32)
    grad_emb = tl.load(grad_emb_ptr + index, mask=mask, other=0.0).to(tl.float32)
    grad_activated = tl.load(grad_activated_ptr + index, mask=mask, other=0.0).to(tl.float32)
    emb = cast(fuse(t, r, gate, GATED), dt_ptr.dtype.element_ty).to(tl.float32)
    sigmoid = tl.sigmoid(emb)
    grad = grad_emb + grad_activated * sigmoid * (1.0 + emb * (1.0 - sigmoid))
    dt = grad * (1.0 - gate) if GATED else grad
    tl.store(dt_ptr + index, cast(dt, dt_ptr.dtype.element_ty), mask=mask)
    tl.store(dr_ptr + index, cast(grad * gate, dr_ptr.dtype.element_ty), mask=mask)
    if GATE_GRADIENT:
        toward = r - t if GATED else r
        tl.store(dgate_ptr + tl.program_id(0), tl.sum(grad * toward, 0))


def forward(t_emb: Tensor, r_emb: Tensor, gate: Tensor, fusion: str) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the operator."""
    t_emb, r_emb = t_emb.contiguous(), r_emb.contiguous()
    emb, activated = empty(t_emb), empty(t_emb)
    size = t_emb.numel()
    launch(
        dual_timestep_embedding_forward_kernel, (triton.cdiv(size, _OPTIONS["BLOCK"]),),
        t_emb, r_emb, gate, emb, activated, size,
        GATED=fusion == "gated", **_OPTIONS,
    )  # fmt: skip
    return emb, activated


def backward(
    grad_emb: Tensor,
    grad_activated: Tensor,
    t_emb: Tensor,
    r_emb: Tensor,
    gate: Tensor,
    fusion: str,
    gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel; return the gradients of t_emb, r_emb and gate.

    The gradient of the gate is empty unless ``gate_gradient`` asks for it.
    """
    grad_emb, grad_activated = grad_emb.contiguous(), grad_activated.contiguous()
    t_emb, r_emb = t_emb.contiguous(), r_emb.contiguous()
    dt, dr = empty(t_emb), empty(r_emb)
    size = t_emb.numel()
    programs = triton.cdiv(size, _OPTIONS["BLOCK"])
    dgate = partial_sums(t_emb, 1, programs if gate_gradient else 0, 1)
    launch(
        dual_timestep_embedding_backward_kernel, (programs,),
        grad_emb, grad_activated, t_emb, r_emb, gate, dt, dr, dgate, size,
        GATED=fusion == "gated", GATE_GRADIENT=gate_gradient, **_OPTIONS,
    )  # fmt: skip
    return dt, dr, *(finish_sums(dgate, (gate,)) if gate_gradient else (empty(gate, 0),))
