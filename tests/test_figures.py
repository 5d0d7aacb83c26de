"""Figures: whole SVG text that a page can hold, the same each time."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from optpipe.report.figures import Point, figure_svg, scatter_svg, surface_svg
from optpipe.types import Curve, Figure, Surface

SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True, slots=True)
class Grid:
    x: tuple[float, ...]
    y: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]


def bowl(middle: float = 0.0) -> Grid:
    axis = tuple(float(step) for step in np.linspace(-0.1, 0.1, 7))
    rows = tuple(tuple(100 * (x * x + 3 * y * y) for x in axis) for y in axis)
    values = tuple(tuple(middle if i == j == 3 else rows[j][i] for i in range(7)) for j in range(7))
    return Grid(axis, axis, values)


def dots(count: int = 5) -> list[Point]:
    return [Point(0.1 + 0.1 * i, float(i % 3), "L1" if i % 2 else "random") for i in range(count)]


def fitted(middle: float | None = 1.0) -> Figure:
    """A fitted curve with its points and the optimum, over a surface."""
    curves = (
        Curve("depth", (0.4, 0.7, 1.0), (0.5, 0.8, 0.9)),
        Curve("depth", (0.4, 1.0), (0.52, 0.88), "dots"),
        Curve("optimum", (0.6,), (0.7,), "dots"),
    )
    rows = ((0.0, 1.0, 2.0), (1.0, middle, 3.0), (2.0, 3.0, 4.0))
    surface = Surface((0.4, 0.7, 1.0), (0.4, 0.7, 1.0), rows, "latency, ms")
    return Figure("accuracy & latency", "width w", "depth d", curves, surface)


def words(svg: str) -> str:
    """All text that the figure shows."""
    return "\n".join(
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")
    )


def legend_is_in_the_axes(count: int) -> bool:
    curves = tuple(
        Curve(f"curve {number}", (0.0, 1.0), (0.0, float(number)), "line") for number in range(count)
    )
    page = ElementTree.fromstring(figure_svg(Figure("t", "x", "y", curves)))
    assert page.find(".//*[@id='legend_1']") is not None
    axes = page.find(".//*[@id='axes_1']")
    return axes is not None and axes.find(".//*[@id='legend_1']") is not None


def test_a_long_legend_stands_below_the_axes() -> None:
    assert legend_is_in_the_axes(4)
    assert not legend_is_in_the_axes(5)


def test_ticks_are_strokes_of_their_own() -> None:
    drawn = figure_svg(Figure("t", "x", "y", (Curve("timed", (1.0, 2.0), (0.5, 0.5), "ticks"),)))
    strokes = ElementTree.fromstring(drawn).find(".//*[@id='ticks0']")
    assert strokes is not None
    assert len(strokes.findall(f".//{SVG}use")) == 2


def test_a_surface_is_one_svg_element_with_its_labels() -> None:
    svg = surface_svg(bowl(), "a network & its loss", x_label="along g", value_label="cross-entropy")
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    title = root.find(f"{SVG}title")
    assert title is not None and title.text == "a network & its loss"
    for word in ("a network & its loss", "along g", "random direction", "cross-entropy"):
        assert word in words(svg)


def test_an_interval_is_a_thin_grey_line_beside_what_it_belongs_to() -> None:
    curves = (
        Curve("network", (0.5,), (0.9,), "dots"),
        Curve("95% interval", (0.5, 0.5), (0.8, 1.0), "interval"),
    )
    root = ElementTree.fromstring(figure_svg(Figure("accuracy", "latency", "top1", curves)))
    (drawn,) = [group for group in root.iter(f"{SVG}g") if group.get("id") == "interval1"]
    (path,) = drawn.iter(f"{SVG}path")
    assert "stroke: #7f7f7f; stroke-width: 0.8" in path.get("style", "")


def test_a_scatter_has_its_labels_groups_and_note() -> None:
    svg = scatter_svg(dots(), "Fig. 2", x_label="validation loss", y_label="potential loss", note="r = 0.50")
    for word in ("Fig. 2", "r = 0.50", "validation loss", "potential loss", "L1", "random"):
        assert word in words(svg)
    assert "off the axes" not in words(svg)


def test_a_figure_has_its_labels_its_legend_and_a_colour_bar() -> None:
    svg = figure_svg(fitted())
    title = ElementTree.fromstring(svg).find(f"{SVG}title")
    assert title is not None and title.text == "accuracy & latency"
    for word in ("accuracy & latency", "width w", "depth d", "latency, ms", "optimum"):
        assert word in words(svg).splitlines()


def drawn_in(svg: str, gid: str) -> str:
    """The SVG of one curve."""
    root = ElementTree.fromstring(svg)
    (found,) = [element for element in root.iter(f"{SVG}g") if element.get("id") == gid]
    return ElementTree.tostring(found, encoding="unicode")


def test_curves_of_one_name_share_a_colour_and_a_line_in_the_legend() -> None:
    svg = figure_svg(fitted())
    assert words(svg).splitlines().count("depth") == 1
    assert "#0072b2" in drawn_in(svg, "line0") and "#0072b2" in drawn_in(svg, "points1")
    assert "#d55e00" in drawn_in(svg, "points2") and "#0072b2" not in drawn_in(svg, "points2")
    assert dots_of(svg) == [2, 1]


def test_names_differ_by_marker_and_by_dashes_too() -> None:
    lines = tuple(Curve(name, (0.0, 1.0), (0.0, 1.0)) for name in "ab")
    svg = figure_svg(Figure("t", "x", "y", lines))
    assert "dasharray" not in drawn_in(svg, "line0") and "dasharray" in drawn_in(svg, "line1")


def test_curves_without_a_name_have_no_legend() -> None:
    def drawn(name: str) -> str:
        return figure_svg(Figure("t", "x", "y", (Curve(name, (0.0, 1.0), (0.0, 1.0)),)))

    assert 'id="legend' in drawn("depth")
    assert 'id="legend' not in drawn("")


@pytest.mark.parametrize("name", ["a<b> & 'c' \"d\" --> -", "$5 and $6", r"\$\frac{$", "_τ(B) 測定 %s {x}"])
def test_text_is_shown_as_it_is(name: str) -> None:
    curves = (Curve(name, (0.0, 1.0), (0.0, 1.0)),)
    surface = Surface((0.0, 1.0), (0.0, 1.0), ((0.0, 1.0), (1.0, 2.0)), name)
    svg = figure_svg(Figure(name, name, name, curves, surface))
    assert words(svg).splitlines().count(name) == 5


def test_what_xml_cannot_hold_becomes_a_space() -> None:
    curves = (Curve("a\x00b\x1bc\ud800d\ne", (0.0, 1.0), (0.0, 1.0)),)
    svg = figure_svg(Figure("a\x00b", "x\uffff", "y", curves))
    assert {"a b c d e", "a b", "x "} <= set(words(svg).splitlines())


def test_a_long_title_is_broken_into_lines() -> None:
    lines = words(figure_svg(Figure("accuracy " * 20, "x", "y"))).splitlines()
    assert max(len(line) for line in lines) <= 60
    assert "".join(lines).count("accuracy") == 20


def test_what_a_surface_does_not_hold_is_left_white() -> None:
    hole = bowl(math.nan)
    rows = tuple(tuple(None if math.isnan(value) else value for value in row) for row in hole.values)
    network = Curve("", (0.0,), (0.0,), "dots")
    surface = Surface(hole.x, hole.y, rows, "loss")
    drawn = Figure("t", "gradient direction", "random direction", (network,), surface)
    assert figure_svg(drawn) == surface_svg(hole, "t") != surface_svg(bowl(), "t")
    assert figure_svg(fitted(None)) != figure_svg(fitted())


def test_a_surface_of_nothing_is_white() -> None:
    nothing = Surface((0.0, 1.0), (0.0, 1.0), ((None, None), (None, None)), "ms")
    assert "no latency" in words(figure_svg(Figure("no latency", "x", "y", surface=nothing)))


def dots_of(svg: str) -> list[int]:
    """How many dots each group has."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return [
        len(list(group.iter(f"{SVG}use"))) for group in groups if group.get("id", "").startswith("points")
    ]


def test_each_point_is_a_dot_of_its_group() -> None:
    assert dots_of(scatter_svg(dots(5), "t", x_label="x", y_label="y")) == [3, 2]
    assert dots_of(scatter_svg(dots(6), "t", x_label="x", y_label="y")) == [3, 3]


def test_points_that_no_axis_holds_are_counted_not_hidden() -> None:
    points = [*dots(4), Point(math.nan, 1.0), Point(0.0, 1.0)]
    straight = scatter_svg(points, "t", x_label="x", y_label="y")
    assert "1 of 6 points are off the axes" in words(straight)
    assert sum(dots_of(straight)) == 5
    logarithmic = scatter_svg(points, "t", x_label="x", y_label="y", log_x=True)
    assert "2 of 6 points are off the axes" in words(logarithmic)


@pytest.mark.parametrize("middle", [math.nan, math.inf])
def test_a_surface_may_have_holes(middle: float) -> None:
    svg = surface_svg(bowl(middle), "t")
    assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
    assert svg != surface_svg(bowl(), "t")


@pytest.mark.parametrize("value", [0.0, 2.5, math.nan])
def test_a_flat_surface_is_drawn_too(value: float) -> None:
    svg = surface_svg(Grid((-1.0, 1.0), (-1.0, 1.0), ((value, value), (value, value))), "flat")
    assert "flat" in words(svg)


def test_limits_are_the_ends_of_the_colour_scale() -> None:
    assert "40" in words(surface_svg(bowl(), "t", limits=(0.0, 40.0))).split()
    assert "40" not in words(surface_svg(bowl(), "t")).split()


def every() -> tuple[str, ...]:
    """A figure of each kind."""
    scatter = scatter_svg(dots(), "t", x_label="x", y_label="y")
    return surface_svg(bowl(), "t"), scatter, figure_svg(fitted())


def test_the_same_numbers_give_the_same_bytes_in_any_style() -> None:
    before = dict(matplotlib.rcParams)
    first = every()
    with matplotlib.rc_context({"font.size": 30.0, "lines.linewidth": 9.0}):
        second = every()
        assert matplotlib.rcParams["font.size"] == 30.0
    assert first == second
    assert dict(matplotlib.rcParams) == before


def test_nothing_outside_the_text_is_needed() -> None:
    for svg in every():
        links = [
            value
            for element in ElementTree.fromstring(svg).iter()
            for name, value in element.attrib.items()
            if name.endswith("href")
        ]
        assert all(link.startswith("#") for link in links)
        assert "url(" not in svg.replace("url(#", "")
        assert "<!DOCTYPE" not in svg


def test_matplotlib_comes_in_only_when_a_figure_is_drawn() -> None:
    code = "import sys, optpipe.report.figures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
