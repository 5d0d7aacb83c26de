"""The cost surface, corrected to be what was measured along each dimension and at one network more.

Engines work in blocks of channels and pixels, so that costs along one dimension lie now above and now below
any smooth surface. What they do along one dimension they mostly do beside the others too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from optpipe.methods.three_d.cost import CostSurface, fit_cost
from optpipe.methods.three_d.points import SAME, Array, Vector


@dataclass(frozen=True, slots=True)
class Knots:
    """By what logarithm the measured cost is above a surface, at ascending shares of one dimension."""

    shares: Vector = ()
    above: Vector = ()

    def at(self, shares: Array, *, slope: bool = False) -> Array:
        """The logarithms (N,) at shares (N,), or their derivatives; flat beyond the first and the last.

        Between the knots it is a monotone cubic (Fritsch and Carlson), which overshoots nowhere.
        """
        if len(self.shares) < 2:
            return np.zeros(len(shares))
        curve = PchipInterpolator(self.shares, self.above)
        inside = (shares >= self.shares[0]) & (shares <= self.shares[-1])
        within = np.clip(shares, self.shares[0], self.shares[-1])
        return np.where(inside, curve(within, 1), 0.0) if slope else np.asarray(curve(within))


@dataclass(frozen=True, slots=True)
class MeasuredSurface:
    """A cost surface times a correction for each dimension, times a factor."""

    surface: CostSurface
    knots: tuple[Knots, Knots, Knots] = (Knots(), Knots(), Knots())
    factor: float = 1.0

    def __call__(self, points: ArrayLike) -> Array:
        """Ratios (N,) at points (N, 3)."""
        rows = np.atleast_2d(np.asarray(points, dtype=np.float64))
        above = sum(own.at(column) for own, column in zip(self.knots, rows.T, strict=True))
        return np.asarray(self.surface(rows) * np.exp(above) * self.factor)

    def gradient(self, points: ArrayLike) -> Array:
        """The partial derivatives (N, 3) at points (N, 3)."""
        rows = np.atleast_2d(np.asarray(points, dtype=np.float64))
        relative = self.surface.gradient(rows) / self.surface(rows)[:, None]
        slopes = [own.at(column, slope=True) for own, column in zip(self.knots, rows.T, strict=True)]
        return np.asarray(self(rows)[:, None] * (relative + np.stack(slopes, axis=1)))


def fit_measured(points: ArrayLike, ratios: ArrayLike) -> MeasuredSurface:
    """The surface nearest to ratios (N,) at points (N, 3), and exact at those on the axes.

    Raises RunError where there is no point or a ratio is not positive and finite.
    """
    rows, targets = np.asarray(points, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
    smooth = fit_cost(rows, targets)
    above = np.log(targets / smooth(rows))
    d, w, r = (_knots(rows, above, along) for along in range(3))
    return MeasuredSurface(smooth, (d, w, r))


def _knots(rows: Array, above: Array, along: int) -> Knots:
    """The corrections along one dimension, nothing at 1; the mean of several at one share."""
    others = [place for place in range(3) if place != along]
    on_axis = (np.abs(rows[:, others] - 1) <= SAME).all(axis=1) & (rows[:, along] < 1 - SAME)
    found: dict[float, list[float]] = {1.0: [0.0]}
    for share, value in zip(rows[on_axis, along], above[on_axis], strict=True):
        found.setdefault(float(share), []).append(float(value))
    shares = sorted(found)
    return Knots(tuple(shares), tuple(_mean(found[share]) for share in shares))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
