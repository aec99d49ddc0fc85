"""Test optical flow and the dynamic degree of videos whose motion is known."""

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from anyflow.evaluation.video_metrics import dynamic_degree, flow_peaks, is_dynamic, optical_flow

Texture = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _opencv() -> None:
    pytest.importorskip("cv2", reason="optical flow needs opencv-python-headless")


@pytest.mark.parametrize("velocity", [(0.3, 0.2), (-1.5, 0.5), (3.0, -2.0), (0.0, 4.5)])
def test_a_texture_that_moves_by_a_known_vector(
    moving_texture: Texture, velocity: tuple[float, float]
) -> None:
    flow = optical_flow(moving_texture(*velocity, size=(64, 80)))
    assert flow.shape == (1, 2, 2, 64, 80) and flow.dtype == torch.float32
    error = (flow - torch.tensor(velocity).view(1, 1, 2, 1, 1)).norm(dim=2)[..., 8:-8, 8:-8]
    assert error.mean() < 0.1  # endpoint error in pixels, where content neither enters nor leaves


def test_rotation_turns_around_the_center() -> None:
    """Compare the flow of rotated waves with the distance that the rotation takes each point."""
    size, angle, center = 64, math.radians(2), 31.5
    y, x = np.mgrid[:size, :size] - center

    def frame(turned: float) -> np.ndarray:
        u, v = (
            x * math.cos(turned) + y * math.sin(turned),
            -x * math.sin(turned) + y * math.cos(turned),
        )
        waves = (
            np.sin(0.5 * u)
            + np.sin(0.43 * v + 1)
            + np.sin(0.31 * (u + v))
            + np.sin(0.37 * (u - v) + 2)
        )
        return (waves + 4) / 8

    video = torch.from_numpy(np.stack([frame(0), frame(angle)]))[None, :, None]
    flow = optical_flow(video)[0, 0]
    right, down = (
        (math.cos(angle) - 1) * x - math.sin(angle) * y,
        math.sin(angle) * x + (math.cos(angle) - 1) * y,
    )
    error = (flow - torch.from_numpy(np.stack([right, down]))).norm(dim=0)
    assert error[8:-8, 8:-8].mean() < 0.1
    assert flow[:, 31:33, 31:33].norm(dim=0).max() < 0.2 < flow[:, 31, 60].norm()


def test_a_frozen_video_does_not_move(moving_texture: Texture) -> None:
    frozen = moving_texture(0, 0).repeat(2, 1, 3, 1, 1)
    assert optical_flow(frozen).abs().max() == 0
    assert dynamic_degree(frozen).tolist() == [0, 0]
    assert is_dynamic(frozen, fps=8).tolist() == [False, False]


def test_the_degree_is_that_of_the_fastest_part_in_shorter_sides(moving_texture: Texture) -> None:
    """Move a fifth of the frame by 4 pixels, which is all that the longest 5 % see."""
    still, moving = moving_texture(0, 0, size=(80, 96)), moving_texture(4, 0, size=(80, 96))
    still[..., 16:64, 24:56] = moving[..., 16:64, 24:56]
    assert dynamic_degree(still).item() == pytest.approx(4 / 80, rel=0.1)
    assert optical_flow(still).norm(dim=2).mean() < 4 * 0.3


def test_the_peaks_are_vbenchs_score_of_the_same_flow(moving_texture: Texture) -> None:
    """Sort the lengths and average the first ``int(h * w * 0.05)``, as VBench does."""
    video = moving_texture(2.2, 1.1, size=(30, 41), frames=4)
    expected = []
    for flow in optical_flow(video)[0].numpy():
        lengths = np.sqrt(np.square(flow[0]) + np.square(flow[1])).flatten()
        expected.append(np.mean(np.abs(np.sort(-lengths))[: int(30 * 41 * 0.05)]) / 30)
    assert flow_peaks(video)[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert dynamic_degree(video).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_rule_of_vbench_for_what_moves(moving_texture: Texture) -> None:
    """Move around the threshold, 1.5 pixels per frame of 64 in a quarter of the frames.

    The frames come at 8 per second.
    """
    fast, slow = (moving_texture(speed, 0, size=(64, 72), frames=8) for speed in (2.2, 1.0))
    assert is_dynamic(torch.cat([fast, slow]), fps=8).tolist() == [True, False]
    assert is_dynamic(fast, fps=4).tolist() == [False]  # frames are farther apart in time: 3 pixels
    assert is_dynamic(slow, fps=16).tolist() == [True]  # every second frame: 2 pixels between them
    stopping = fast.clone()
    stopping[:, 2:] = stopping[:, 1:2]  # one moving pair of 8 frames is less than a quarter
    assert is_dynamic(stopping, fps=8).tolist() == [False]
    stopping[:, 2:] = fast[:, 2:3]  # and two are one
    assert is_dynamic(stopping, fps=8).tolist() == [True]
    with pytest.raises(ValueError, match="8 frames at fps=100 are too short"):
        is_dynamic(fast, fps=100)
    with pytest.raises(ValueError, match="fps must be a positive number, got 0"):
        is_dynamic(fast, fps=0)


def test_order_of_the_batch_dtype_and_channels_do_not_matter(moving_texture: Texture) -> None:
    videos = torch.cat([moving_texture(speed, 1, seed=speed, size=(24, 30)) for speed in range(3)])
    as_bytes = (videos * 255).round().to(torch.uint8)
    expected = dynamic_degree(videos)
    assert torch.equal(dynamic_degree(videos.flip(0)), expected.flip(0))
    assert torch.equal(dynamic_degree(as_bytes), expected)
    torch.testing.assert_close(
        dynamic_degree(as_bytes.repeat(1, 1, 3, 1, 1)), expected, rtol=0.02, atol=0
    )


def test_small_frames_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"at least 12 pixels high and wide, got \(11, 20\)"):
        dynamic_degree(torch.zeros(1, 2, 1, 11, 20))
    assert dynamic_degree(torch.zeros(1, 2, 1, 12, 12)).item() == 0
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="optical flow needs the package opencv-python-headless"):
        optical_flow(torch.zeros(1, 2, 1, 16, 16))
