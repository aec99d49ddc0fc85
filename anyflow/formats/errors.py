"""Define the one error of this package, and how it lists what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

_LISTED = 12
_LINE_LENGTH = 400


class CheckpointFormatError(ValueError):
    """Report that a file or folder is no complete checkpoint that is understood."""


def listed(lines: Sequence[str]) -> str:
    """Put each line on an indented line of its own, cut off at 12 lines and 400 characters."""
    shown = [f"\n  {line[:_LINE_LENGTH]}" for line in lines[:_LISTED]]
    if len(lines) > _LISTED:
        shown.append(f"\n  and {len(lines) - _LISTED} more")
    return "".join(shown)
