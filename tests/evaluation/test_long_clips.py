"""Read the pixels of a picture of long clips back, and the lines of its figure."""

import io

import pytest
import torch

from anyflow.evaluation.animations import animation_still
from anyflow.evaluation.long_clips import long_clip_animation, over_time_figure

Image = pytest.importorskip("PIL.Image")


def columns(frames: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gray = torch.randint(0, 29, (2, 4, frames, 12, 12), generator=generator)
    return dict(zip(("1 step", "real"), (9 * gray).byte(), strict=True))


def is_color(pixel: tuple[int, ...]) -> bool:
    return max(pixel) - min(pixel) > 100


def test_each_frame_shows_its_videos_and_the_chunks_made_so_far() -> None:
    videos = columns()
    data = long_clip_animation(videos, chunk_frames=2, training_frames=4, width=400)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.n_frames == 8 and picture.info["loop"] == 0 and picture.size[0] <= 400
        for frame in range(8):
            picture.seek(frame)
            image = picture.convert("RGB")
            upscale = (image.size[0] - 2 * 12 - 14 - 2 * 2) // (4 * 12)
            for row in range(12):
                # the first video is at the corner of the first column
                assert (
                    image.getpixel((12, 52 + upscale * row))[0]
                    == videos["1 step"][0, frame, row, 0]
                )
            top = 52 + 2 * 12 * upscale + 2 + 14
            quarter = (image.size[0] - 24) / 4
            boxes = [image.getpixel((round(12 + quarter * (c + 0.5)), top + 9)) for c in range(4)]
            assert [box != (255, 255, 255) for box in boxes] == [c <= frame // 2 for c in range(4)]
            assert not any(map(is_color, boxes[:2])), "training clips are gray"
            assert all(map(is_color, boxes[2 : frame // 2 + 1])), "longer ones are not"
        last = image
    with Image.open(io.BytesIO(animation_still(data))) as still:
        assert still.convert("RGB").tobytes() == last.tobytes()


def test_videos_that_make_no_picture_are_refused() -> None:
    videos = columns()
    with pytest.raises(ValueError, match="one shape"):
        long_clip_animation({**videos, "x": videos["real"][:1]}, chunk_frames=2, training_frames=4)
    with pytest.raises(ValueError, match="whole chunks of 3"):
        long_clip_animation(videos, chunk_frames=3, training_frames=3)
    with pytest.raises(ValueError, match="no longer, got 10"):
        long_clip_animation(videos, chunk_frames=2, training_frames=10)
    with pytest.raises(ValueError, match="no room for 2 columns"):
        long_clip_animation(videos, chunk_frames=2, training_frames=4, width=40)


def test_the_figure_has_a_line_for_each_curve_and_one_where_training_clips_end() -> None:
    pytest.importorskip("matplotlib")
    curves = {"1": {8: 0.5, 10: 0.75, 16: 1.0}, "4": {8: 0.25, 10: 0.25, 16: 0.5}}
    labels = {"1": "1 step", "4": "4 steps"}
    figure = over_time_figure(curves, training_frames=8, labels=labels, floor=0.1, title="score")
    lines = figure.axes[0].get_lines()
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
    assert drawn[:2] == [([8, 10, 16], [0.5, 0.75, 1.0]), ([8, 10, 16], [0.25, 0.25, 0.5])]
    assert drawn[2][0] == [8, 8]
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"1 step", "4 steps", "training clips end here"} <= texts
    linear = over_time_figure(curves, training_frames=8, labels=labels, top=2.0)
    assert linear.axes[0].get_ylim() == (0.0, 2.0)
    with pytest.raises(ValueError, match="at least one line"):
        over_time_figure({}, training_frames=8, labels={})
