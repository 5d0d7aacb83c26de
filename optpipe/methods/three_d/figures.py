"""What the search shows in the report, as figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optpipe.methods._meter import Meter
from optpipe.methods.three_d.collect import Point
from optpipe.methods.three_d.config import DIMENSIONS
from optpipe.methods.three_d.ends import Axis
from optpipe.methods.three_d.points import Array, Smooth
from optpipe.methods.three_d.predictor import Predictor
from optpipe.methods.three_d.settle import Settled
from optpipe.methods.three_d.space import Share
from optpipe.types import Curve, Figure, Surface

STEPS = 41


def accuracy(points: Sequence[Point], predictor: Predictor) -> Figure:
    """The fitted accuracy along each dimension alone, with the points that it was fitted to."""
    curves: list[Curve] = []
    for along, dimension in enumerate(DIMENSIONS):
        own = [point for point in points if point.dimensions in {(), (dimension,)}]
        if len(own) < 2:
            continue
        own = sorted(own, key=lambda point: point.share[along])
        xs = np.linspace(own[0].share[along], 1.0, STEPS)
        fitted = predictor.along(dimension, xs)
        curves.append(Curve(dimension, tuple(map(float, xs)), tuple(map(float, fitted))))
        curves.append(
            Curve(
                dimension,
                tuple(point.share[along] for point in own),
                tuple(point.quality.value for point in own),
                "dots",
            )
        )
    return Figure(
        "Accuracy along each dimension", "share of the original's dimension", "accuracy", tuple(curves)
    )


def equal_cost(settled: Settled, predictor: Predictor, axes: Sequence[Axis], meter: Meter) -> Figure:
    """Predicted accuracy where the cost is just what is allowed, over width and resolution.

    At each of them the first of the dimensions, the depth where it is searched, is what makes the cost equal;
    white where no value of it does. Of two dimensions the surface is a curve.
    """
    dimensions = [axis.dimension for axis in axes]
    solved, *shown = [DIMENSIONS.index(dimension) for dimension in dimensions]
    allowed, what, lower = meter.allowed, meter.what, settled.lower
    title = f"Predicted accuracy at {allowed:.1%} of the {what}"
    label = f"predicted accuracy ({dimensions[0]} as the {what} allows)"
    grid = [np.linspace(lower[index], 1.0, STEPS) for index in shown]
    best, built = settled.optimum.point, settled.chosen.candidate.point
    if len(shown) == 1:
        points = np.ones((STEPS, 3))
        points[:, shown[0]] = grid[0]
        values = _accuracy(points, solved, lower, settled.surface, predictor, allowed)
        inside = np.isfinite(values)
        line = Curve("equal cost", tuple(grid[0][inside].tolist()), tuple(values[inside].tolist()))
        marks = [
            Curve("optimum", (best[shown[0]],), (settled.optimum.value,), "dots"),
            Curve("built", (built[shown[0]],), (settled.chosen.candidate.value,), "dots"),
        ]
        return Figure(title, dimensions[1], label, (line, *marks))
    first, second = np.meshgrid(grid[0], grid[1])
    points = np.ones((STEPS * STEPS, 3))
    points[:, shown[0]], points[:, shown[1]] = first.ravel(), second.ravel()
    values = _accuracy(points, solved, lower, settled.surface, predictor, allowed).reshape(STEPS, STEPS)
    rows = tuple(tuple(float(v) if np.isfinite(v) else None for v in row) for row in values)
    surface = Surface(tuple(grid[0].tolist()), tuple(grid[1].tolist()), rows, label)
    marks = [
        Curve("optimum", (best[shown[0]],), (best[shown[1]],), "dots"),
        Curve("built", (built[shown[0]],), (built[shown[1]],), "dots"),
    ]
    return Figure(title, dimensions[1], dimensions[2], tuple(marks), surface)


def _accuracy(
    points: Array, solved: int, lower: Share, surface: Smooth, predictor: Predictor, allowed: float
) -> Array:
    """Accuracies (N,) where the solved dimension makes the cost what is allowed; NaN where none does."""
    low, high = np.full(len(points), lower[solved]), np.ones(len(points))

    def at(x: Array) -> Array:
        moved = points.copy()
        moved[:, solved] = x
        return moved

    inside = (surface(at(low)) <= allowed) & (surface(at(high)) >= allowed)
    # The cost rises with every dimension, so halving finds where it is crossed.
    for _ in range(40):
        middle = (low + high) / 2
        below = surface(at(middle)) <= allowed
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(inside, predictor(at(low)), np.nan)
