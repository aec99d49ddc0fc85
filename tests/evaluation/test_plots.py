"""Figures and animations: what they draw is read back and compared with what went in."""

import io
import itertools
import math
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.evaluation import any_step_figure, encode_animation, save_animation, save_figure, tile_videos
from anyflow.evaluation.plots import METHOD_STYLES, figure_svg, spread

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

CURVES = {
    "flow_matching": {1: 54.0, 2: 8.0, 4: 0.34, 8: 0.2, 16: 0.18, 32: 0.17},
    "on_policy": {1: 0.82, 2: 0.36, 4: 0.4, 8: 0.33, 16: 0.32, 32: 0.32},
    "my_method": {1: 1.0, 2: 0.9, 4: 0.8, 8: 0.7, 16: 0.6, 32: 0.31},
}


def test_figure_holds_the_data() -> None:
    axes = any_step_figure(CURVES, floor=0.16, ylabel="FD").axes[0]
    drawn = [dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines]
    assert drawn == list(CURVES.values())
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 3
    low, high = axes.get_ylim()
    assert low < 0.16 and high > 54
    (band,) = axes.patches
    assert band.get_y() + band.get_height() == pytest.approx(0.16)


def test_svg_is_xml_with_labels_and_repeatable() -> None:
    svg = figure_svg(any_step_figure(CURVES, floor=0.16, ylabel="Distance"))
    texts = {"".join(node.itertext()).strip() for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {"flow matching", "flow map, stage 2", "my method", "Distance", "real vs real: 0.16", "1", "32"} <= texts
    assert svg == figure_svg(any_step_figure(CURVES, floor=0.16, ylabel="Distance"))
    assert "<metadata" not in svg


def test_zero_floor_is_said_in_words() -> None:
    axes = any_step_figure(CURVES, floor=0.0).axes[0]
    assert not axes.patches
    assert "real videos: 0" in [t.get_text() for t in axes.texts]


def test_figure_with_zeros_and_one_step() -> None:
    svg = figure_svg(any_step_figure({"on_policy": {4: 0.0}}, floor=0.0))
    assert ET.fromstring(svg).tag.endswith("svg")


def test_save_figure(tmp_path) -> None:
    save_figure(any_step_figure(CURVES), tmp_path / "curve.png", dpi=100)
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.size == (760, 430)


@pytest.mark.parametrize(
    ("curves", "floor", "match"),
    [
        ({}, None, "at least one method"),
        ({"a": {}}, None, "'a'"),
        ({"a": {0: 1.0}}, None, "step counts"),
        ({"a": {1: math.nan}}, None, "finite"),
        ({"a": {1: -1.0}}, None, ">= 0"),
        ({"a": {1: 1.0}}, -0.1, "floor"),
    ],
)
def test_figure_errors(curves: dict, floor: float | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        any_step_figure(curves, floor=floor)


@given(positions=st.lists(st.floats(0, 1), min_size=1, max_size=6), gap=st.floats(0.01, 0.15))
@settings(deadline=None)
def test_spread_keeps_order_and_distance(positions: list[float], gap: float) -> None:
    placed = spread(sorted(positions), gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(placed))
    assert min(placed) >= -1e-9 and max(placed) <= 1 + 1e-9
    if all(b - a >= gap for a, b in itertools.pairwise(sorted(positions))):
        assert placed == pytest.approx(sorted(positions))


def test_tile_videos_places_each_pixel() -> None:
    videos = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    canvas = tile_videos(videos, 2, 3, upscale=2, padding=3, background=9)
    assert canvas.shape == (3, 2 * 8 + 3, 3 * 12 + 6) and canvas.dtype == torch.uint8
    for i in range(5):
        top, left = i // 3 * 11, i % 3 * 15
        assert torch.equal(canvas[:, top : top + 8 : 2, left : left + 12 : 2], videos[i])
        assert torch.equal(canvas[:, top + 1 : top + 8 : 2, left + 1 : left + 12 : 2], videos[i])
    assert (canvas[:, 8:11] == 9).all() and (canvas[:, 11:, 30:] == 9).all()  # the gap and the empty cell


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
    frames = torch.randint(0, 256, (5, 10, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    save_animation(tmp_path / f"a.{kind}", frames, fps=10)
    data = (tmp_path / f"a.{kind}").read_bytes()
    assert data == encode_animation(frames, format=kind, fps=10)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 5 and image.info["loop"] == 0
        for i in range(5):
            image.seek(i)
            assert torch.equal(torch.tensor(list(image.convert("L").tobytes())).view(10, 14).byte(), frames[i])


def test_animation_errors(tmp_path) -> None:
    frames = torch.zeros(2, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'webp' or 'gif'"):
        save_animation(tmp_path / "a.mp4", frames)
    with pytest.raises(ValueError, match="uint8"):
        encode_animation(frames.float())
    with pytest.raises(ValueError, match="fps"):
        encode_animation(frames, fps=0)


def test_every_method_has_its_own_look() -> None:
    assert len({style[1] for style in METHOD_STYLES.values()}) == len({s[2] for s in METHOD_STYLES.values()}) == 4
