"""Compute a linear layer by one of the two libraries that torch brings for a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import check_device, check_sizes, describe
from anyflow.ops.backend import LEFT_TO_TORCH, forced_backend
from anyflow.ops.library import ELEMENTS, Operator
from anyflow.ops.native import EXTENSION

_OP = "linear"
_WORTH_IT = 2**22  # multiplications; as in csrc/cpu/linear.cpp


def _left_to_torch() -> str | None:
    """Return why torch's own choice for fp32 is kept on this processor, or None.

    Its choice is MKL, which is held at AVX2 on any processor that is not Intel's.
    """
    if EXTENSION is None:
        return "the native extension is not built"
    if not torch.backends.mkldnn.is_available():
        return "this torch is without oneDNN"
    if EXTENSION.cpu_is_intel():
        return "torch's MKL has the whole instruction set of Intel's processors"
    if EXTENSION.cpu_instruction_set() == "generic":
        return "this processor has no AVX2, with which oneDNN is faster"
    return None


if (_reason := _left_to_torch()) is not None:
    LEFT_TO_TORCH[_OP] = _reason


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x weight^T + bias``, as ``torch.nn.functional.linear``.

    The native kernel (CPU) is oneDNN's where torch would take MKL: large fp32 products, on a
    processor that is not Intel's (``docs/performance-log.md``, 2026-11-25, has both rates). All
    other calls are ``F.linear`` itself, derivatives of any order and autocast included. Forcing
    ``"native"`` takes the kernel for every size. No Triton kernel exists.

    Args:
        x: ``[..., K]``, any floating dtype.
        weight: ``[N, K]``, in x's dtype.
        bias: ``[N]``, in x's dtype, or None.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a forced backend does not
            support the dtype.
        RuntimeError: a second derivative is taken through the kernel, or a forward-mode one through
            a forced one.
    """
    if not _takes_operator(x, weight):
        return F.linear(x, weight, bias)
    _check(x, weight, bias)
    return _operator(x, weight, bias)


def _takes_operator(x: Tensor, weight: Tensor) -> bool:
    """Return whether the operator is called: where its kernel is chosen or a backend is forced."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    forced = forced_backend()
    if forced is not None:
        return forced[0] != "eager"
    if _OP in LEFT_TO_TORCH or not (x.is_cpu and x.dtype == weight.dtype == torch.float32):
        return False
    return x.numel() * weight.shape[0] >= _WORTH_IT


def _check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"{_OP}: x must be a floating-point [..., K] tensor, got {describe(x)}")
    k, like_x = x.shape[-1], f"of x's dtype {x.dtype}"
    if weight.ndim != 2 or weight.shape[1] != k or weight.dtype != x.dtype:
        raise ValueError(
            f"{_OP}: weight must be [N, K={k}] {like_x} for x {tuple(x.shape)}, got "
            f"{describe(weight)}"
        )
    check_device(_OP, "weight", weight, x)
    if bias is not None:
        if bias.shape != weight.shape[:1] or bias.dtype != x.dtype:
            raise ValueError(
                f"{_OP}: bias must be [N={weight.shape[0]}] {like_x}, got {describe(bias)}"
            )
        check_device(_OP, "bias", bias, x)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute :func:`linear` eagerly; torch accumulates half precision in fp32, rounding once."""
    return F.linear(x, weight, bias)


def linear_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, each empty unless asked for.

    They are ``grad weight``, ``grad^T x``, and ``grad`` summed over its tokens.
    """
    tokens = grad.flatten(0, -2) if grad.ndim > 1 else grad.unsqueeze(0)
    dx, dweight, dbias = (grad.new_empty(0) for _ in range(3))
    if x_gradient:
        dx = grad @ weight
    if weight_gradient:
        dweight = tokens.t() @ x.reshape(tokens.shape[0], x.shape[-1])
    if bias_gradient:
        dbias = tokens.sum(0)
    return dx, dweight, dbias


def _check_backward(grad: Tensor, x: Tensor, weight: Tensor, *_: bool) -> None:
    _check(x, weight)
    check_sizes(_OP, "grad", grad, (*x.shape[:-1], weight.shape[0]), x)
    if grad.dtype != x.dtype:
        raise ValueError(f"{_OP}: grad must be of x's dtype {x.dtype}, got {describe(grad)}")


_operator = Operator(
    linear_reference,
    linear_backward_reference,
    check=_check,
    check_backward=_check_backward,
    limit=ELEMENTS,
    fake=linear_reference,
    fake_backward=linear_backward_reference,
    backends=("native",),
)
