"""Checks of user-supplied numbers and tensors, shared by configurations, samplers and training methods."""

from __future__ import annotations

import math
import reprlib
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_LARGEST_FP32 = torch.finfo(torch.float32).max


def is_finite_number(value: Any) -> bool:
    """Return whether ``value`` is a real number (no bool) that is finite in fp32, too."""
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return bool(abs(number) <= _LARGEST_FP32)  # false for NaN, and exact for an int of any size


def require_whole_number(name: str, value: Any, lowest: int, highest: int) -> int:
    """Return ``value`` as an int; ValueError unless it is a whole number (no bool) in [lowest, highest]."""
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, Integral) or not lowest <= number <= highest:
        raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, got {shown(value)}")
    return int(value)


def shown(value: object, length: int = 80) -> str:
    """Return the ``repr`` of a value for a message, cut to ``length`` characters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= length else f"{text[: length - 3]}..."


def require_latents(name: str, latents: Tensor) -> None:
    """ValueError unless ``latents`` is a non-empty floating-point ``[B, F, C, H, W]``."""
    if latents.ndim != 5 or not latents.is_floating_point() or latents.numel() == 0:
        raise ValueError(
            f"{name} must be a non-empty floating-point [B, F, C, H, W] tensor (frames first), "
            f"got {tuple(latents.shape)} {latents.dtype}"
        )


def require_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless two tensors have one shape."""
    if tensor.shape != other.shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape of {other_name} {tuple(other.shape)}")


def require_finite(name: str, tensor: Tensor) -> None:
    """ValueError if a CPU tensor holds NaN or infinity. Device tensors are not read: that would stall the GPU."""
    if tensor.device.type == "cpu" and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinite values; check the data that produced it")


def batched_embeds(name: str, embeds: Tensor, batch_size: int) -> Tensor:
    """Prompt embeddings ``[B or 1, S, D]`` as ``[B, S, D]``; a single one is repeated, never broadcast in attention."""
    if embeds.ndim != 3 or embeds.shape[0] not in (1, batch_size):
        raise ValueError(f"{name} must be [B={batch_size} or 1, S, text_dim], got {tuple(embeds.shape)}")
    return embeds if embeds.shape[0] == batch_size else embeds.repeat(batch_size, 1, 1)


def require_whole(name: str, value: object, *, least: int = 1, most: int = 2**31 - 1) -> None:
    """Raise a ValueError unless ``value`` is a whole number in ``least``..``most``; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {reprlib.repr(value)}")
    number = int(value)
    if number < least:
        wanted = "a positive number" if least == 1 else f">= {least}"
        raise ValueError(f"{name} must be {wanted}, got {_shortened(number)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {_shortened(number)}")


def require_number(name: str, value: object, *, least: float | None = None) -> None:
    """Raise a ValueError unless ``value`` is a finite number, at least ``least``; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {reprlib.repr(value)}")
    if not _is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {_shortened(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be >= {least:g}, got {value}")


def require_positive(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is a finite number > 0; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number, got {_shortened(value)}")


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _shortened(value: object) -> str:
    """Return a value for a message; Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)
