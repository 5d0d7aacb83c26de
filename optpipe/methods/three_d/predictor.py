"""The model accuracy predictor: a polynomial in depth, width and resolution of low rank (Eqs 5-7 and 10).

A deliberate deviation: the fit keeps the predictor from falling along an axis as the share grows, and from
rising above the largest accuracy. A network gains nothing by losing parts, except by noise; but a cubic
through few points swings between them, and the optimum then lies on a swing. The price is errors at points
that lie on a knee, which no cubic without a swing follows. Where plain least squares neither falls nor
exceeds, the fit is the same. ``monotone=False`` is always plain least squares, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.polynomial import Legendre, Polynomial
from numpy.polynomial.legendre import legder, legvander
from numpy.polynomial.polynomial import polyder, polyval
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from optpipe.methods.three_d.config import Dimension
from optpipe.methods.three_d.points import Array, Vector, checked, distinct, on_axis, vector

DAMPING = 1e-4
"""Weight of the coefficients' norm in the fit: it chooses among equally good ones, and moves none else."""

ROUGHNESS = 10.0
"""In that norm a coefficient of degree n counts 1 + ROUGHNESS n^2: of equally good fits, a flat one."""

FALL = 10.0
"""Weight of a fall along an axis: a steady 0.01 over the range counts as an error of 0.1 at a point."""

EXCESS = 3.0
"""Weight of what lies above the largest accuracy at a point: less, since that one is noisy as well."""

SLOPES = 17
"""The shares of each dimension, its whole range evenly, at which a fall is looked for."""

STARTS = 4
SWEEPS = 15
EASING = 0.5
"""By how much the damping falls from one sweep to the next, from this very value down to DAMPING."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """The sum over R ranks of products of one polynomial in each of d, w and r (Eq. 7).

    ``coefficients[q][dimension][i]`` belongs to the i-th power in the q-th product: s, u and v of Eq. 6. The
    factors of width and of resolution are 1 at 1, where they do not vanish there, so the one of depth bears
    the accuracy.
    """

    coefficients: tuple[tuple[Vector, Vector, Vector], ...]

    def __call__(self, points: ArrayLike) -> Array:
        """Predicted accuracies (N,) at points (N, 3)."""
        factors = self._factors(points, derivative=0)
        return np.asarray(factors.prod(axis=1).sum(axis=0))

    def gradient(self, points: ArrayLike) -> Array:
        """The partial derivatives (N, 3) at points (N, 3)."""
        factors, slopes = self._factors(points, derivative=0), self._factors(points, derivative=1)
        columns = []
        for dimension in range(3):
            mixed = factors.copy()
            mixed[:, dimension] = slopes[:, dimension]
            columns.append(mixed.prod(axis=1).sum(axis=0))
        return np.stack(columns, axis=1)

    def along(self, dimension: Dimension, x: ArrayLike) -> Array:
        """Predicted accuracies (N,) at shares (N,) of one dimension, the other two at 1."""
        return self(on_axis(dimension, x))

    def _factors(self, points: ArrayLike, *, derivative: int) -> Array:
        """Values (R, 3, N) of the polynomials, or of their derivatives."""
        rows = np.atleast_2d(np.asarray(points, dtype=np.float64))
        return np.array(
            [
                [polyval(rows[:, index], polyder(own, derivative)) for index, own in enumerate(product)]
                for product in self.coefficients
            ]
        )


def fit(
    points: ArrayLike,
    values: ArrayLike,
    rank: int = 1,
    degree: int = 3,
    seed: int = 0,
    monotone: bool = True,
    starts: int = STARTS,
) -> Predictor:
    """The predictor of least squared error at points (N, 3) with accuracies (N,).

    From each of ``starts`` starts, the first flat and the others drawn from ``seed``: alternating least
    squares, then Levenberg-Marquardt; the best wins. A dimension of which the points have only m <= degree
    shares gets a polynomial of degree m - 1, the highest that they tell; one that does not vary has the
    factor 1, which is no statement about other shares. Where several predictors fit equally well (fewer
    points than coefficients, a rank too high) it is the one whose coefficients, over Legendre polynomials on
    the range of the points, have the least norm, high degrees counting more: the flattest.

    ``monotone`` counts among the errors how far it falls along each axis, from the points' smallest share to
    their largest, the other dimensions at theirs (1 where the original is a point), and how far it lies above
    the largest accuracy at a point. Off the axes it may fall at a rank above 1.

    Raises RunError where there is no point or a value is not finite.
    """
    rows, targets = checked(points, values)
    scale = float(np.sqrt(np.mean(targets**2))) or 1.0
    problem = _problem(rows, targets / scale, rank, degree, monotone=monotone)
    rng = np.random.default_rng(seed)
    best, least = problem.flat(), np.inf
    for start in range(starts):
        first = problem.flat() if start == 0 else problem.flat() + 0.3 * rng.standard_normal(problem.size)
        found = least_squares(
            problem.residuals,
            problem.alternate(first),
            problem.jacobian,
            method="lm",
            xtol=1e-9,
            ftol=1e-10,
            gtol=1e-12,
            max_nfev=1000,
        )
        if found.cost < least * (1 - 1e-9):
            best, least = np.asarray(found.x), float(found.cost)
    return problem.predictor(best, scale, degree)


Bases = tuple[Array, Array, Array]
"""What the coefficients of each dimension's factor are multiplied with in each of N rows: (N, degree + 1)."""


@dataclass(frozen=True, slots=True)
class _Problem:
    """Least squares over the coefficients of all factors, one vector: rank by rank, dimension by dimension.

    ``bases`` are the Legendre polynomials of each dimension at the points, orthonormal over ``domains``;
    ``limits`` give in the same way what counts as an error only where it is below ``least`` (M,); ``parts``
    are the places of each rank and dimension in the vector.
    """

    bases: Bases
    limits: Bases
    least: Array
    domains: tuple[tuple[float, float], ...]
    targets: Array
    parts: tuple[tuple[slice, ...], ...]

    @property
    def rank(self) -> int:
        return len(self.parts)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(basis.shape[1] for basis in self.bases)

    @property
    def size(self) -> int:
        return self.rank * sum(self.widths)

    @property
    def weights(self) -> Array:
        """Weight of each coefficient in the norm."""
        return np.concatenate([_roughness(width) for width in self.widths] * self.rank)

    def flat(self) -> Array:
        """The constant predictor of the values' mean, its parts divided evenly among ranks."""
        part = np.cbrt(self.targets.mean() / self.rank)
        return np.concatenate([np.eye(1, width)[0] * part for width in self.widths] * self.rank)

    def factors(self, bases: Bases, theta: Array) -> Array:
        """Values (R, 3, N) of the factors."""
        return np.array(
            [[basis @ theta[own] for basis, own in zip(bases, row, strict=True)] for row in self.parts]
        )

    def values(self, bases: Bases, theta: Array) -> Array:
        """The sums (N,) of products."""
        return np.asarray(self.factors(bases, theta).prod(axis=1).sum(axis=0))

    def residuals(self, theta: Array) -> Array:
        errors = self.values(self.bases, theta) - self.targets
        lacks = np.minimum(self.values(self.limits, theta) - self.least, 0.0)
        return np.concatenate([errors, lacks, DAMPING * self.weights * theta])

    def jacobian(self, theta: Array) -> Array:
        lacking = self.values(self.limits, theta) < self.least
        lacks = lacking[:, None] * self._columns(self.limits, theta)
        return np.concatenate([self._columns(self.bases, theta), lacks, DAMPING * np.diag(self.weights)])

    def _columns(self, bases: Bases, theta: Array) -> Array:
        """Derivatives (N, size) of the sums by all coefficients."""
        factors = self.factors(bases, theta)
        columns = [_by_factor(bases, factors[q], dim) for q in range(self.rank) for dim in range(3)]
        return np.concatenate(columns, axis=1)

    def alternate(self, theta: Array) -> Array:
        """The coefficients after sweeps of linear least squares in one dimension at a time.

        The damping is strong at first and ends at DAMPING: where many predictors fit, that leads to one of
        little norm. The factors of each product end with equal norms, of all scales the ones of least norm.
        """
        theta = theta.copy()
        for sweep in range(SWEEPS):
            strength = max(DAMPING, EASING ** (sweep + 1))
            for dimension in range(3):
                factors = self.factors(self.bases, theta)
                own = [_by_factor(self.bases, product, dimension) for product in factors]
                matrix = np.concatenate(own, axis=1)
                damping = strength * np.diag(np.tile(_roughness(self.widths[dimension]), self.rank))
                target = np.concatenate([self.targets, np.zeros(matrix.shape[1])])
                solved = np.linalg.lstsq(np.concatenate([matrix, damping]), target, rcond=None)[0]
                for q, part in enumerate(np.split(solved, self.rank)):
                    theta[self.parts[q][dimension]] = part
        return self.balanced(theta)

    def balanced(self, theta: Array) -> Array:
        """The same predictor with factors of equal norm in each product."""
        theta = theta.copy()
        for row in self.parts:
            norms = [float(np.linalg.norm(self.weights[part] * theta[part])) for part in row]
            mean = float(np.cbrt(np.prod(norms)))
            for part, norm in zip(row, norms, strict=True):
                theta[part] *= mean / norm if norm > 0 else 0.0
        return theta

    def predictor(self, theta: Array, scale: float, degree: int) -> Predictor:
        """The same in powers of d, w and r."""
        products = []
        for row in self.parts:
            own = [_powers(theta[part], self.domains[dim], degree) for dim, part in enumerate(row)]
            for dimension in (1, 2):
                unit = _unit(own[dimension], self.domains[dimension])
                own[dimension], own[0] = own[dimension] / unit, own[0] * unit
            products.append((vector(own[0] * scale), vector(own[1]), vector(own[2])))
        return Predictor(tuple(products))


def _problem(rows: Array, targets: Array, rank: int, degree: int, *, monotone: bool) -> _Problem:
    bases, domains = [], []
    for column in rows.T:
        low, high = float(column.min()), float(column.max())
        several = distinct(column)
        own = min(degree, several - 1)
        # A dimension that does not vary has one basis polynomial, the constant; its domain plays no part.
        domain = (low, high) if several > 1 else (low - 1.0, low + 1.0)
        inside = (2 * column - domain[0] - domain[1]) / (domain[1] - domain[0])
        bases.append(legvander(inside, own) * _norms(own))
        domains.append(domain)
    widths = [basis.shape[1] for basis in bases]
    starts = np.cumsum([0, *widths * rank]).tolist()
    parts = [slice(low, high) for low, high in pairwise(starts)]
    limits, least = _limits(bases, targets) if monotone else _no_limits(widths)
    return _Problem(
        (bases[0], bases[1], bases[2]),
        limits,
        least,
        tuple(domains),
        targets,
        tuple(tuple(parts[3 * q : 3 * q + 3]) for q in range(rank)),
    )


def _by_factor(bases: Bases, product: Array, dimension: int) -> Array:
    """Derivatives (N, degree + 1) of a product of factors (3, N) by the coefficients of one."""
    others = np.delete(product, dimension, axis=0).prod(axis=0)
    return np.asarray(others[:, None] * bases[dimension])


def _limits(bases: Sequence[Array], targets: Array) -> tuple[Bases, Array]:
    """Rows that must not be below one number each: the negative values at the points, slopes along the axes.

    A dimension that does not vary has no slope.
    """
    tops = [_norms(basis.shape[1] - 1)[None] for basis in bases]  # all Legendre polynomials end at 1
    rows: list[list[Array]] = [[-EXCESS * bases[0], bases[1], bases[2]]]
    for dimension, top in enumerate(tops):
        if top.size > 1:
            # Legendre polynomials run over a range of 2: twice their slope is that by the whole range.
            slopes = 2 * legvander(np.linspace(-1, 1, SLOPES), top.size - 2) @ legder(np.diag(top[0]))
            row = [np.repeat(other, SLOPES, axis=0) for other in tops]
            row[dimension] = FALL / np.sqrt(SLOPES) * slopes
            rows.append(row)
    d, w, r = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    least = np.zeros(len(d))
    least[: len(targets)] = -EXCESS * targets.max()
    return (d, w, r), least


def _no_limits(widths: Sequence[int]) -> tuple[Bases, Array]:
    d, w, r = (np.empty((0, width)) for width in widths)
    return (d, w, r), np.empty(0)


def _roughness(width: int) -> Array:
    return np.asarray(1 + ROUGHNESS * np.arange(width, dtype=np.float64) ** 2)


def _norms(degree: int) -> Array:
    """What makes Legendre polynomials orthonormal for the uniform density."""
    return np.asarray(np.sqrt(2 * np.arange(degree + 1) + 1.0))


def _powers(coefficients: Array, domain: tuple[float, float], degree: int) -> Array:
    """The coefficients of 1, x, ..., x^degree of a polynomial over a domain's Legendre basis."""
    series = Legendre(coefficients * _norms(len(coefficients) - 1), domain=domain)
    found = series.convert(kind=Polynomial, domain=[-1, 1]).coef
    return np.pad(np.asarray(found, dtype=np.float64), (0, degree + 1 - len(found)))


def _unit(powers: Array, domain: tuple[float, float]) -> float:
    """What to divide a factor by: its value at 1, or its largest where it (nearly) vanishes there."""
    at_one = float(polyval(1.0, powers))
    values = polyval(np.linspace(*domain, 33), powers)
    largest = float(values[np.abs(values).argmax()])
    if abs(at_one) >= 0.1 * abs(largest):
        return at_one or 1.0
    return largest
