"""Test pinned weights: where they go, what stays without memory, and that no bit changes."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from anyflow.pipelines.pinning import CHUNK, available_memory, chunked, pin_weights

SIZES = {
    "nothing": [],
    "one": [5],
    "a full chunk": [512, 256, 256],
    "one byte more": [512, 256, 257],
    "larger than a chunk": [100, 3000, 100],
    "many": [(37 * i) % 300 + 1 for i in range(200)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_tensors_lie_one_behind_another_in_chunks(sizes: list[int]) -> None:
    chunks = chunked(sizes, 1024)
    assert [index for places in chunks for index, _ in places] == list(range(len(sizes)))
    for places in chunks:
        end = 0
        for index, offset in places:
            assert offset % 256 == 0 and end <= offset < end + 256
            end = offset + sizes[index]
        assert end <= 1024 or len(places) == 1
    # a chunk ends where the next tensor does not fit
    for before, after in itertools.pairwise(chunks):
        last, offset = before[-1]
        assert (
            offset + sizes[last] + 255 >= 1024
            or -(-(offset + sizes[last]) // 256) * 256 + sizes[after[0][0]] > 1024
        )


def test_the_weights_of_the_14b_model_lose_little() -> None:
    """Compare with pinning one by one, which torch rounds up to powers of two."""
    block = [2 * 5120 * n for n in (*[5120, 1] * 8, 13824, 13824, 1, 3, 1, 1, 6)]
    sizes = block * 40
    rounded = sum(1 << (size - 1).bit_length() for size in sizes)
    assert rounded > 1.5 * sum(sizes)
    assert len(chunked(sizes)) * CHUNK < 1.15 * sum(sizes)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100).bfloat16(), nn.LayerNorm(7))


def test_pinned_weights_have_the_same_bits() -> None:
    """Expect a warning without a device, whose driver would pin memory."""
    module = network()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    same = list(module.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        left = pin_weights(module)
    after = dict(module.named_parameters())
    assert all(p is q for p, q in zip(module.parameters(), same, strict=True))
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
        for name, tensor in before.items()
    )
    if torch.cuda.is_available():
        assert left == 0 and not caught and all(p.is_pinned() for p in after.values())
        assert pin_weights(module) == 0  # nothing is left to do
    else:
        assert left == sum(p.nbytes for p in after.values())
        assert [w.category for w in caught] == [UserWarning] and "pageable memory" in str(
            caught[0].message
        )


def test_available_memory() -> None:
    available = available_memory()
    assert available is None or 2**20 < available < 2**50
