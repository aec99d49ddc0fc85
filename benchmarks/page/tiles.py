"""Count the tiles of the kernels at the models' shapes, how full waves are, and what padding does.

A kernel computes its result in tiles, one multiprocessor at a time for each; a tile that only
partly lies in the result takes as long as a whole one. 32,760 tokens are 255 x 128 + 120. Tiles run
in waves of as many as a device has multiprocessors; the last wave takes as long as a full one.
Kernels that hold several tiles per multiprocessor, or that split the last wave's tiles along the
sum, lose less than is said here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sizes import NetworkSize

MULTIPROCESSORS = 132  # H100 SXM and H200
TILES = ((128, 128), (128, 256))  # rows and columns of a matrix product's
QUERIES, KEYS = 128, 128  # rows of attention's tile, and the keys that it takes at a time


@dataclass(frozen=True)
class TileGrid:
    """Count the tiles of a kernel, and the steps of each where they depend on the tokens."""

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

    def time_over(self, other: TileGrid) -> float:
        """Return the time over another grid's of the same tile: waves times steps."""
        return self.waves * self.steps / (other.waves * other.steps)


@dataclass(frozen=True)
class Padding:
    """Compare a part of a network on its tokens and on padded ones.

    ``tile`` is rows x columns, for attention queries x keys.
    """

    part: str
    tile: tuple[int, int]
    plain: TileGrid
    padded: TileGrid

    @property
    def change(self) -> float:
        """Return the predicted change of the kernel's time; 0.01 is one hundredth more."""
        return self.padded.time_over(self.plain) - 1


def padded(tokens: int, multiple: int = 128) -> int:
    """Return the next multiple: 32,768 for 32,760."""
    return math.ceil(tokens / multiple) * multiple


def product_grid(tokens: int, columns: int, tile: tuple[int, int]) -> TileGrid:
    """Count the tiles of a ``[tokens, columns]`` result."""
    return TileGrid(math.ceil(tokens / tile[0]) * math.ceil(columns / tile[1]))


def attention_grid(tokens: int, heads: int) -> TileGrid:
    """Count heads x query blocks, each of which takes all blocks of keys."""
    return TileGrid(heads * math.ceil(tokens / QUERIES), math.ceil(tokens / KEYS))


def padding(size: NetworkSize) -> Iterator[Padding]:
    """Compare self-attention and every linear layer over the tokens, by tile."""
    counts, d, f = (size.tokens, padded(size.tokens)), size.dim, size.ffn_dim
    grids = [attention_grid(count, size.heads) for count in counts]
    yield Padding("self-attention", (QUERIES, KEYS), *grids)
    widths = {"q, k, v or out": d, "q, k, v in one": 3 * d}
    for part, out in (widths | {"feed-forward, up": f, "feed-forward, down": d}).items():
        for tile in TILES:
            yield Padding(part, tile, *(product_grid(count, out, tile) for count in counts))
