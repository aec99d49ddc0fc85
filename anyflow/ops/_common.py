"""Check operands, and help the references of the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_KERNEL_DIM = 8192


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of statistics and products: fp32, or fp64 where an operand is fp64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_tokens(op: str, x: Tensor) -> tuple[int, int, int]:
    """Check that x is a floating ``[B, L, D]`` tensor and return its shape."""
    if x.ndim != 3 or not x.is_floating_point():
        heads = "; heads side by side in D: flatten(2) of [B, L, H, Dh]" if x.ndim == 4 else ""
        raise ValueError(
            f"{op}: x must be a floating-point [B, L, D] tensor, got {describe(x)}{heads}"
        )
    return x.shape[0], x.shape[1], x.shape[2]


def check_rows(op: str, name: str, rows: Tensor, x: Tensor) -> int:
    """Check a modulation tensor ``[B, R, D]`` against ``x[B, L, D]`` (R divides L) and return R."""
    b, length, d = x.shape
    if rows.ndim != 3 or rows.shape[0] != b or rows.shape[2] != d or not rows.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be a floating-point [B={b}, R, D={d}] for x {tuple(x.shape)}, "
            f"got {describe(rows)}{_rows_hint(name, rows, b, d)}"
        )
    check_device(op, name, rows, x)
    r = rows.shape[1]
    if r == 0 or length % r:
        raise ValueError(
            f"{op}: {name} has R={r} rows, which must divide the L={length} tokens of x"
        )
    return r


def _rows_hint(name: str, rows: Tensor, b: int, d: int) -> str:
    """Say how modulation of a layout that others use becomes rows, where its shape tells."""
    if rows.shape == (b, d):
        return f"; one row per sample: {name}.unsqueeze(1)"
    if rows.ndim == 4 and (rows.shape[0], rows.shape[3]) == (b, d):
        return "; several modulations in one tensor [B, R, n, D]: take one of unbind(2)"
    if rows.ndim == 3 and rows.shape[0] == 1 and rows.shape[2] == d:
        return f"; one row for all samples: {name}.expand({b}, -1, -1)"
    return ""


def check_vector(op: str, name: str, vector: Tensor, x: Tensor) -> None:
    """Check an affine parameter ``[D]`` against ``x[..., D]``."""
    if vector.shape != x.shape[-1:] or not vector.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be a floating-point [D={x.shape[-1]}], got {describe(vector)}"
        )
    check_device(op, name, vector, x)


def check_same_shape(op: str, name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Check that a floating-point tensor has the shape and device of another."""
    if tensor.shape != like.shape or not tensor.is_floating_point():
        raise ValueError(
            f"{op}: {name} must have the shape of {like_name} {tuple(like.shape)}, in a floating "
            f"dtype, got {describe(tensor)}"
        )
    check_device(op, name, tensor, like)


def check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Check that two tensors share a device."""
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {like.device}")


def check_times(op: str, name: str, times: Tensor, like: Tensor) -> None:
    """Check per-sample ``[B]`` or per-frame ``[B, F]`` times against ``like[B, F, ...]``."""
    if times.ndim not in (1, 2) or times.shape != like.shape[: times.ndim]:
        raise ValueError(
            f"{op}: {name} must be [B={like.shape[0]}] or [B={like.shape[0]}, F={like.shape[1]}], "
            f"got {describe(times)}"
        )
    check_device(op, name, times, like)


def check_indices(op: str, name: str, indices: Tensor, like: Tensor) -> None:
    """Check that indices are an integer ``[n]`` tensor on like's device, without reading them."""
    if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"{op}: {name} must be [n] integer indices, got {describe(indices)}")
    check_device(op, name, indices, like)


def check_dense(op: str, tensor: Tensor) -> None:
    """Check that a tensor is dense and within its memory, which may have been freed."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        raise ValueError(
            f"{op}: takes dense tensors, got {describe(tensor)} of layout {tensor.layout}"
        )
    if tensor.device.type == "cpu" and tensor.numel():
        last = tensor.storage_offset() + sum(
            (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
        )
        size = tensor.untyped_storage().nbytes()
        if (last + 1) * tensor.element_size() > size:
            raise ValueError(f"{op}: {describe(tensor)} is not within its memory of {size} bytes")


def check_eps(op: str, eps: float) -> None:
    """Check what is added to a variance or a mean square."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps must be a finite number >= 0, got {eps}")


def check_guidance(op: str, guidance: float) -> None:
    """Check a guidance scale."""
    if not (math.isfinite(guidance) and guidance > 0):
        raise ValueError(f"{op}: guidance must be a finite number > 0, got {guidance}")


def check_sizes(op: str, name: str, tensor: Tensor, sizes: Sequence[int], like: Tensor) -> None:
    """Check that a floating-point tensor has certain sizes, and the device of another."""
    if tuple(tensor.shape) != tuple(sizes) or not tensor.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be a floating-point {tuple(sizes)}, got {describe(tensor)}"
        )
    check_device(op, name, tensor, like)


def check_number_or_times(op: str, name: str, times: Tensor, samples: int, like: Tensor) -> None:
    """Check one time, ``[n]`` or ``[n, F]`` times, of n samples with the frames of ``like``."""
    allowed = ((), (samples,), (samples, like.shape[1]))
    if times.ndim > 2 or tuple(times.shape) != allowed[times.ndim] or not times.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be a floating-point [], [{samples}] or [{samples}, F], got "
            f"{describe(times)}"
        )
    check_device(op, name, times, like)


def describe(x: Tensor) -> str:
    """Return shape and dtype of a tensor for an error message."""
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def split_rows(x: Tensor, rows: int) -> Tensor:
    """View ``[B, L, D]`` as ``[B, R, L / R, D]``, over which a modulation row broadcasts."""
    return x.unflatten(1, (rows, x.shape[1] // rows))


def sum_rows(x: Tensor, rows: int) -> Tensor:
    """Sum ``[B, L, D]`` over the tokens of each of R rows: ``[B, R, D]``."""
    return split_rows(x, rows).sum(2)


def lead(values: Tensor, like: Tensor) -> Tensor:
    """Append dimensions to ``values[B]`` or ``[B, F]`` to broadcast over ``like[B, F, ...]``."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
