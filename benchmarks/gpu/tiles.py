"""Counts the tiles of the kernels at the models' shapes: what padding the tokens changes, and how
full waves are.

A kernel computes its result in tiles, one multiprocessor at a time for each; a tile that only
partly lies in the result takes as long as a whole one. 32,760 tokens are 255 x 128 + 120. Tiles run
in waves of as many as there are multiprocessors; the last wave takes as long as a full one. Kernels
that hold several tiles per multiprocessor, or that split the last wave's tiles along the sum, lose
less than is said here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gpu.sizes import Size

MULTIPROCESSORS = 132  # H100 SXM and H200
TILES = ((128, 128), (128, 256))  # rows and columns of a matrix product's
QUERIES, KEYS = 128, 128  # rows of attention's tile, and the keys that it takes at a time


@dataclass(frozen=True)
class Grid:
    """Counts the work of one kernel.

    Attributes:
        tiles: of the result.
        steps: that each of them takes one after the other, where their number depends on the
            tokens; else 1.
    """

    tiles: int
    steps: int = 1

    @property
    def waves(self) -> int:
        """Return the rounds of all multiprocessors."""
        return math.ceil(self.tiles / MULTIPROCESSORS)

    @property
    def fill(self) -> float:
        """Return the share of the multiprocessors' time that has a tile."""
        return self.tiles / (self.waves * MULTIPROCESSORS)

    def time_over(self, other: Grid) -> float:
        """Return the time over another grid's of the same tile: waves times steps."""
        return self.waves * self.steps / (other.waves * other.steps)


@dataclass(frozen=True)
class Padding:
    """Compares a kernel on the tokens as they are with the same on padded ones.

    Attributes:
        part: of the network.
        tile: rows x columns; for attention queries x keys.
        plain, padded: the two grids.
    """

    part: str
    tile: tuple[int, int]
    plain: Grid
    padded: Grid

    @property
    def change(self) -> float:
        """Return the predicted change of the kernel's time; 0.01 is one hundredth more."""
        return self.padded.time_over(self.plain) - 1


def padded(tokens: int, multiple: int = 128) -> int:
    """Return the next multiple: 32,768 for 32,760."""
    return math.ceil(tokens / multiple) * multiple


def product_grid(rows: int, columns: int, tile: tuple[int, int]) -> Grid:
    """Count the tiles of a ``[rows, columns]`` result."""
    return Grid(math.ceil(rows / tile[0]) * math.ceil(columns / tile[1]))


def attention_grid(tokens: int, heads: int) -> Grid:
    """Count heads x query blocks, each of which goes over all blocks of keys."""
    return Grid(heads * math.ceil(tokens / QUERIES), math.ceil(tokens / KEYS))


def products(size: Size) -> dict[str, tuple[int, int]]:
    """List the linear layers of a block over all tokens: their input and output widths."""
    d, f = size.dim, size.ffn_dim
    return {
        "q, k, v or out": (d, d),
        "q, k, v in one": (d, 3 * d),
        "feed-forward, up": (d, f),
        "feed-forward, down": (f, d),
    }


def padding(size: Size) -> Iterator[Padding]:
    """Compare self-attention and every linear layer over the tokens, by tile."""
    tokens, more = size.tokens, padded(size.tokens)
    grids = [attention_grid(count, size.heads) for count in (tokens, more)]
    yield Padding("self-attention", (QUERIES, KEYS), *grids)
    for part, (_, out) in products(size).items():
        for tile in TILES:
            yield Padding(
                part, tile, product_grid(tokens, out, tile), product_grid(more, out, tile)
            )
