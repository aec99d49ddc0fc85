"""Measure the motion of videos of a few pixels, whose speed is known, and of larger ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anyflow.data import MovingShapes
from anyflow.data.moving_shapes import MovingShapesConfig
from anyflow.evaluation.video_metrics import flicker, motion


def _shapes(speed: float, n: int = 64) -> Tensor:
    """Return gray levels ``[n, 8, 1, 12, 12]`` of the demo's videos at another speed."""
    shapes = MovingShapes(MovingShapesConfig(speed=speed))
    labels = torch.arange(4).repeat_interleave(n // 4)
    videos, _ = shapes.sample(n, torch.Generator().manual_seed(0), labels)
    return (videos * shapes.std + shapes.mean).clamp(0, 1)


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_it_is_the_speed_of_the_moving_shapes(speed: float) -> None:
    found = motion(_shapes(speed))
    assert found.mean().item() == pytest.approx(speed, rel=0.08)
    assert found.std() < 0.08 * speed  # of any shape, direction and position


def test_it_follows_speed_where_the_difference_of_frames_follows_contrast() -> None:
    real, pale = _shapes(1.0), _shapes(1.0) * 0.4
    torch.testing.assert_close(motion(pale), motion(real), rtol=0.01, atol=0)
    torch.testing.assert_close(flicker(pale), flicker(real) * 0.4)
    assert motion(_shapes(3.0)).mean() > 2.7 * motion(real).mean()
    assert flicker(_shapes(3.0)).mean() < 2.7 * flicker(real).mean()
    noise = 0.1 * torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    frozen = (real[:, :1].expand_as(real) + noise).clamp(0, 1)
    assert flicker(frozen).mean() > flicker(real).mean()  # noise in place of motion
    assert motion(frozen).mean() < 0.5 * motion(real).mean()


def test_frozen_flat_and_half_frozen_videos() -> None:
    real = _shapes(1.0)
    assert motion(real[:, :1].expand_as(real)).abs().max() == 0
    assert motion(torch.full((2, 4, 3, 8, 8), 0.5)).tolist() == [0, 0]
    # flat, and brighter
    assert motion(torch.linspace(0, 1, 4).view(1, 4, 1, 1, 1).expand(1, 4, 1, 8, 8)).item() == 0
    stopping = torch.cat([real[:, :5], real[:, 4:5].expand(-1, 3, -1, -1, -1)], dim=1)
    torch.testing.assert_close(
        motion(stopping).mean(), motion(real).mean() * 4 / 7, rtol=0.08, atol=0
    )


@pytest.mark.parametrize(("right", "down"), [(0.5, 0.0), (-3.0, 2.0), (6.0, 8.0)])
def test_textures_from_coarse_to_fine(
    moving_texture: Callable[..., Tensor], right: float, down: float
) -> None:
    video = moving_texture(right, down, size=(96, 128), frames=3)
    assert motion(video).item() == pytest.approx((right**2 + down**2) ** 0.5, rel=0.03)


def test_parts_that_move_apart_do_not_cancel(moving_texture: Callable[..., Tensor]) -> None:
    video = torch.cat([moving_texture(1.5, 0), moving_texture(-1.5, 0)], dim=-1)
    assert motion(video).item() == pytest.approx(1.5, rel=0.1)


def test_order_of_the_batch_dtype_and_channels_do_not_matter() -> None:
    videos = torch.cat([_shapes(speed, 4) for speed in (0.0, 1.0, 2.0)])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(motion(videos[order]), motion(videos)[order], rtol=1e-4, atol=1e-6)
    as_bytes = (videos * 255).round().to(torch.uint8)
    torch.testing.assert_close(
        motion(as_bytes), motion(as_bytes.double() / 255), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(motion(as_bytes), motion(videos), rtol=0.02, atol=1e-6)
    torch.testing.assert_close(
        motion(as_bytes.repeat(1, 1, 3, 1, 1)), motion(as_bytes), rtol=1e-3, atol=1e-6
    )


def test_a_long_video_is_the_mean_of_its_parts(moving_texture: Callable[..., Tensor]) -> None:
    """Cut the work into pieces of 2^18 pixels: 6 pairs of 212 x 216 pixels are more."""
    video = moving_texture(1.5, -1.0, size=(212, 216), frames=7)
    video[:, 4:] = video[:, 4:5]
    parts = [motion(video[:, :4]), motion(video[:, 3:5]), motion(video[:, 4:])]
    expected = (3 * parts[0] + parts[1] + 2 * parts[2]) / 6
    torch.testing.assert_close(motion(video), expected, rtol=1e-5, atol=0)
    assert parts[2].item() == 0 < parts[1].item()


def test_too_little_to_see() -> None:
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        motion(torch.zeros(1, 1, 1, 8, 8))
    with pytest.raises(ValueError, match="at least 4 pixels"):
        motion(torch.zeros(1, 2, 1, 3, 8))
