"""Read back what figures draw, and compare it with what went in."""

import itertools
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.evaluation import any_step_figure, save_figure
from anyflow.evaluation.plot_parts import spread
from anyflow.evaluation.plots import DARK_COLORS, METHOD_STYLES, figure_svg, method_style

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
    assert (
        len({line.get_color() for line in axes.lines})
        == len({line.get_marker() for line in axes.lines})
        == 3
    )
    low, high = axes.get_ylim()
    assert low < 0.16 and high > 54
    (band,) = axes.patches
    assert band.get_y() + band.get_height() == pytest.approx(0.16)


def test_svg_is_xml_with_labels_and_repeatable() -> None:
    svg = figure_svg(any_step_figure(CURVES, floor=0.16, ylabel="Distance"))
    texts = {
        "".join(node.itertext()).strip()
        for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    }
    assert {
        "plain flow matching",
        "flow map",
        "my method",
        "Distance",
        "real videos against each other: 0.16",
        "1",
        "32",
    } <= texts
    assert svg == figure_svg(any_step_figure(CURVES, floor=0.16, ylabel="Distance"))
    assert "<metadata" not in svg


def test_zero_floor_is_said_in_words() -> None:
    axes = any_step_figure(CURVES, floor=0.0).axes[0]
    assert not axes.patches
    assert "real videos: 0" in [t.get_text() for t in axes.texts]


@pytest.mark.parametrize("log", [True, False])
def test_reference_is_a_dashed_line_at_its_value(log: bool) -> None:
    axes = any_step_figure(CURVES, reference=60.0, log=log).axes[0]
    line = axes.lines[-1]
    assert set(line.get_ydata()) == {60.0} and line.get_linestyle() == "--" and len(axes.lines) == 4
    assert "real videos (dashed): 60" in [t.get_text() for t in axes.texts]
    assert axes.get_ylim()[1] > 60 and not axes.patches


def test_error_bars_reach_from_the_lowest_to_the_highest_seed() -> None:
    ranges = {
        m: {n: (v / (i + 2), v * (i + 3)) for n, v in c.items()}
        for i, (m, c) in enumerate(CURVES.items())
    }
    axes = any_step_figure(CURVES, ranges=ranges).axes[0]
    assert len(axes.containers) == 3
    for bars, line, (method, curve) in zip(
        axes.containers, axes.lines[:1], CURVES.items(), strict=False
    ):
        (segments,) = bars[2]
        drawn = [(x, low, high) for (x, low), (_, high) in segments.get_segments()]
        assert [(low, high) for _, low, high in drawn] == [
            pytest.approx(ranges[method][n]) for n in sorted(curve)
        ]
        assert [x for x, _, _ in drawn] == pytest.approx(list(line.get_xdata()))
    columns = [[segment[0][0] for segment in bars[2][0].get_segments()] for bars in axes.containers]
    for beside, n in zip(zip(*columns, strict=True), CURVES["flow_matching"], strict=True):
        # beside each other, near their step
        assert len(set(beside)) == 3 and all(abs(x / n - 1) < 0.1 for x in beside)
    low, high = axes.get_ylim()
    assert low < min(r[0] for c in ranges.values() for r in c.values())
    assert high > max(r[1] for c in ranges.values() for r in c.values())


def test_bands_reach_over_their_ranges_and_one_point_has_a_bar() -> None:
    curves = {"a": {1: 2.0, 4: 3.0}, "b": {4: -1.0}}
    ranges = {"a": {1: (1.5, 2.5), 4: (2.0, 3.5)}, "b": {4: (-1.5, -0.5)}}
    styles = {"a": ("A", "#0b66c3", "o"), "b": ("B", "#c2540a", "s")}
    axes = any_step_figure(curves, ranges=ranges, styles=styles, bands=True, signed=True).axes[0]
    (band,) = [c for c in axes.collections if hasattr(c, "get_paths") and c.get_alpha() == 0.16]
    (path,) = band.get_paths()
    assert {tuple(point) for point in path.vertices} >= {(1, 1.5), (1, 2.5), (4, 2.0), (4, 3.5)}
    assert len(axes.containers) == 1
    (segment,) = axes.containers[0][2][0].get_segments()
    assert [y for _, y in segment] == [-1.5, -0.5]
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] < -1.5 and axes.get_ylim()[1] > 3.5
    assert axes.lines[0].get_color() == "#0b66c3"
    low, high = any_step_figure({"a": {1: 30.0, 2: 30.001}}, signed=True).axes[0].get_ylim()
    assert high - low > 2  # no axis of digits that nobody can tell apart


def test_linear_axis_begins_at_zero() -> None:
    axes = any_step_figure(CURVES, log=False, floor=0.1).axes[0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 54


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ({}, "'a' needs"),
        ({"a": {1: (1.0, 2.0)}}, "'a' needs"),
        ({"a": {1: (1.1, 2.0), 2: (1.0, 2.0)}}, "at 1 steps must hold its value"),
        ({"a": {1: (1.0, 2.0), 2: (1.0, math.inf)}}, "at 2 steps must hold its value"),
    ],
)
def test_range_errors(ranges: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        any_step_figure({"a": {1: 1.0, 2: 2.0}}, ranges=ranges)


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
        ({"a": {1: 1.0}}, -0.1, "floor must be"),
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


def test_every_method_has_its_own_look() -> None:
    spare = [method_style("mine", rank)[1] for rank in range(4)]
    assert set(DARK_COLORS) == {style[1] for style in METHOD_STYLES.values()} | set(spare)
    assert (
        len({style[1] for style in METHOD_STYLES.values()})
        == len({s[2] for s in METHOD_STYLES.values()})
        == 4
    )
