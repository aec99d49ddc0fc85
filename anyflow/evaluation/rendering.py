"""Share what the HTML reports need: templates, charts inside of a page, numbers for tables."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow.evaluation.plot_parts import BAND, FAINT, INK
from anyflow.evaluation.plots import DARK_COLORS, figure_svg
from anyflow.evaluation.wording import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(template: str, values: Mapping[str, Any], *, colors: Mapping[str, str]) -> str:
    """Render a page from the file ``template``.

    Args:
        template: a file of ``templates`` that extends ``base.html.j2``.
        values: the template's variables, by name.
        colors: CSS variables of the lines, ``{name: color}``; dark mode has colors of its own.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, figures=figures, duration=duration, decimals=decimals)
    dark = {name: DARK_COLORS[color] for name, color in colors.items()}
    return environment.get_template(template).render(dict(values), colors=colors, dark_colors=dark)


def chart(figure: Figure, *, label: str, kind: str, salt: str, colors: Mapping[str, str]) -> str:
    """Return a figure as SVG text for a page, with CSS variables for colors and a name.

    Args:
        figure: the figure to draw.
        label: plain text that says what the chart shows to those who do not see it.
        kind: CSS class, for ``wide`` pages, ``narrow`` ones, or ``any``.
        salt: keeps the ids of the charts of a page apart.
        colors: CSS variables of the lines, ``{name: color}``.
    """
    from html import escape

    svg = figure_svg(figure, salt=salt)
    start, end = svg.index("<svg"), svg.index(">", svg.index("<svg"))
    head = svg[start:end]
    view_box = head[head.index("viewBox") :].split('"')[1]
    body = svg[end:].replace("xlink:href", "href")
    for name, color in {"ink": INK, "muted": FAINT, "band": BAND, **colors}.items():
        body = body.replace(color, f"var(--{name})")
    body = body.replace("#ffffff", "var(--card)")
    return f'<svg class="{kind}" viewBox="{view_box}" role="img" aria-label="{escape(label)}"{body}'


def data_uri(content: bytes, media_type: str = "image/webp") -> str:
    """Return a file as an address that a page can hold."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def figures(value: float) -> str:
    """Return a metric for a table: three significant digits, trailing zeros kept."""
    return "0" if value == 0 else f"{value:#.3g}".rstrip(".")


def decimals(value: float, count: int) -> str:
    """Return a number with ``count`` decimals and a minus sign that is as wide as a plus sign."""
    text = f"{value:.{count}f}"
    return f"−{text[1:]}" if text.startswith("-") and float(text) != 0 else text.lstrip("-")


def duration(seconds: float) -> str:
    """Return seconds for a reader: ``0.4 s``, ``12 s``, ``5 min 03 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
