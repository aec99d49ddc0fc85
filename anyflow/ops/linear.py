"""A linear layer, by the faster of the libraries that torch brings for it on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import check_device, describe, unsupported_dtype
from anyflow.ops.backend import forced_backend
from anyflow.ops.library import Operator, empty_like
from anyflow.ops.native import EXTENSION

_OP = "linear"
_WORTH_IT = 2**22  # multiplications; as in csrc/cpu/linear.cpp


def _onednn_is_faster() -> bool:
    """Whether torch's own choice for fp32 on this processor, MKL, is the slower one: MKL is held at AVX2 on any
    processor that is not Intel's."""
    if EXTENSION is None or not torch.backends.mkldnn.is_available():
        return False
    return not EXTENSION.cpu_is_intel() and EXTENSION.cpu_instruction_set() != "generic"


_ONEDNN_IS_FASTER = _onednn_is_faster()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, as ``torch.nn.functional.linear``.

    The native kernel (CPU) is oneDNN's where torch would take MKL for less: large fp32 products, on a processor that is
    not Intel's. With AVX-512 that is about twice as fast, with AVX2 about a tenth. Everything else is
    ``F.linear`` itself, derivatives of any order and autocast included; there is no Triton kernel. Forcing
    ``"native"`` takes the kernel for every size.

    Args:
        x: ``[..., K]``, any floating dtype.
        weight: ``[N, K]``, in x's dtype.
        bias: ``[N]``, in x's dtype, or None.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a forced backend does not support the dtype.
        RuntimeError: a second derivative is taken through the kernel, or a forward-mode one through a forced one.
    """
    if not _takes_operator(x, weight):
        return F.linear(x, weight, bias)
    _check(x, weight, bias)
    return _operator(x, weight, bias)


def _takes_operator(x: Tensor, weight: Tensor) -> bool:
    """Whether the call goes through the operator: where its kernel is faster, or where it is forced."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    forced = forced_backend()
    if forced is not None:
        return forced[0] == "native"
    if not (_ONEDNN_IS_FASTER and x.is_cpu and x.dtype == weight.dtype == torch.float32):
        return False
    return x.numel() * weight.shape[0] >= _WORTH_IT


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"{_OP}: x must be a floating-point [..., K] tensor, got {describe(x)}")
    k, like_x = x.shape[-1], f"of x's dtype {x.dtype}"
    if weight.ndim != 2 or weight.shape[1] != k or weight.dtype != x.dtype:
        raise ValueError(f"{_OP}: weight must be [N, K={k}] {like_x} for x {tuple(x.shape)}, got {describe(weight)}")
    check_device(_OP, "weight", weight, x)
    if bias is not None:
        if bias.shape != weight.shape[:1] or bias.dtype != x.dtype:
            raise ValueError(f"{_OP}: bias must be [N={weight.shape[0]}] {like_x}, got {describe(bias)}")
        check_device(_OP, "bias", bias, x)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Eager reference; see :func:`linear`. torch accumulates half precision in fp32 and rounds once."""
    return F.linear(x, weight, bias)


def linear_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, x_gradient: bool, weight_gradient: bool, bias_gradient: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias: ``grad weight``, ``grad^T x``, and ``grad`` summed over its rows."""
    rows = grad.flatten(0, -2) if grad.ndim > 1 else grad.unsqueeze(0)
    dx = grad @ weight if x_gradient else None
    dweight = rows.t() @ x.reshape(rows.shape[0], -1) if weight_gradient else None
    return dx, dweight, rows.sum(0) if bias_gradient else None


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, x_gradient: bool, weight_gradient: bool, bias_gradient: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        empty_like(x) if x_gradient else None,
        empty_like(weight) if weight_gradient else None,
        weight.new_empty(weight.shape[:1]) if bias_gradient else None,
    )


_operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_reference,
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    unsupported=lambda x, weight, bias: unsupported_dtype(x, weight, bias),
    backends=("native",),
)
_operator.register_backward(
    "(Tensor grad, Tensor x, Tensor weight, bool x_gradient, bool weight_gradient, bool bias_gradient) "
    "-> (Tensor, Tensor, Tensor)",
    reference=linear_backward_reference,
    fake=_fake_backward,
    unsupported=lambda grad, x, weight, *_: unsupported_dtype(grad, x, weight),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _operator.backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad)


_operator.register_autograd(_setup_context, _backward)
