"""The predictor beside full polynomials, on the points and on points left out (Table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.polynomial.polynomial import polyder, polyval3d, polyvander3d
from numpy.typing import ArrayLike

from optpipe.errors import RunError
from optpipe.methods.three_d.points import SAME, Array, Fitter, Vector, checked, distinct, in_words, vector
from optpipe.methods.three_d.predictor import fit


@dataclass(frozen=True, slots=True)
class FullPolynomial:
    """A polynomial of all monomials (Eq. 5): ``coefficients[i][j][k]`` is the one of d^i w^j r^k."""

    coefficients: tuple[tuple[Vector, ...], ...]

    def __call__(self, points: ArrayLike) -> Array:
        """Predicted accuracies (N,) at points (N, 3)."""
        return self._value(points, np.array(self.coefficients))

    def gradient(self, points: ArrayLike) -> Array:
        """The partial derivatives (N, 3) at points (N, 3)."""
        tensor = np.array(self.coefficients)
        return np.stack([self._value(points, polyder(tensor, axis=axis)) for axis in range(3)], axis=1)

    def _value(self, points: ArrayLike, tensor: Array) -> Array:
        rows = np.atleast_2d(np.asarray(points, dtype=np.float64))
        return np.asarray(polyval3d(rows[:, 0], rows[:, 1], rows[:, 2], tensor))


@dataclass(frozen=True, slots=True)
class Row:
    """A regression in the comparison of Table 4: its relative errors as fractions."""

    kind: str
    degree: int
    ridge: float
    train_error: float
    left_out_error: float


def full(points: ArrayLike, values: ArrayLike, degree: int = 3, ridge: float = 0.0) -> FullPolynomial:
    """The polynomial of all monomials d^i w^j r^k with i, j, k <= degree (Eq. 5) of least squared error.

    Without ``ridge`` it is the one of least norm, of the many that fit few points; else ``ridge`` times the
    sum of the squared coefficients is added to the sum of squared errors. The constant term is a coefficient
    like the others (Eq. 5 has it among them), and is penalised like them. A dimension that does not vary has
    only the power 0, as in :func:`fit`.

    Raises RunError where there is no point or a value is not finite.
    """
    rows, targets = checked(points, values)
    degrees = [degree if distinct(column) > 1 else 0 for column in rows.T]
    matrix = polyvander3d(rows[:, 0], rows[:, 1], rows[:, 2], degrees)
    if ridge > 0:
        matrix = np.concatenate([matrix, np.sqrt(ridge) * np.eye(matrix.shape[1])])
        targets = np.concatenate([targets, np.zeros(matrix.shape[1])])
    solved = np.linalg.lstsq(matrix, targets, rcond=None)[0].reshape([own + 1 for own in degrees])
    return FullPolynomial(tuple(tuple(vector(row) for row in plane) for plane in solved))


def left_out(fitter: Fitter, points: ArrayLike, values: ArrayLike) -> Array:
    """Predictions (N,) for each point by a fit to the others, without any measured at the same place.

    Raises RunError where all points are at one place.
    """
    rows, targets = checked(points, values)
    predicted = np.empty(len(rows))
    for index, row in enumerate(rows):
        others = np.abs(rows - row).max(axis=1) > SAME
        if not others.any():
            raise RunError(
                f"all {len(rows)} points are at {in_words(row)}, so none can be left out; collect more rounds"
            )
        predicted[index] = fitter(rows[others], targets[others])(row[None])[0]
    return predicted


def relative_error(predicted: ArrayLike, values: ArrayLike) -> float:
    """The mean of |predicted - value| / value, as a fraction (Table 4); of those values that are not 0."""
    guesses, truths = np.asarray(predicted, dtype=np.float64), np.asarray(values, dtype=np.float64)
    some = truths != 0
    return (
        float(np.mean(np.abs(guesses[some] - truths[some]) / np.abs(truths[some]))) if some.any() else np.nan
    )


def comparison(
    points: ArrayLike,
    values: ArrayLike,
    rank: int = 1,
    degree: int = 3,
    ridge: float = 1e-3,
    *,
    monotone: bool = False,
) -> list[Row]:
    """How the predictor and full polynomials fit the points, and predict each from the others (Table 4).

    The predictor comes first, then full polynomials of degrees from 1 up, each without and with ridge.
    ``monotone`` is that of :func:`fit`, for the predictor; the table in the paper is without.
    """
    own_fit = partial(fit, rank=rank, degree=degree, monotone=monotone)
    rows = [_row(f"rank {rank}", degree, 0.0, own_fit, points, values)]
    for own in range(1, degree + 1):
        for penalty in (0.0, ridge):
            fitter = partial(full, degree=own, ridge=penalty)
            rows.append(_row("full", own, penalty, fitter, points, values))
    return rows


def _row(kind: str, degree: int, ridge: float, fitter: Fitter, points: ArrayLike, values: ArrayLike) -> Row:
    rows, targets = checked(points, values)
    train = relative_error(fitter(rows, targets)(rows), targets)
    return Row(kind, degree, ridge, train, relative_error(left_out(fitter, rows, targets), targets))
