"""Figures as SVG text: the same numbers give the same bytes, and nothing outside the text is referred to.

Needs no display: matplotlib's figures are drawn by its SVG canvas, without pyplot's global state, and
whatever style the user has set is left aside and put back. matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from optpipe.types import Curve, Figure, Surface

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Page

_LEVELS = 20
_INSIDE = 4
"""A legend of more names stands below the axes."""
_TITLE_WIDTH = 60
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":")
# Readable in print and by the colour-blind: Okabe and Ito's palette, without its yellow.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_GREY = "#7f7f7f"


class Grid(Protocol):
    """Values over two axes: ``values[j][i]`` belongs to x[i] and y[j]."""

    @property
    def x(self) -> Sequence[float]:
        """Where the columns are, ascending."""

    @property
    def y(self) -> Sequence[float]:
        """Where the rows are, ascending."""

    @property
    def values(self) -> Sequence[Sequence[float]]:
        """One row for each y; what is not finite is left white."""


@dataclass(frozen=True, slots=True)
class Point:
    """A dot; each ``group`` has a colour and a marker of its own and a line in the legend."""

    x: float
    y: float
    group: str = ""


def figure_svg(
    figure: Figure,
    *,
    notes: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
    log_x: bool = False,
) -> str:
    """A figure: its curves, over the contours of its surface, at least 2 x 2, where it has one.

    Curves of one name share a colour and a line in the legend, which "" has not; names differ by marker and
    by dashes too. ``notes`` stand below the title. ``limits`` are the values of the surface's darkest and
    lightest colour, by default its own; values beyond them have the colour of the limit. ``log_x`` spaces x
    by its logarithm.
    """
    with _style():
        page, axes = _empty()
        if figure.surface is None:
            axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        else:
            _draw_surface(page, axes, figure.surface, limits)
        _draw_curves(page, axes, figure.curves)
        if log_x:
            axes.set_xscale("log")
        title = textwrap.wrap(_plain(figure.title), _TITLE_WIDTH)
        axes.set_title("\n".join([*title, *map(_plain, notes)]), fontsize="medium")
        axes.set_xlabel(_plain(figure.x_label))
        axes.set_ylabel(_plain(figure.y_label))
        return _text(page, figure.title)


def surface_svg(
    surface: Grid,
    title: str,
    *,
    x_label: str = "gradient direction",
    y_label: str = "random direction",
    value_label: str = "loss",
    limits: tuple[float, float] | None = None,
) -> str:
    """A surface as contours, with a dot at (0, 0), where the network is.

    With the same ``limits`` several surfaces compare.
    """
    values = tuple(tuple(row) for row in surface.values)
    drawn = Surface(tuple(surface.x), tuple(surface.y), values, value_label)
    network = Curve("", (0.0,), (0.0,), "dots")
    return figure_svg(Figure(title, x_label, y_label, (network,), drawn), limits=limits)


def scatter_svg(
    points: Sequence[Point], title: str, *, x_label: str, y_label: str, note: str = "", log_x: bool = False
) -> str:
    """Points with a frame and a grid; ``note``, the correlation say, stands below the title.

    Points with a value that is not finite are left out, on a logarithmic axis those at 0 or below too, and
    a further note says how many.
    """
    drawn = [point for point in points if _drawable(point, log_x)]
    curves = []
    for group in dict.fromkeys(point.group for point in points):
        mine = [point for point in drawn if point.group == group]
        x, y = tuple(point.x for point in mine), tuple(point.y for point in mine)
        curves.append(Curve(group, x, y, "dots"))
    missing = len(points) - len(drawn)
    notes = [note, f"{missing} of {len(points)} points are off the axes" if missing else ""]
    figure = Figure(title, x_label, y_label, tuple(curves))
    return figure_svg(figure, notes=[line for line in notes if line], log_x=log_x)


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults, text as text and the same bytes each time; afterwards the user's style."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's fonts show the text, whatever is in those it is measured with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "optpipe"})
        yield


def _empty() -> tuple[Page, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Page

    page = Page(figsize=(5.4, 4.4), layout="constrained")
    FigureCanvasSVG(page)
    return page, page.add_subplot()


def _draw_surface(page: Page, axes: Axes, surface: Surface, limits: tuple[float, float] | None) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.ma.masked_invalid(np.array(surface.values, dtype=float))
    low, high = limits or _range(values)
    levels = np.linspace(low, high, _LEVELS + 1)
    beyond: Literal["both", "neither"] = "both" if limits else "neither"
    shown = axes.contourf(surface.x, surface.y, values, levels, cmap="viridis", extend=beyond)
    axes.contour(surface.x, surface.y, values, levels, colors="black", linewidths=0.3)
    page.colorbar(shown, ax=axes, label=_plain(surface.label), ticks=MaxNLocator(8))
    axes.locator_params(nbins=5)


def _draw_curves(page: Page, axes: Axes, curves: Sequence[Curve]) -> None:
    names = list(dict.fromkeys(curve.name for curve in curves))
    named: dict[str, list[Artist]] = {name: [] for name in names if name}
    for number, curve in enumerate(curves):
        drawn = _draw_curve(axes, curve, number, names.index(curve.name))
        if curve.name:
            named[curve.name].append(drawn)
    if named:
        handles: list[Any] = [tuple(artists) for artists in named.values()]
        texts = [_plain(name) for name in named]
        if len(named) <= _INSIDE:
            axes.legend(handles, texts, fontsize="small")
        else:  # it would lie on what it explains
            page.legend(handles, texts, fontsize="small", loc="outside lower center", ncols=2, frameon=False)


def _draw_curve(axes: Axes, curve: Curve, number: int, look: int) -> Artist:
    """The curve as drawn: edged in white, to stand out from a surface; dots lie above lines and frame."""
    from matplotlib.patheffects import withStroke

    color = _COLORS[look % len(_COLORS)]
    if curve.style == "dots":
        marker = _MARKERS[look % len(_MARKERS)]
        return axes.scatter(
            curve.x,
            curve.y,
            s=32,
            marker=marker,
            color=color,
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
            clip_on=False,
            gid=f"points{number}",
        )
    if curve.style == "ticks":
        return axes.scatter(
            curve.x, curve.y, s=90, marker="|", color="black", linewidths=1.2, gid=f"ticks{number}"
        )
    if curve.style == "interval":
        (line,) = axes.plot(curve.x, curve.y, color=_GREY, linewidth=0.8, gid=f"interval{number}")
        return line
    edge = [withStroke(linewidth=3, foreground="white")]
    dashes = _DASHES[look % len(_DASHES)]
    (line,) = axes.plot(
        curve.x, curve.y, dashes, color=color, linewidth=1.5, path_effects=edge, gid=f"line{number}"
    )
    return line


def _plain(text: str) -> str:
    """Text that is shown as it is, not as a formula where it has dollar signs."""
    return _printable(text).replace("$", r"\$")


def _printable(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _text(page: Page, title: str) -> str:
    """The <svg> element alone, so that it can stand in a page as it is; its <title> is for screen readers."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    page.savefig(buffer, format="svg", metadata={"Title": _printable(title), **nothing})
    whole = buffer.getvalue().decode("utf-8")
    return whole[whole.index("<svg") :]


def _drawable(point: Point, log_x: bool) -> bool:
    return math.isfinite(point.x) and math.isfinite(point.y) and (point.x > 0 or not log_x)


def _range(values: np.ma.MaskedArray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[float, float]:
    """The least and the greatest value, apart so that there are levels between them."""
    if not values.count():
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    least = 1e-6 * max(1.0, abs(low))
    return (low, high) if high - low > least else (low - least, high + least)
