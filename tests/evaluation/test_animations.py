"""Read the pixels of tiles, animations and the any-step picture back."""

import io

import pytest
import torch

from anyflow.evaluation import any_step_animation, encode_animation, save_animation, tile_videos
from anyflow.evaluation.plots import METHOD_STYLES

Image = pytest.importorskip("PIL.Image")


def _pixels(image) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.size[1], image.size[0], *((3,) if image.mode == "RGB" else ()))


def test_tile_videos_places_each_pixel() -> None:
    videos = torch.randint(
        0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    canvas = tile_videos(videos, 2, 3, upscale=2, padding=3, background=9)
    assert canvas.shape == (3, 2 * 8 + 3, 3 * 12 + 6) and canvas.dtype == torch.uint8
    for i in range(5):
        top, left = i // 3 * 11, i % 3 * 15
        assert torch.equal(canvas[:, top : top + 8 : 2, left : left + 12 : 2], videos[i])
        assert torch.equal(canvas[:, top + 1 : top + 8 : 2, left + 1 : left + 12 : 2], videos[i])
    # the gap and the empty cell
    assert (canvas[:, 8:11] == 9).all() and (canvas[:, 11:, 30:] == 9).all()


def test_tile_videos_errors() -> None:
    videos = torch.zeros(5, 3, 4, 6, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not fit"):
        tile_videos(videos, 2, 2)
    with pytest.raises(ValueError, match="uint8"):
        tile_videos(videos.float(), 2, 3)
    with pytest.raises(ValueError, match="upscale"):
        tile_videos(videos, 2, 3, upscale=0)


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_animation_is_lossless_and_loops(kind: str, tmp_path) -> None:
    frames = torch.randint(
        0, 256, (5, 10, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    save_animation(tmp_path / f"a.{kind}", frames, fps=10)
    data = (tmp_path / f"a.{kind}").read_bytes()
    assert data == encode_animation(frames, format=kind, fps=10)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 5 and image.info["loop"] == 0
        for i in range(5):
            image.seek(i)
            assert torch.equal(_pixels(image.convert("L")), frames[i])


def test_animation_errors(tmp_path) -> None:
    frames = torch.zeros(2, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'webp' or 'gif'"):
        save_animation(tmp_path / "a.mp4", frames)
    with pytest.raises(ValueError, match="uint8"):
        encode_animation(frames.float())
    with pytest.raises(ValueError, match="fps"):
        encode_animation(frames, fps=0)


def _samples(
    methods: tuple[str, ...], steps: tuple[int, ...]
) -> dict[str, dict[int, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shape = (4, 3, 6, 6)
    return {
        m: {n: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for n in steps}
        for m in methods
    }


def _frames(data: bytes) -> list[torch.Tensor]:
    frames = []
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "GIF" and image.info["loop"] == 0
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(_pixels(image.convert("RGB")).long())
    return frames


def test_any_step_picture_has_a_row_for_each_method_and_a_column_for_each_number_of_steps() -> None:
    steps = (1, 2, 4, 8, 16, 32)
    samples = _samples(("on_policy", "flow_matching"), steps)
    frames = _frames(any_step_animation(samples, methods=("flow_matching", "on_policy")))
    assert len(frames) == 3
    height, width, _ = frames[0].shape
    assert 700 < width <= 800 and 300 < height < 450
    upscale = 10  # 125 pixels for two videos of 6 and the line between them
    cell, left = 2 * 6 * upscale + 2, 12
    tops = (12 + 44 + 44, 12 + 44 + 44 + cell + 6 + 44)
    for top, method in zip(tops, ("flow_matching", "on_policy"), strict=True):
        for column, n in enumerate(steps):
            x = left + column * (cell + 6)
            tiled = tile_videos(
                samples[method][n], 2, 2, upscale=upscale, padding=2, background=110
            )
            for frame, wanted in zip(frames, tiled, strict=True):
                shown = frame[top : top + cell, x : x + cell]
                assert torch.equal(shown[..., 0], shown[..., 1])
                # the palette has every third gray
                assert (shown[..., 0] - wanted.long()).abs().max() <= 1
    # each name in its color
    for top, method in zip(tops, ("flow_matching", "on_policy"), strict=True):
        color = torch.tensor([int(METHOD_STYLES[method][1][i : i + 2], 16) for i in (1, 3, 5)])
        assert (frames[0][top - 44 : top] == color).all(-1).sum() > 50
    # as white as the page it stands on
    assert (frames[0][:8] == 255).all() and (frames[0][:, :8] == 255).all()
    header = frames[0][12 : 12 + 30, :, 0] < 100
    assert all(
        header[:, left + c * (cell + 6) : left + c * (cell + 6) + cell].any()
        for c in range(len(steps))
    )


def test_any_step_picture_takes_every_method_and_stays_within_the_width() -> None:
    frames = _frames(any_step_animation(_samples(("a", "b", "c"), (1, 4)), width=200))
    assert frames[0].shape[1] <= 200 and len(frames) == 3


def test_any_step_picture_errors() -> None:
    samples = _samples(("a", "b"), (1, 2))
    with pytest.raises(ValueError, match="samples must have videos of each"):
        any_step_animation(samples, methods=("a", "c"))
    with pytest.raises(ValueError, match="samples must have videos of each"):
        any_step_animation({})
    with pytest.raises(ValueError, match="same step counts"):
        any_step_animation({"a": samples["a"], "b": {1: samples["b"][1]}})
    with pytest.raises(ValueError, match="one shape"):
        any_step_animation({"a": {1: samples["a"][1], 2: samples["a"][2][:, :2]}})
    with pytest.raises(ValueError, match="width 30 has no room"):
        any_step_animation(samples, width=30)
