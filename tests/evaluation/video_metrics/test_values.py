"""Check what metrics refuse, and what they say about it."""

import math

import pytest
import torch

from anyflow.evaluation.video_metrics.values import gray_frames, levels, unit_videos


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([[0.5]], r"videos must be a torch\.Tensor, got list"),
        (
            torch.zeros(2, 1, 4, 4),
            r"\[N, F, C, H, W\] tensor with 1 or 3 channels C, got shape \(2, 1, 4, 4\)",
        ),
        (torch.zeros(1, 2, 4, 4, 3), r"1 or 3 channels C, got shape \(1, 2, 4, 4, 3\)"),
        (torch.zeros(0, 2, 3, 4, 4), r"non-empty .* got shape \(0, 2, 3, 4, 4\)"),
        (
            torch.zeros(1, 2, 3, 4, 4, dtype=torch.int64),
            r"in \[0, 1\] or uint8 in 0\.\.255, got torch\.int64",
        ),
        (torch.zeros(1, 2, 3, 4, 4, dtype=torch.bool), r"uint8 in 0\.\.255, got torch\.bool"),
        (torch.full((1, 2, 3, 4, 4), math.nan), "videos must be finite, and hold NaN or infinity"),
        (torch.tensor([0.5, math.inf]).view(1, 2, 1, 1, 1), "hold NaN or infinity"),
        (torch.tensor([0.5, math.nan]).view(1, 2, 1, 1, 1), "hold NaN or infinity"),
        (
            torch.tensor([-1.0, 1]).view(1, 2, 1, 1, 1),
            r"must lie in \[0, 1\] where .* got -1\.\.1",
        ),
        (torch.tensor([0.0, 255]).view(1, 2, 1, 1, 1), r"must lie in \[0, 1\] .* got 0\.\.255"),
        (torch.zeros(1, 1, 3, 4, 4), "videos must have at least 2 frames, got 1"),
        (torch.zeros(1, 2, 3, 4, 2), r"at least 3 pixels high and wide, got \(4, 2\)"),
    ],
)
def test_other_values_are_refused_with_what_was_given(videos: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unit_videos(
            videos,
            least_frames=2,
            least_side=3 if isinstance(videos, torch.Tensor) and videos.shape[-1] == 2 else 1,
        )


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_dtype_that_is_allowed_becomes_the_same_numbers(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1], dtype=torch.uint8).repeat(6).view(1, 2, 3, 1, 2)
    given = values * 255 if dtype == torch.uint8 else values.to(dtype)
    unit = unit_videos(given)
    assert unit.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(unit.double(), values.double())
    assert torch.equal(levels(unit), values * 255)


def test_gray_levels_are_those_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    frame = torch.randint(
        0, 256, (1, 1, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    expected = cv2.cvtColor(frame[0, 0].permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY)
    found = levels(gray_frames(unit_videos(frame)))[0, 0]
    # OpenCV rounds in fixed point
    assert (found.int() - torch.from_numpy(expected).int()).abs().max() <= 1
    assert torch.equal(
        gray_frames(unit_videos(frame[:, :, :1]))[0, 0] * 255, frame[0, 0, 0].float()
    )
