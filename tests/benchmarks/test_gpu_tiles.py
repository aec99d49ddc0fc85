"""benchmarks/gpu/tiles.py: tiles, waves and the effect of padding, counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu import tiles
from gpu.sizes import PUBLISHED, TINY


def test_the_published_number_of_tokens() -> None:
    assert PUBLISHED["1.3B"].tokens == 255 * 128 + 120
    assert tiles.padded(32760) == 32768 == 256 * 128 and tiles.padded(32768) == 32768


def test_attention_by_hand() -> None:
    """12 heads x 256 blocks of queries are 23.3 waves of 132, 40 heads 77.6; each tile goes over
    256 blocks of keys.
    """
    small, large = (tiles.attention_grid(32760, PUBLISHED[name].heads) for name in ("1.3B", "14B"))
    assert (small.tiles, small.waves, small.steps) == (3072, 24, 256)
    assert small.fill == pytest.approx(3072 / 3168)
    assert (large.tiles, large.waves) == (10240, 78) and large.fill == pytest.approx(10240 / 10296)


@pytest.mark.parametrize(
    ("columns", "tile", "count", "waves"),
    [
        (1536, (128, 128), 256 * 12, 24),
        (1536, (128, 256), 256 * 6, 12),
        (8960, (128, 128), 256 * 70, 136),
        (13824, (128, 256), 256 * 54, 105),
        (5120, (128, 256), 256 * 20, 39),
    ],
)
def test_products_by_hand(columns: int, tile: tuple[int, int], count: int, waves: int) -> None:
    grid = tiles.product_grid(32760, columns, tile)
    assert (grid.tiles, grid.waves) == (count, waves)


@pytest.mark.parametrize("name", PUBLISHED)
def test_padding_changes_nothing_at_the_published_sizes(name: str) -> None:
    found = list(tiles.padding(PUBLISHED[name]))
    assert {pad.part for pad in found} == {
        "self-attention",
        *tiles.products(PUBLISHED[name]),
    } and len(found) == 9
    assert all(pad.plain == pad.padded and pad.change == 0 for pad in found)


def test_padding_that_adds_a_tile_is_seen() -> None:
    """132 tiles fill one wave; one row more starts a second one, and another block of keys."""
    one, two = tiles.attention_grid(132 * 128, 1), tiles.attention_grid(132 * 128 + 1, 1)
    assert one.fill == 1 and two.fill == pytest.approx(133 / 264)
    assert two.time_over(one) == pytest.approx(2 * 133 / 132)
    assert tiles.Padding("self-attention", (128, 128), one, two).change == pytest.approx(
        2 * 133 / 132 - 1
    )
    assert next(tiles.padding(TINY["1.3B"])).plain == tiles.Grid(2, 1)  # two heads of 72 tokens
