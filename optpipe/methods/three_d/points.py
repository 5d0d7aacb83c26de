"""Points (d, w, r), shares of the original's depth, width and resolution (Eq. 2), and functions of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optpipe.errors import RunError
from optpipe.methods.three_d.config import DIMENSIONS, Dimension

Array = NDArray[np.float64]
Vector = tuple[float, ...]

SAME = 1e-9
"""Shares that differ by less are one and the same."""


class Smooth(Protocol):
    """A differentiable function of (d, w, r)."""

    def __call__(self, points: ArrayLike) -> Array:
        """Its values (N,) at points (N, 3)."""
        ...

    def gradient(self, points: ArrayLike) -> Array:
        """Its partial derivatives (N, 3) at points (N, 3)."""
        ...


Fitter = Callable[[Array, Array], Callable[[Array], Array]]
"""What makes a function of points from points (N, 3) and values (N,)."""


def on_axis(dimension: Dimension, x: ArrayLike) -> Array:
    """Points (N, 3) with these shares (N,) along one dimension, the other two at 1."""
    shares = np.atleast_1d(np.asarray(x, dtype=np.float64))
    points = np.ones((len(shares), 3))
    points[:, DIMENSIONS.index(dimension)] = shares
    return points


def distinct(shares: Array) -> int:
    """How many different ones there are among shares (N,)."""
    return 1 + int((np.diff(np.sort(shares)) > SAME).sum())


def checked(points: ArrayLike, values: ArrayLike) -> tuple[Array, Array]:
    """Points (N, 3) and values (N,) as arrays; RunError where there is none or one is not finite."""
    rows, targets = np.asarray(points, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if rows.size == 0:
        raise RunError("there is no point to fit to; collect at least one round along one dimension")
    if rows.ndim != 2 or rows.shape[1] != 3 or targets.shape != rows.shape[:1]:
        raise ValueError(f"points (N, 3) and values (N,) expected, not {rows.shape} and {targets.shape}")
    for row, target in zip(rows, targets, strict=True):
        if not (np.isfinite(target) and np.isfinite(row).all()):
            raise RunError(
                f"the value at {in_words(row)} is {target}, which nothing can be fitted to; "
                "see how the training of that network went"
            )
    return rows, targets


def in_words(row: Sequence[float] | Array) -> str:
    """A point as a message has it."""
    return ", ".join(f"{name} {share:.3g}" for name, share in zip(DIMENSIONS, row, strict=True))


def vector(values: Array) -> Vector:
    """Numbers (N,) as a tuple."""
    return tuple(float(value) for value in values)
