"""What a network costs at a depth, width and resolution, as a share of the original's: a smooth fit.

C(d, w, r) = a + b d + (c + e d) h(w, r), with shares a, b, c, e that are not negative and add up to 1: what
nothing touches, what goes with the number of layers (launching them), and the work of the layers outside and
inside the units of depth. The work goes with g = w^p r^q down to a floor f below which a layer takes no less
than its launch, h^4 = (f^4 + g^4) / (f^4 + 1). So C is smooth and grows in each dimension, whatever was
measured; d w^2 r^2 (Eq. 4) is one of these.

The powers and the floor are fitted too. A sum over monomials of fixed powers tells such an engine's cost
worse: it cannot bend from steep to flat, and points on the axes leave open which of its terms go together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares, nnls

from optpipe.errors import RunError

Array = NDArray[np.float64]
Terms = tuple[float, float, float, float]

ANCHOR = 100.0
"""Weight of C(1, 1, 1) = 1, which is no measurement but what a ratio to the original means."""

DAMPING = 1e-3
"""Weight of the shares' norm, and of the shape's distance from USUAL: it decides only what no point tells."""

BEND = 4
"""How sharply the work bends into its floor."""

# The powers of w and of r, and the floor: the paper's powers and a low floor, the ends of each, and the
# values that the fit starts from.
USUAL = np.log((2.0, 2.0, 0.3))
ENDS = np.log(((0.1, 0.1, 0.01), (10.0, 10.0, 1.0)))
STARTS = np.log(((1.5, 1.5, 0.1), (3.0, 3.0, 0.1), (1.5, 1.5, 0.6), (3.0, 3.0, 0.6)))


@dataclass(frozen=True, slots=True)
class CostSurface:
    """The cost at (d, w, r) as a ratio to the original's.

    ``terms`` are the shares a, b, c and e of the original's cost: fixed, with depth, with the work alone,
    with both. ``powers`` are p and q, of w and r in the work.
    """

    terms: Terms
    powers: tuple[float, float]
    floor: float = 0.0

    def __call__(self, points: ArrayLike) -> Array:
        """Ratios (N,) at points (N, 3)."""
        rows = np.atleast_2d(np.asarray(points, dtype=np.float64))
        return np.asarray(_columns(rows, self.powers, self.floor) @ np.array(self.terms))

    def gradient(self, points: ArrayLike) -> Array:
        """The partial derivatives (N, 3) at points (N, 3), none below 0."""
        rows = np.atleast_2d(np.asarray(points, dtype=np.float64))
        _, depth, alone, both = self.terms
        d, w, r = rows.T
        work = _work(rows, self.powers, self.floor)
        moving = w ** self.powers[0] * r ** self.powers[1]
        # The derivative of h by the logarithm of g.
        slope = (alone + both * d) * moving**BEND / (work ** (BEND - 1) * (self.floor**BEND + 1))
        return np.stack([depth + both * work, slope * self.powers[0] / w, slope * self.powers[1] / r], axis=1)


def formula() -> CostSurface:
    """The cost that the paper assumes, d w^2 r^2 (Eq. 4)."""
    return CostSurface((0.0, 0.0, 0.0, 1.0), (2.0, 2.0))


def fit_cost(points: ArrayLike, ratios: ArrayLike, weights: ArrayLike | None = None) -> CostSurface:
    """The surface nearest to ratios (N,) that were measured at points (N, 3), 1 at (1, 1, 1).

    It has the least sum of squared errors, each times its weight (N,); by default errors count in parts of
    the ratio itself, as a budget does. The shares are found by non-negative linear least squares inside a
    search for powers and floor from several starts. Points along the axes alone tell how the cost falls in
    each dimension but little of which shares fall together; a few off the axes tell that.

    Raises RunError where there is no point or a ratio is not positive and finite.
    """
    rows, targets = np.asarray(points, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
    if not rows.size or not np.isfinite(targets).all() or targets.min() <= 0:
        raise RunError(
            f"the cost ratios {', '.join(f'{ratio:.3g}' for ratio in targets) or '(none)'} cannot be fitted; "
            "measure at least one network, each of a positive cost"
        )
    if rows.ndim != 2 or rows.shape[1] != 3 or targets.shape != rows.shape[:1]:
        raise ValueError(f"points (N, 3) and ratios (N,) expected, not {rows.shape} and {targets.shape}")
    scales = 1 / targets if weights is None else np.asarray(weights, dtype=np.float64)

    def errors(shape: Array) -> Array:
        return np.concatenate([_shares(shape, rows, targets, scales)[1], DAMPING * (shape - USUAL)])

    best, least = USUAL, np.inf
    for start in STARTS:
        found = least_squares(errors, start, bounds=(ENDS[0], ENDS[1]), xtol=1e-7, ftol=1e-7)
        if found.cost < least * (1 - 1e-6):
            best, least = np.asarray(found.x), float(found.cost)
    a, b, c, e = (float(share) for share in _shares(best, rows, targets, scales)[0])
    p, q, floor = (float(value) for value in np.exp(best))
    return CostSurface((a, b, c, e), (p, q), floor)


def _shares(shape: Array, rows: Array, targets: Array, scales: Array) -> tuple[Array, Array]:
    """The best shares (4,) for logarithms of powers and floor, and the weighted errors (N,) then left."""
    p, q, floor = np.exp(shape)
    matrix = _columns(rows, (p, q), floor) * scales[:, None]
    rest = np.concatenate([np.full((1, 4), ANCHOR), DAMPING * np.eye(4)])
    wanted = np.concatenate([targets * scales, [ANCHOR], np.zeros(4)])
    shares, _ = nnls(np.concatenate([matrix, rest]), wanted)
    return shares, matrix @ shares - targets * scales


def _columns(rows: Array, powers: tuple[float, float], floor: float) -> Array:
    """What the four shares are multiplied by (N, 4) at points (N, 3)."""
    work = _work(rows, powers, floor)
    return np.stack([np.ones(len(rows)), rows[:, 0], work, rows[:, 0] * work], axis=1)


def _work(rows: Array, powers: tuple[float, float], floor: float) -> Array:
    """h (N,) at points (N, 3), 1 at the original."""
    moving = rows[:, 1] ** powers[0] * rows[:, 2] ** powers[1]
    return np.asarray(((floor**BEND + moving**BEND) / (floor**BEND + 1)) ** (1 / BEND))
