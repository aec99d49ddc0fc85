"""Write the tables of a run and of the page, in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def table(
    headings: Sequence[str], lines: Sequence[Sequence[str]], right: int = 1, padded: bool = False
) -> list[str]:
    """Write a table.

    Args:
        headings, lines: cells.
        right: number of the first column that is right-aligned.
        padded: fill cells up to the width of their column, for a console.
    """
    rule = ["---" if i < right else "---:" for i in range(len(headings))]
    every = [headings, rule, *lines]
    if padded:
        widths = [max(len(line[i]) for line in every) for i in range(len(headings))]
        rule = [mark.rjust(w, "-") for mark, w in zip(rule, widths, strict=True)]
        every = [_padded(line, widths, right) for line in (headings, rule, *lines)]
    return [f"| {' | '.join(line)} |" for line in every]


def _padded(cells: Sequence[str], widths: Sequence[int], right: int) -> list[str]:
    pairs = enumerate(zip(cells, widths, strict=True))
    return [cell.rjust(w) if i >= right else cell.ljust(w) for i, (cell, w) in pairs]


def paragraph(text: str, first: str = "") -> str:
    """Break a paragraph, or an item of a list, into lines."""
    return textwrap.fill(
        text, 100, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )
