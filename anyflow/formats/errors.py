"""The one error of this package, and how it lists what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

_LISTED = 12
_LINE_LENGTH = 400


class CheckpointFormatError(ValueError):
    """A file or folder is not a complete checkpoint of a kind that is understood; nothing of it was
    loaded.
    """


def listed(lines: Sequence[str]) -> str:
    """List one indented line each, up to a number and a length that can be read, and how many more
    there are.
    """
    shown = [f"\n  {line[:_LINE_LENGTH]}" for line in lines[:_LISTED]]
    if len(lines) > _LISTED:
        shown.append(f"\n  and {len(lines) - _LISTED} more")
    return "".join(shown)
