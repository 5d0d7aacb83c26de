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

from optpipe.report.figures import Point, scatter_svg, surface_svg

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


def words(svg: str) -> str:
    """All text that the figure shows."""
    return "\n".join(
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")
    )


def test_a_surface_is_one_svg_element_with_its_labels() -> None:
    svg = surface_svg(bowl(), "a network & its loss", x_label="along g", value_label="cross-entropy")
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    title = root.find(f"{SVG}title")
    assert title is not None and title.text == "a network & its loss"
    for word in ("a network & its loss", "along g", "random direction", "cross-entropy"):
        assert word in words(svg)


def test_a_scatter_has_its_labels_groups_and_note() -> None:
    svg = scatter_svg(dots(), "Fig. 2", x_label="validation loss", y_label="potential loss", note="r = 0.50")
    for word in ("Fig. 2", "r = 0.50", "validation loss", "potential loss", "L1", "random"):
        assert word in words(svg)
    assert "off the axes" not in words(svg)


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
    assert "36" in words(surface_svg(bowl(), "t", limits=(0.0, 40.0))).split()
    assert "36" not in words(surface_svg(bowl(), "t")).split()


def test_the_same_numbers_give_the_same_bytes_in_any_style() -> None:
    before = dict(matplotlib.rcParams)
    first = surface_svg(bowl(), "t"), scatter_svg(dots(), "t", x_label="x", y_label="y")
    with matplotlib.rc_context({"font.size": 30.0, "lines.linewidth": 9.0}):
        second = surface_svg(bowl(), "t"), scatter_svg(dots(), "t", x_label="x", y_label="y")
        assert matplotlib.rcParams["font.size"] == 30.0
    assert first == second
    assert dict(matplotlib.rcParams) == before


def test_nothing_outside_the_text_is_needed() -> None:
    for svg in (surface_svg(bowl(), "t"), scatter_svg(dots(), "t", x_label="x", y_label="y")):
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
