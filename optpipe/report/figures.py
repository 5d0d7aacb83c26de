"""Figures as SVG text: the same numbers give the same bytes, and nothing outside the text is referred to.

Needs no display: matplotlib's figures are drawn by its SVG canvas, without pyplot's global state, and
whatever style the user has set is left aside and put back. matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEVELS = 20
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
# Readable in print and by the colour-blind: Okabe and Ito's palette, without its yellow.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


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


def surface_svg(
    surface: Grid,
    title: str,
    *,
    x_label: str = "gradient direction",
    y_label: str = "random direction",
    value_label: str = "loss",
    limits: tuple[float, float] | None = None,
) -> str:
    """A surface as contours, at least 2 x 2, with a cross at (0, 0), where the network is.

    ``limits`` are the values of the darkest and the lightest colour, so that several surfaces compare; by
    default the surface's own. Values beyond them have the colour of the limit.
    """
    values = np.ma.masked_invalid(np.array(surface.values, dtype=float))
    low, high = limits or _range(values)
    with _style():
        figure, axes = _empty()
        levels = np.linspace(low, high, _LEVELS + 1)
        beyond: Literal["both", "neither"] = "both" if limits else "neither"
        shown = axes.contourf(surface.x, surface.y, values, levels, cmap="viridis", extend=beyond)
        axes.contour(surface.x, surface.y, values, levels, colors="black", linewidths=0.3)
        axes.plot([0], [0], "+", color="white", markersize=10, markeredgewidth=1.5)
        figure.colorbar(shown, ax=axes, label=value_label)
        axes.locator_params(nbins=5)
        _name(axes, title, x_label, y_label)
        return _text(figure, title)


def scatter_svg(
    points: Sequence[Point], title: str, *, x_label: str, y_label: str, note: str = "", log_x: bool = False
) -> str:
    """Points with a frame and a grid; ``note``, the correlation say, stands below the title.

    ``log_x`` spaces x by its logarithm. Points with a value that is not finite are left out, on a
    logarithmic axis those at 0 or below too, and the note says how many.
    """
    drawn = [point for point in points if _drawable(point, log_x)]
    missing = len(points) - len(drawn)
    lines = [title, note, f"{missing} of {len(points)} points are off the axes" if missing else ""]
    with _style():
        figure, axes = _empty()
        groups = list(dict.fromkeys(point.group for point in points))
        for number, group in enumerate(groups):
            mine = [point for point in drawn if point.group == group]
            axes.scatter(
                [point.x for point in mine],
                [point.y for point in mine],
                s=28,
                marker=_MARKERS[number % len(_MARKERS)],
                color=_COLORS[number % len(_COLORS)],
                alpha=0.8,
                linewidths=0,
                label=group,
                gid=f"points{number}",
            )
        if log_x:
            axes.set_xscale("log")
        if any(groups):
            axes.legend(fontsize="small")
        axes.grid(visible=True, linewidth=0.4, alpha=0.5)
        _name(axes, "\n".join(line for line in lines if line), x_label, y_label)
        return _text(figure, title)


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults, text as text and the same bytes each time; afterwards the user's style."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "optpipe"})
        yield


def _empty() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _text(figure: Figure, title: str) -> str:
    """The <svg> element alone, so that it can stand in a page as it is; its <title> is for screen readers."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata={"Title": title, **nothing})
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


def _name(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
