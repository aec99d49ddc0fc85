"""Test the procedural video set and the space-time packing against their definitions."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.data import MovingShapes, MovingShapesConfig, pixel_shuffle_3d, pixel_unshuffle_3d

SHAPES = MovingShapes()


@pytest.fixture(scope="module")
def shapes() -> MovingShapes:
    return SHAPES


def _reference_gray(
    cfg: MovingShapesConfig, label: int, row: float, col: float, frame: int, y: int, x: int
) -> float:
    """Compute one pixel by scalar arithmetic, from the docstring of the config."""
    if label % 2 == 0:
        col += frame * cfg.speed
    else:
        row += frame * cfg.speed
    dy = min((y - row) % cfg.size, (row - y) % cfg.size)
    dx = min((x - col) % cfg.size, (col - x) % cfg.size)

    def soft(inside: float) -> float:
        return min(1.0, max(0.0, inside / cfg.softness + 0.5))

    if label // 2 == 0:
        return soft(cfg.radius - math.hypot(dy, dx))
    return max(
        soft(cfg.arm_length - dy) * soft(cfg.arm_width - dx),
        soft(cfg.arm_width - dy) * soft(cfg.arm_length - dx),
    )


def test_render_matches_scalar_reference() -> None:
    shapes = MovingShapes(MovingShapesConfig(num_frames=3, size=11, radius=2.5, speed=1.5))
    positions = torch.tensor([[0.25, 9.5], [3.0, 10.0], [7.75, 0.0], [10.5, 5.25]])
    video = shapes.render(torch.arange(4), positions) * shapes.std + shapes.mean
    for label in range(4):
        for frame in range(3):
            for y in range(11):
                for x in range(11):
                    want = _reference_gray(
                        shapes.config, label, *positions[label].tolist(), frame, y, x
                    )
                    assert video[label, frame, 0, y, x].item() == pytest.approx(want, abs=2e-6)


@given(label=st.integers(0, 3), row=st.integers(0, 11), col=st.integers(0, 11))
@settings(max_examples=60, deadline=None)
def test_motion_is_one_pixel_per_frame_and_wraps(label: int, row: int, col: int) -> None:
    video = SHAPES.render(torch.tensor([label]), torch.tensor([[row, col]]))[0, :, 0]
    axis = 1 if SHAPES.class_names[label].endswith("right") else 0
    for frame in range(video.shape[0]):
        torch.testing.assert_close(
            video[frame], torch.roll(video[0], frame, dims=axis), rtol=0, atol=1e-5
        )


def test_positions_wrap_around(shapes: MovingShapes) -> None:
    labels = torch.arange(4)
    positions = torch.tensor([[1.0, 2.0], [11.0, 0.0], [5.0, 6.0], [3.0, 9.0]])
    torch.testing.assert_close(
        shapes.render(labels, positions), shapes.render(labels, positions - 12.0), rtol=0, atol=1e-5
    )


def test_normalization_is_exact_over_the_set(shapes: MovingShapes) -> None:
    bank = shapes.templates().double()
    assert bank.shape == (4, 144, 8, 1, 12, 12)
    assert bank.mean().item() == pytest.approx(0, abs=1e-6)
    assert bank.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_templates_are_distinct_and_numbered_by_position(shapes: MovingShapes) -> None:
    bank = shapes.templates()
    flat = bank.flatten(0, 1).flatten(1)
    distances = torch.cdist(flat, flat).fill_diagonal_(math.inf)
    assert distances.min() > 3  # no two of the 576 videos are alike
    direct = shapes.render(torch.tensor([2]), torch.tensor([[7, 5]]))[0]
    torch.testing.assert_close(bank[2, 7 * 12 + 5], direct, rtol=0, atol=1e-6)
    # A cross is its own mirror image about its center.
    centered = torch.roll(direct[0, 0], (-7, -5), dims=(0, 1))
    for axis in (0, 1):
        torch.testing.assert_close(
            centered, torch.roll(centered.flip(axis), 1, dims=axis), rtol=0, atol=1e-5
        )


def test_sample_uses_only_its_generator(shapes: MovingShapes) -> None:
    before = torch.random.get_rng_state()
    first = shapes.sample(40, torch.Generator().manual_seed(5))
    again = shapes.sample(40, torch.Generator().manual_seed(5))
    other = shapes.sample(40, torch.Generator().manual_seed(6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (40, 8, 1, 12, 12) and first[0].dtype == torch.float32


def test_sample_is_uniform_over_classes_and_positions(shapes: MovingShapes) -> None:
    videos, labels = shapes.sample(8000, torch.Generator().manual_seed(0))
    bank = shapes.templates().flatten(2)
    index = torch.empty_like(labels)
    for c in range(4):
        index[labels == c] = torch.cdist(videos[labels == c].flatten(1), bank[c]).argmin(1)
    assert (videos.flatten(1) - bank[labels, index]).abs().max() < 1e-4
    counts = torch.bincount(labels * 144 + index, minlength=576).double()
    chi2 = ((counts - 8000 / 576) ** 2 / (8000 / 576)).sum().item()
    assert abs(chi2 - 575) < 5 * math.sqrt(2 * 575)


def test_sample_keeps_given_labels(shapes: MovingShapes) -> None:
    labels = torch.tensor([3, 0, 0, 2])
    videos, out = shapes.sample(4, torch.Generator().manual_seed(1), labels)
    assert torch.equal(out, labels)
    assert shapes.sample(0, torch.Generator())[0].shape == (0, 8, 1, 12, 12)
    assert videos.shape[0] == 4


def test_to_uint8(shapes: MovingShapes) -> None:
    video = shapes.render(torch.tensor([0]), torch.tensor([[5, 5]]))
    gray = shapes.to_uint8(video)
    assert gray.shape == (1, 8, 12, 12) and gray.dtype == torch.uint8
    assert gray[0, 0, 5, 5] == 255 and gray[0, 0, 11, 11] == 0
    assert shapes.to_uint8(video * 100).unique().tolist() == [0, 255]
    with pytest.raises(ValueError, match=r"\[N, F, 1, H, W\]"):
        shapes.to_uint8(video[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_frames", 0),
        ("size", 0),
        ("size", 2.5),
        ("radius", -1.0),
        ("radius", math.nan),
        ("softness", 0.0),
        ("speed", math.inf),
        ("arm_width", 5.0),
        ("size", 8),
    ],
)
def test_bad_config_names_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(MovingShapesConfig(), **{field: value})


def test_bad_render_and_sample_input(shapes: MovingShapes) -> None:
    labels, positions = torch.tensor([0, 1]), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="int64"):
        shapes.render(labels.float(), positions)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        shapes.render(torch.tensor([0, 4]), positions)
    with pytest.raises(ValueError, match="positions must be"):
        shapes.render(labels, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="finite"):
        shapes.render(labels, torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="labels must be"):
        shapes.sample(3, torch.Generator(), labels)
    with pytest.raises(ValueError, match="n must be"):
        shapes.sample(-1, torch.Generator())


@given(
    b=st.integers(0, 2),
    f=st.integers(1, 2),
    c=st.integers(1, 3),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    factor=st.tuples(*[st.integers(1, 3)] * 3),
)
@settings(max_examples=60, deadline=None)
def test_space_time_round_trip(
    b: int, f: int, c: int, h: int, w: int, factor: tuple[int, int, int]
) -> None:
    ff, fh, fw = factor
    shape = (b, f * ff, c, h * fh, w * fw)
    video = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    latents = pixel_unshuffle_3d(video, factor)
    assert latents.shape == (b, f, c * ff * fh * fw, h, w)
    assert torch.equal(pixel_shuffle_3d(latents, factor), video)
    # a permutation, hence orthogonal
    assert torch.equal(latents.flatten().sort().values, video.flatten())


def test_space_time_agrees_with_pixel_unshuffle_of_torch() -> None:
    video = torch.randn(2, 4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.pixel_unshuffle(video.flatten(0, 1), 2).unflatten(0, (2, 4))
    assert torch.equal(pixel_unshuffle_3d(video, (1, 2, 2)), want)


def test_space_time_channel_order() -> None:
    video = torch.arange(8.0).reshape(1, 2, 1, 2, 2)
    # frame, row, column; the last fastest
    assert pixel_unshuffle_3d(video).flatten().tolist() == list(range(8))


def test_space_time_errors() -> None:
    video = torch.zeros(1, 4, 1, 4, 4)
    with pytest.raises(ValueError, match="frames"):
        pixel_unshuffle_3d(video[:, :3])
    with pytest.raises(ValueError, match="width"):
        pixel_unshuffle_3d(video[..., :3])
    with pytest.raises(ValueError, match="channels"):
        pixel_shuffle_3d(video)
    with pytest.raises(ValueError, match=r"\[B, F, C, H, W\]"):
        pixel_shuffle_3d(video[0])
    with pytest.raises(ValueError, match="factor"):
        pixel_unshuffle_3d(video, (2, 0, 2))
