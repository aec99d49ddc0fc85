"""Compute the tanh approximation of GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import check_same_shape, describe
from anyflow.ops.library import ELEMENTS, Operator

_OP = "gelu"


def gelu(x: Tensor) -> Tensor:
    """Compute ``0.5 x (1 + tanh(u))`` with ``u = sqrt(2 / pi) (x + 0.044715 x^3)``.

    The native kernel computes ``x sigmoid(2 u)``, which does not cancel: results are good to a few
    units in the last place however small they are, and -inf gives -0. The reference is torch's,
    which has neither. No Triton kernel exists; forcing ``"triton"`` runs the reference.

    Args:
        x: any shape, any floating dtype; the kernel copies what is not contiguous.

    Returns:
        x's shape and dtype, rounded once from fp32 (fp64 for fp64).

    Raises:
        ValueError: x is not a floating-point tensor, or a forced backend does not support its
            dtype.
    """
    _check(x)
    return _operator(x)


def gelu_reference(x: Tensor) -> Tensor:
    """Compute :func:`gelu` eagerly; torch computes half precision in fp32 and rounds once."""
    return F.gelu(x, approximate="tanh")


def gelu_backward_reference(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x: ``grad (s + x s (1 - s) (2 u)')`` with ``s = sigmoid(2 u)``."""
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def _check(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{_OP}: x must be a floating-point tensor, got {describe(x)}")


def _check_backward(grad: Tensor, x: Tensor) -> None:
    _check(x)
    check_same_shape(_OP, "grad", grad, x, "x")


_operator = Operator(
    gelu_reference,
    gelu_backward_reference,
    check=_check,
    check_backward=_check_backward,
    limit=ELEMENTS,
    backends=("native",),
)
