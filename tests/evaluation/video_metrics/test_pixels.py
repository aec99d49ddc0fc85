"""Test metrics of pixels against closed forms and independent implementations."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from anyflow.evaluation.video_metrics import flicker, psnr


def _videos(seed: int, *shape: int) -> Tensor:
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_psnr_of_a_known_error() -> None:
    first = torch.full((3, 2, 3, 4, 5), 0.25)
    second = first.clone()
    second[1] += 0.1
    second[2, 0] += 0.1  # half of the frames: half of the squared error
    assert psnr(first, second).tolist() == pytest.approx(
        [math.inf, 20, 20 + 10 * math.log10(2)], rel=1e-6
    )
    assert psnr(first, second).dtype == torch.float64
    assert psnr(torch.zeros(1, 1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2)).item() == 0


def test_psnr_is_that_of_scikit_image() -> None:
    first, second = _videos(1, 4, 3, 3, 8, 9), _videos(2, 4, 3, 3, 8, 9)
    expected = [
        peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(first, second, strict=True)
    ]
    assert psnr(first, second).tolist() == pytest.approx(expected, rel=1e-6)


def test_psnr_needs_equal_shapes() -> None:
    videos = _videos(0, 2, 3, 1, 4, 4)
    with pytest.raises(
        ValueError,
        match=r"references must have the shape of videos, \(2, 3, 1, 4, 4\), got \(2, 2, ",
    ):
        psnr(videos, videos[:, :2])
    with pytest.raises(ValueError, match="references must be finite"):
        psnr(videos, torch.full(videos.shape, math.nan))


def test_flicker_of_known_levels() -> None:
    frozen = torch.full((4, 1, 4, 4), 0.3)
    alternating = torch.tensor([0.2, 0.7, 0.2, 0.7]).view(4, 1, 1, 1).expand(4, 1, 4, 4)
    once = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1, 1).expand(4, 1, 4, 4)
    assert flicker(torch.stack([frozen, alternating, once])).tolist() == pytest.approx(
        [0, 0.5, 1 / 3], rel=1e-6
    )


def test_flicker_is_one_minus_the_temporal_flickering_of_vbench() -> None:
    """Average ``cv2.absdiff`` of successive frames in levels as VBench: ``(255 - mean) / 255``."""
    cv2 = pytest.importorskip("cv2")
    (video,) = videos = _videos(3, 1, 5, 3, 6, 7)
    frames = [frame.permute(1, 2, 0).float().contiguous().numpy() for frame in video]
    means = [cv2.absdiff(a, b).mean() for a, b in itertools.pairwise(frames)]
    score = (255.0 - sum(means) / len(means)) / 255.0
    assert 1 - flicker(videos).item() == pytest.approx(score, rel=1e-6)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 4),
    frames=st.integers(2, 5),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=25, deadline=None)
def test_order_of_the_batch_and_dtype_do_not_matter(
    seed: int, n: int, frames: int, channels: int
) -> None:
    first, second = (
        _videos(seed, n, frames, channels, 5, 6),
        _videos(seed + 1, n, frames, channels, 5, 6),
    )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(psnr(first, second)[order], psnr(first[order], second[order]))
    torch.testing.assert_close(flicker(first)[order], flicker(first[order]))
    torch.testing.assert_close(psnr(first, second), psnr(second / 255, first.double() / 255))
    torch.testing.assert_close(flicker(first), flicker(first.double() / 255))
    torch.testing.assert_close(flicker(first), flicker(first.flip(1)))
