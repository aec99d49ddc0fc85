"""Checks of numbers in configurations: their kind and their range."""

from __future__ import annotations

import math
from numbers import Integral, Real

from anyflow.validation import brief


def require_whole(name: str, value: object, *, least: int = 1, most: int = 2**63 - 1) -> None:
    """Raise a ValueError unless ``value`` is a whole number in ``least``..``most``; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {brief(value)}")
    number = int(value)
    if number < least:
        wanted = "a positive number" if least == 1 else f">= {least}"
        raise ValueError(f"{name} must be {wanted}, got {brief(number)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {brief(number)}")


def require_number(name: str, value: object, *, least: float | None = None) -> None:
    """Raise a ValueError unless ``value`` is a finite number, at least ``least``; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {brief(value)}")
    if not _is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {brief(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be >= {least:g}, got {value}")


def require_positive(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` is a finite number > 0; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number, got {brief(value)}")


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
