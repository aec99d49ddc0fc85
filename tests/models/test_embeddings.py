"""Check the cache of rotary tables under threads."""

import threading

import torch

from anyflow.models.embeddings import RotaryEmbedding


def test_tables_are_safe_to_share_among_threads() -> None:
    """Give threads with more grids than are kept their own tables each."""
    rope = RotaryEmbedding(16, 64)
    grids = [(1, 2, n) for n in range(1, 13)]
    expected = {
        grid: RotaryEmbedding(16, 64)(grid, torch.device("cpu"), torch.float32) for grid in grids
    }
    wrong: list[object] = []

    def run(offset: int) -> None:
        try:
            for i in range(60):
                grid = grids[(i + offset) % len(grids)]
                tables = rope(grid, torch.device("cpu"), torch.float32)
                if not all(torch.equal(a, b) for a, b in zip(tables, expected[grid], strict=True)):
                    wrong.append(grid)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(rope._cache) <= 8
