"""Check the numbers and tensors that users give to configurations, samplers and methods."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_LARGEST_FP32 = torch.finfo(torch.float32).max


class SettingError(ValueError):
    """Say which setting cannot work, and why.

    Attributes:
        field: the setting's name, relative to what raises, with dots; empty for all together.
        text: what is wrong, such as ``"must be positive, got -1"``.
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(field, text)  # all arguments, so that pickle can make it again
        self.field, self.text = field, text

    def __str__(self) -> str:
        return f"{self.field} {self.text}" if self.field else self.text


@contextmanager
def in_section(name: str) -> Iterator[None]:
    """Put a section's name before the fields of the SettingErrors that are raised inside."""
    try:
        yield
    except SettingError as error:
        field = f"{name}.{error.field}" if error.field else name
        raise SettingError(field, error.text) from None


def is_finite_number(value: Any) -> bool:
    """Return whether ``value`` is a real number (no bool) that is finite in fp32, too."""
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return bool(abs(number) <= _LARGEST_FP32)  # false for NaN, and exact for an int of any size


def whole_number(name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """Return a whole number of Python, NumPy or torch (0-d) as an ``int``.

    Raises:
        ValueError: something else, truth values and floats among it, or a number outside [low,
            high].
    """
    try:
        number = None if _is_truth_value(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        number = None
    if number is None or number < low or (high is not None and number > high):
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        raise SettingError(name, f"must be a whole number {allowed}, got {brief(value)}")
    return number


def finite_number(name: str, value: Any) -> float:
    """Return a finite real number of Python, NumPy or torch (0-d) as a ``float``.

    Raises ValueError for anything else.
    """
    try:
        number = (
            math.nan if _is_truth_value(value) or isinstance(value, (str, bytes)) else float(value)
        )
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise SettingError(name, f"must be a finite number, got {brief(value)}")
    return number


def brief(value: Any, length: int = 100) -> str:
    """Return ``repr(value)`` in one line of at most ``length`` characters."""
    # Python refuses to write integers of thousands of digits out
    digits = isinstance(value, int) and value.bit_length() > 2000
    text = f"an integer of {value.bit_length()} bits" if digits else " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[:length]}..."


def require_whole(name: str, value: object, *, least: int = 1, most: int = 2**63 - 1) -> None:
    """Raise a ValueError unless ``value`` is a whole number (no truth value) within the limits."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise SettingError(name, f"must be a whole number, got {brief(value)}")
    number = int(value)
    if number < least:
        wanted = "a positive number" if least == 1 else f">= {least}"
        raise SettingError(name, f"must be {wanted}, got {brief(number)}")
    if number > most:
        raise SettingError(name, f"must be at most {most}, got {brief(number)}")


def require_number(name: str, value: object, *, least: float | None = None) -> None:
    """Raise a ValueError unless ``value`` is a finite number, ``least`` or more.

    True and False are no numbers.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SettingError(name, f"must be a number, got {brief(value)}")
    if not _is_finite(value):
        raise SettingError(name, f"must be a finite number, got {brief(value)}")
    if least is not None and value < least:
        raise SettingError(name, f"must be >= {least:g}, got {value}")


def require_positive(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is a finite number > 0; True and False are none."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not _is_finite(value)
        or value <= 0
    ):
        raise SettingError(name, f"must be a positive number, got {brief(value)}")


def require_text(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is text that can stand for a path or a name."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise SettingError(name, f"must be text that is not empty, got {value!r}")


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_truth_value(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def require_latents(name: str, latents: Tensor) -> None:
    """Raise a ValueError unless ``latents`` is a non-empty floating-point ``[B, F, C, H, W]``."""
    if latents.ndim != 5 or not latents.is_floating_point() or latents.numel() == 0:
        raise ValueError(
            f"{name} must be a non-empty floating-point [B, F, C, H, W] tensor (frames first), "
            f"got {tuple(latents.shape)} {latents.dtype}"
        )


def require_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless two tensors have one shape."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} {tuple(tensor.shape)} must have the shape of {other_name} {tuple(other.shape)}"
        )


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise a ValueError if a CPU tensor holds NaN or infinity.

    Tensors of a device are not read, because reading them would make the host wait for the GPU.
    """
    if tensor.device.type == "cpu" and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinite values; check the data that produced it")


class FiniteCheck:
    """Find the first tensor of a sampling that holds NaN or infinity, waiting only at the end.

    Each tensor is reduced once, to its largest magnitude in each video, which stays on the device:
    a maximum keeps NaN and cannot overflow. All are read together in :meth:`first`.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._magnitudes: list[Tensor] = []

    def note(self, name: str, tensor: Tensor) -> None:
        """Reduce ``tensor[B, ...]``, which ``name`` describes in errors."""
        self._names.append(name)
        self._magnitudes.append(
            torch.linalg.vector_norm(tensor, math.inf, tuple(range(1, tensor.ndim)))
        )

    def first(self) -> tuple[str, list[int], int] | None:
        """Return the first name whose values are not finite, the picked videos, and their number.

        This is the one place where the host waits.
        """
        sizes = [len(magnitude) for magnitude in self._magnitudes]
        bad = ~torch.isfinite(torch.cat(self._magnitudes))
        if bad.is_meta:  # a meta tensor has no values
            return None
        flags = iter(bad.cpu().tolist())
        for name, size in zip(self._names, sizes, strict=True):
            picked = [index for index in range(size) if next(flags)]
            if picked:
                return name, picked, size
        return None


def numbered(picked: list[int], count: int) -> str:
    """Name videos of a batch: ``video 2 of 4``, or ``videos 1, 3 of 4``."""
    return (
        f"video{'s' if len(picked) > 1 else ''} "
        f"{', '.join(str(index + 1) for index in picked)} of {count}"
    )


def overflow_advice(*parts: Any, option: str = "dtype=torch.bfloat16, --dtype bfloat16") -> str:
    """Say what to do about NaN, by the dtypes of the parts (tensors, modules) it may come from."""
    if any(getattr(part, "dtype", None) == torch.float16 for part in parts):
        return f"float16 overflows above 65504 and bfloat16 does not: use bf16 ({option})"
    return (
        "look for NaN in the weights and adapters; what runs in float16 may overflow, and should "
        "run in bf16"
    )


def batched_embeds(name: str, embeds: Tensor, batch_size: int) -> Tensor:
    """Return prompt embeddings ``[B or 1, S, D]`` as ``[B, S, D]``.

    Attention then never broadcasts a single embedding.
    """
    if embeds.ndim != 3 or embeds.shape[0] not in (1, batch_size) or not embeds.is_floating_point():
        got = f"{tuple(embeds.shape)} {embeds.dtype}"
        raise ValueError(
            f"{name} must be floating-point [B={batch_size} or 1, S, text_dim], got {got}"
        )
    return embeds if embeds.shape[0] == batch_size else embeds.repeat(batch_size, 1, 1)
