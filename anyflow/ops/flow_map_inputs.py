"""Make the inputs of a flow-map training step: a noisy sample and its neighbors on the path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_number_or_times,
    check_same_shape,
    check_sizes,
    describe,
    lead,
)
from anyflow.ops._frames import (
    FRAMES,
    check_index_operand,
    clamp_indices,
    constant_times,
    sample_indices,
)
from anyflow.ops.library import Operator

_OP = "flow_map_inputs"
Epsilon = float | Tensor | tuple[float | Tensor, float | Tensor]


def flow_map_inputs(
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon: Epsilon,
    picked: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``x_t = (1 - t) latents + t noise``, ``x_pm = x_t +- epsilon (noise - latents)``.

    The results are differentiable with respect to latents and noise; times and widths are
    constants, on every backend.

    Args:
        latents: ``[B, F, ...]`` clean data x0; the kernel takes any strides of B and F but copies
            where the rest is not contiguous.
        noise: the other end of the path, of latents' shape.
        t: ``[B]`` or ``[B, F]`` times in [0, 1].
        epsilon: half-width of the central difference in [0, 1] units: a number, ``[B]`` or
            ``[B, F]``, or a pair ``(plus, minus)`` of these when the two sides differ (one-sided
            ends).
        picked: the samples that need ``x_pm``, in any order: ``[n]`` integer indices, of which
            negative ones count from the end, or a boolean ``[B]`` mask (read by the host). None
            means all.
        dtype: dtype of x_t; None means that of latents.

    Returns:
        ``(x_t, x_plus, x_minus)``: ``[B, F, ...]`` and twice ``[n, F, ...]``, the last two in fp32
        at least: rounding them to half precision would drown their difference. On a GPU, where
        checking indices would stall it, ``x_plus`` and ``x_minus`` of an index that names no sample
        are NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, an index on the CPU names no
            sample, or a forced backend does not support the dtypes.
    """
    x_t, batch = flow_map_batch(latents, noise, t, epsilon, picked, dtype=dtype, with_x_t=False)
    n = batch.shape[0] // 2
    return x_t, batch[:n], batch[n:]


def flow_map_batch(
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon: Epsilon,
    picked: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    with_x_t: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`flow_map_inputs`, with what is evaluated without gradient in one buffer.

    Returns:
        ``(x_t, batch)``: ``[B, F, ...]`` and the network's batch ``[x_plus ; x_minus ; x_t]``,
        ``[2 n + B, F, ...]`` in fp32 at least; without its last part, which is the input of the
        unconditional evaluation, unless ``with_x_t``.
    """
    _check_data(latents, noise)
    dtype = latents.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{_OP}: dtype must be floating-point, got {dtype}")
    plus, minus = epsilon if isinstance(epsilon, tuple) else (epsilon, epsilon)
    if picked is not None:
        if picked.dtype == torch.bool and picked.shape != latents.shape[:1]:
            raise ValueError(
                f"{_OP}: a picked mask must be [B={latents.shape[0]}], got {describe(picked)}"
            )
        picked = sample_indices(
            _OP, picked.nonzero().flatten() if picked.dtype == torch.bool else picked, latents
        )
    return _operator(
        latents,
        noise,
        constant_times(_OP, "t", t, latents),
        constant_times(_OP, "epsilon plus", plus, latents, scalar=True),
        constant_times(_OP, "epsilon minus", minus, latents, scalar=True),
        picked,
        dtype,
        with_x_t,
    )


def flow_map_inputs_reference(
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon_plus: Tensor,
    epsilon_minus: Tensor,
    picked: Tensor | None,
    dtype: torch.dtype,
    with_x_t: bool,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`flow_map_batch` eagerly."""
    acc = accumulation_dtype(latents, noise)
    x0, x1 = latents.to(acc), noise.to(acc)
    sigma = lead(t.to(acc), x0)
    x_t = (1 - sigma) * x0 + sigma * x1
    velocity, center, valid = x1 - x0, x_t, None
    if picked is not None:
        picked, valid = clamp_indices(picked, latents.shape[0])
        velocity, center = velocity[picked], center[picked]
    plus = center + _side(epsilon_plus, picked, velocity) * velocity
    minus = center - _side(epsilon_minus, picked, velocity) * velocity
    if valid is not None:
        plus, minus = (x.where(lead(valid, x), torch.nan) for x in (plus, minus))
    return x_t.to(dtype), torch.cat([plus, minus, x_t] if with_x_t else [plus, minus])


def flow_map_inputs_backward_reference(
    grad: Tensor,
    grad_batch: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon_plus: Tensor,
    epsilon_minus: Tensor,
    picked: Tensor | None,
    with_x_t: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of latents and noise, of which only shape and dtype are read.

    They are ``(1 - t) dx - dv`` and ``t dx + dv``, with the gradients dx of x_t and dv of
    noise - latents.
    """
    acc = accumulation_dtype(latents, noise)
    b = latents.shape[0]
    n = b if picked is None else picked.shape[0]
    dx, (plus, minus) = grad.to(acc), grad_batch[: 2 * n].to(acc).unflatten(0, (2, n))
    if with_x_t:
        dx = dx + grad_batch[2 * n :].to(acc)
    valid = None
    if picked is not None:
        picked, valid = clamp_indices(picked, b)
    sides = plus + minus
    slopes = _side(epsilon_plus, picked, plus) * plus - _side(epsilon_minus, picked, minus) * minus
    if valid is not None:
        sides, slopes = (x.where(lead(valid, x), 0.0) for x in (sides, slopes))
    if picked is not None:
        sides, slopes = (torch.zeros_like(dx).index_add_(0, picked, x) for x in (sides, slopes))
    sigma, dx = lead(t.to(acc), dx), dx + sides
    return ((1 - sigma) * dx - slopes).to(latents.dtype), (sigma * dx + slopes).to(noise.dtype)


def _check_data(latents: Tensor, noise: Tensor) -> None:
    if latents.ndim < 2 or not latents.is_floating_point():
        raise ValueError(
            f"{_OP}: latents must be a floating-point [B, F, ...], got {describe(latents)}"
        )
    check_same_shape(_OP, "noise", noise, latents, "latents")


def _check_times(latents: Tensor, picked: Tensor | None, **times: Tensor) -> None:
    for name, tensor in times.items():
        check_number_or_times(_OP, name, tensor, latents.shape[0], latents)
    if picked is not None:
        check_index_operand(_OP, picked, latents)


def _check(
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon_plus: Tensor,
    epsilon_minus: Tensor,
    picked: Tensor | None,
    dtype: torch.dtype,
    with_x_t: bool,
) -> None:
    _check_data(latents, noise)
    _check_times(latents, picked, t=t, epsilon_plus=epsilon_plus, epsilon_minus=epsilon_minus)
    if not dtype.is_floating_point:
        raise ValueError(f"{_OP}: dtype must be floating-point, got {dtype}")


def _check_backward(
    grad: Tensor,
    grad_batch: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon_plus: Tensor,
    epsilon_minus: Tensor,
    picked: Tensor | None,
    with_x_t: bool,
) -> None:
    _check_data(latents, noise)
    _check_times(latents, picked, t=t, epsilon_plus=epsilon_plus, epsilon_minus=epsilon_minus)
    check_same_shape(_OP, "grad", grad, latents, "latents")
    n = _batch_size(latents, picked, with_x_t)
    check_sizes(_OP, "grad_batch", grad_batch, (n, *latents.shape[1:]), latents)


def _batch_size(latents: Tensor, picked: Tensor | None, with_x_t: bool) -> int:
    samples = latents.shape[0]
    return 2 * (samples if picked is None else picked.shape[0]) + (samples if with_x_t else 0)


def _side(epsilon: Tensor, picked: Tensor | None, like: Tensor) -> Tensor:
    if epsilon.ndim and picked is not None:
        epsilon = epsilon[picked]
    return lead(epsilon.to(like.dtype), like)


def _fake(latents: Tensor, noise: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    # the reference on fake tensors makes 18 % of the Python calls of compiling the pair
    *_, picked, dtype, with_x_t = others
    size = (_batch_size(latents, picked, with_x_t), *latents.shape[1:])
    batch = latents.new_empty(size, dtype=accumulation_dtype(latents, noise))
    return latents.new_empty(latents.shape, dtype=dtype), batch


_operator = Operator(
    flow_map_inputs_reference,
    flow_map_inputs_backward_reference,
    check=_check,
    check_backward=_check_backward,
    limit=FRAMES,
    fake=_fake,
    results=("x_t", "batch"),
)
