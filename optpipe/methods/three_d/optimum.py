"""Where the predicted accuracy is highest within the budget (Eqs 3 and 8), and which networks come near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from optpipe.errors import RunError, UsageError
from optpipe.methods.three_d.config import DIMENSIONS, Dimension
from optpipe.methods.three_d.points import Smooth

Array = NDArray[np.float64]
Point = tuple[float, float, float]

GRID = 41
"""Points of the dense grid along each dimension that is searched."""

SLACK = 1e-6
"""How much of the allowed cost the solver may exceed it by; it is no closer than that."""

ROUNDING = 1e-9
"""The same for points of a list: no more than the rounding of a sum that should be equal to it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point (d, w, r) with its predicted accuracy and its cost, a ratio to the original's."""

    point: Point
    value: float
    cost: float


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best point within the budget, as the solver found it and as the dense grid has it.

    ``solver`` is None where it converged from no start. ``spacing`` is the grid's, 0 along a dimension that
    was not searched. They agree where the grid's value lies between the predictor's at the solver's point and
    at that point rounded down to the grid, which is within the budget too where the cost grows in each
    dimension: a lower or higher one is an error of one of them.
    """

    solver: Candidate | None
    grid: Candidate
    spacing: Point
    agree: bool

    @property
    def taken(self) -> Literal["solver", "grid"]:
        """Which has the higher value; the solver's where they are equal."""
        return "solver" if self.solver is not None and self.solver.value >= self.grid.value else "grid"

    @property
    def best(self) -> Candidate:
        """The one that is taken."""
        return self.solver if self.solver is not None and self.taken == "solver" else self.grid

    @property
    def point(self) -> Point:
        """The (d, w, r) that is taken."""
        return self.best.point

    @property
    def value(self) -> float:
        """The accuracy predicted there."""
        return self.best.value


def optimise(
    predictor: Smooth,
    cost: Smooth,
    allowed: float,
    lower: Point,
    dimensions: Sequence[Dimension] = DIMENSIONS,
    steps: int = GRID,
) -> Optimum:
    """The point of highest predicted accuracy with cost <= allowed and lower <= (d, w, r) <= 1.

    Sequential quadratic programming from the corners and midpoints of that box, which ends where Eq. 8 holds
    (with an inequality in place of its first line: where less costs nothing in accuracy, less is taken),
    beside the best of a grid of ``steps`` points along each dimension. One not in ``dimensions`` stays 1.

    Raises UsageError where a lower end is not above 0 and at most 1, RunError where no point of the box is
    within the budget.
    """
    bounds = [(low if name in dimensions else 1.0, 1.0) for name, low in zip(DIMENSIONS, lower, strict=True)]
    for name, (low, _) in zip(DIMENSIONS, bounds, strict=True):
        if not 0 < low <= 1:
            raise UsageError(f"the lowest {name} is {low:g}; it must be above 0 and at most 1")
    axes = [np.linspace(low, 1.0, steps if low < 1 else 1) for low, _ in bounds]
    best = _best(predictor, cost, allowed, _mesh(axes), box=bounds)
    spacing = [float(axis[1] - axis[0]) if len(axis) > 1 else 0.0 for axis in axes]
    solver = _solve(predictor, cost, allowed, bounds)
    agree = False
    if solver is not None:
        below = [axis[axis <= share + SLACK][-1] for axis, share in zip(axes, solver.point, strict=True)]
        agree = float(predictor([below])[0]) - SLACK <= best.value <= solver.value + SLACK
    return Optimum(solver, best, _point(spacing), agree)


def realisable(
    predictor: Smooth,
    cost: Smooth,
    allowed: float,
    choices: tuple[Sequence[float], Sequence[float], Sequence[float]],
    within: float | None = None,
) -> list[Candidate]:
    """The points of these shares of each dimension with cost <= allowed, the best predicted first.

    Of equal predictions the cheaper is first. ``within`` leaves only those predicted at most that much, in
    accuracy, below the first. Raises RunError where none is within the budget.
    """
    axes = [np.unique(np.asarray(shares, dtype=np.float64)) for shares in choices]
    points = _mesh(axes)
    values, costs = predictor(points), cost(points)
    inside = np.flatnonzero(costs <= allowed * (1 + ROUNDING))
    if not len(inside):
        raise _nothing(cost, allowed, [(float(axis[0]), 1.0) for axis in axes])
    order = inside[np.lexsort((costs[inside], -values[inside]))]
    if within is not None:
        order = order[values[order] >= values[order[0]] - within]
    return [_candidate(points[index], values[index], costs[index]) for index in order]


def _best(
    predictor: Smooth, cost: Smooth, allowed: float, points: Array, box: Sequence[tuple[float, float]]
) -> Candidate:
    costs = cost(points)
    inside = costs <= allowed * (1 + ROUNDING)
    if not inside.any():
        raise _nothing(cost, allowed, box)
    points, costs = points[inside], costs[inside]
    values = predictor(points)
    index = int(values.argmax())
    return _candidate(points[index], values[index], costs[index])


def _solve(
    predictor: Smooth, cost: Smooth, allowed: float, bounds: Sequence[tuple[float, float]]
) -> Candidate | None:
    """The best of the points within the budget at which the solver stopped."""
    free = [index for index, (low, high) in enumerate(bounds) if low < high]
    found: list[Candidate] = []

    def whole(x: Array) -> Array:
        point = np.ones((1, 3))
        point[0, free] = x
        return point

    for fractions in product((0.0, 0.5, 1.0), repeat=len(free)):
        start = [
            low + part * (high - low)
            for part, (low, high) in zip(fractions, (bounds[i] for i in free), strict=True)
        ]
        result = minimize(
            lambda x: -float(predictor(whole(x))[0]),
            start,
            method="SLSQP",
            jac=lambda x: -predictor.gradient(whole(x))[0, free],
            bounds=[bounds[i] for i in free],
            constraints={
                "type": "ineq",
                "fun": lambda x: allowed - float(cost(whole(x))[0]),
                "jac": lambda x: -cost.gradient(whole(x))[0, free],
            },
            options={"ftol": 1e-12, "maxiter": 200},
        )
        point = np.clip(whole(result.x), *np.transpose(bounds))
        spent = float(cost(point)[0])
        # It may stop for precision's sake, without calling that a success, at a point as good as any.
        if np.isfinite(point).all() and spent <= allowed * (1 + SLACK):
            found.append(_candidate(point[0], predictor(point)[0], spent))
    return max(found, key=lambda candidate: candidate.value, default=None)


def _mesh(axes: Sequence[Array]) -> Array:
    """All points (N, 3) of three axes."""
    return np.stack([part.ravel() for part in np.meshgrid(*axes, indexing="ij")], axis=1)


def _nothing(cost: Smooth, allowed: float, box: Sequence[tuple[float, float]]) -> RunError:
    low = [own for own, _ in box]
    least = float(cost([low])[0])
    words = ", ".join(f"{name} {share:.3g}" for name, share in zip(DIMENSIONS, low, strict=True))
    return RunError(
        f"no network within reach meets the budget: the smallest ({words}) is predicted to cost "
        f"{least:.1%} of the original, and {allowed:.1%} is allowed; ask for less, or search more dimensions"
    )


def _candidate(point: Array, value: float, cost: float) -> Candidate:
    return Candidate(_point(point), float(value), float(cost))


def _point(shares: Sequence[float] | Array) -> Point:
    d, w, r = (float(share) for share in shares)
    return d, w, r
