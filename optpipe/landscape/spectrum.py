"""The extreme eigenvalues of the loss's Hessian, and the condition number (EKG, Eq. 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optpipe.errors import RunError, UsageError
from optpipe.landscape.objective import BatchNorm, Product, objective

# How many times the iterations of the others the first point of a line gets.
_COLD = 3
# How much of a start that is taken over from the point before is random: an eigenvector that it lacks would
# never be found.
_FRESH = 0.2


@dataclass(frozen=True, slots=True)
class Extremes:
    """The smallest and the largest eigenvalue, by sign and not by size, as Lanczos found them.

    An eigenvalue lies within each residual of its value; one of a Hessian that is still further out can be
    missed while ``iterations`` is small, so values grow outward with more of them.
    """

    smallest: float
    largest: float
    smallest_residual: float
    largest_residual: float
    iterations: int

    @property
    def condition_number(self) -> float:
        """|smallest / largest| (EKG, Eq. 6): 0 where the loss is convex, larger where it bends both ways.

        Not the condition number of numerical analysis. Raises RunError where the largest eigenvalue is 0.
        """
        if self.largest == 0:
            raise RunError(
                f"eigenvalues {self.smallest:g} to {self.largest:g}: without curvature there is no condition "
                "number; give more images"
            )
        return abs(self.smallest / self.largest)


def extreme_eigenvalues(
    product: Product, start: Tensor, *, iterations: int = 30, tolerance: float = 1e-3
) -> Extremes:
    """Both ends of the spectrum of a symmetric matrix (P, P) that is known by its products alone.

    Lanczos from ``start`` (P,), a random vector, with full reorthogonalisation (twice a step); it ends where
    both residuals are within ``tolerance`` of the largest absolute eigenvalue, at the latest after
    ``iterations`` products. The vectors of all iterations are kept: iterations * P numbers. ARPACK
    (``scipy.sparse.linalg.eigsh``) is not used because it hands over nothing when it stops before it has
    converged, and a Hessian's product is so dear that a budget of them must give the best there is.
    Raises RunError where a product is not finite, UsageError where ``iterations`` is below 1.
    """
    return _lanczos(product, start, iterations, tolerance)[0]


def _lanczos(product: Product, start: Tensor, iterations: int, tolerance: float) -> tuple[Extremes, Tensor]:
    """The extremes, and a unit vector between the eigenvectors of both."""
    if iterations < 1:
        raise UsageError(f"iterations = {iterations}: Lanczos needs at least 1")
    size = start.numel()
    basis = start.new_empty((min(iterations, size), size))
    diagonal: list[float] = []
    beside: list[float] = []
    vector = start / start.norm()
    while True:
        basis[len(diagonal)] = vector
        image = product(vector)
        diagonal.append(float(vector @ image))
        known = basis[: len(diagonal)]
        for _ in range(2):  # once is not enough: what cancels leaves its rounding error behind
            image = image - known.T @ (known @ image)
        length = float(image.norm())
        if not math.isfinite(length):
            raise RunError(f"a Hessian product is not finite after {len(diagonal)} iterations")
        extremes, weights = _ritz(diagonal, beside, length)
        scale = max(abs(extremes.smallest), abs(extremes.largest))
        worst = max(extremes.smallest_residual, extremes.largest_residual)
        if len(diagonal) == len(basis) or worst <= tolerance * scale:
            return extremes, F.normalize(weights.to(known) @ known, dim=0)
        beside.append(length)
        vector = image / length


def _ritz(diagonal: list[float], beside: list[float], length: float) -> tuple[Extremes, Tensor]:
    """What the tridiagonal matrix says of the extremes, and the sum of their two vectors in its basis."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    extremes = Extremes(
        smallest=float(values[0]),
        largest=float(values[-1]),
        smallest_residual=length * abs(float(vectors[-1, 0])),
        largest_residual=length * abs(float(vectors[-1, -1])),
        iterations=len(diagonal),
    )
    return extremes, vectors[:, 0] + vectors[:, -1]


def unit(like: Tensor, generator: torch.Generator) -> Tensor:
    """A unit vector of random direction; drawn on the generator's device, so that others give the same."""
    drawn = torch.randn(like.shape, generator=generator, device=generator.device)
    return F.normalize(drawn.to(like), dim=0)


def condition(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    batch_norm: BatchNorm = "batch",
    iterations: int = 30,
    tolerance: float = 1e-3,
) -> Extremes:
    """The Hessian's extremes at the network's own weights: the cheap form of Eq. 6.

    ``images`` (N, C, H, W) are one batch. Raises what :func:`objective` and :func:`extreme_eigenvalues` do.
    """
    loss = objective(network, images, labels, batch_norm)
    origin = loss.origin()
    return extreme_eigenvalues(
        loss.expand(origin).hessian_vector,
        unit(origin, generator),
        iterations=iterations,
        tolerance=tolerance,
    )


@dataclass(frozen=True, slots=True)
class Traverse:
    """Loss and Hessian along the gradient; ``steps`` are multiples of it, negative ones lead downhill."""

    steps: tuple[float, ...]
    losses: tuple[float, ...]
    extremes: tuple[Extremes, ...]
    gradient_norm: float

    @property
    def condition_numbers(self) -> tuple[float, ...]:
        """Eq. 6 at each step."""
        return tuple(extremes.condition_number for extremes in self.extremes)

    @property
    def mean(self) -> float:
        """The condition number by which EKG judges a sub-network: the mean over all steps (A.3)."""
        return math.fsum(self.condition_numbers) / len(self.steps)


def gradient_direction_condition(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    batch_norm: BatchNorm = "batch",
    reach: float = 0.1,
    points: int = 21,
    iterations: int = 15,
    tolerance: float = 1e-3,
) -> Traverse:
    """Eq. 6 at ``points`` evenly spaced weights w + t g with t from -reach to reach (EKG, A.3).

    g is the gradient of the loss at the network's own weights w, as it is: neither normalised nor scaled
    by the weights. The paper says 0.1 times the gradient, 21 points and their mean. It does not say what
    is chosen here: g is the gradient of the same loss on the same images; both ends and, for an odd number
    of points, the middle t = 0 are among the points; "minimum and maximum" are by sign, since those by size
    would make a convex loss fluctuate; the Hessian is that of all parameters, batch-norm's too; the mean is
    arithmetic. Its images are not named either; its search would give the validation set.

    A point costs at most ``iterations`` products of about three training steps each. Lanczos starts from the
    eigenvectors of the point before with a random part, so that few products follow them along the line;
    the first point, which has none before it, is given three times ``iterations``. Raises what
    :func:`objective` and :func:`extreme_eigenvalues` do.
    """
    loss = objective(network, images, labels, batch_norm)
    origin = loss.origin()
    gradient = loss.expand(origin).gradient
    start = unit(origin, generator)
    losses: list[float] = []
    found: list[Extremes] = []
    steps = even(reach, points)
    for step in steps:
        here = loss.expand(origin + step * gradient)
        allowed = iterations if found else _COLD * iterations
        extremes, between = _lanczos(here.hessian_vector, start, allowed, tolerance)
        losses.append(here.loss)
        found.append(extremes)
        start = between + _FRESH * unit(origin, generator)
    return Traverse(steps, tuple(losses), tuple(found), float(gradient.norm()))


def even(reach: float, points: int) -> tuple[float, ...]:
    """Evenly spaced numbers from -reach to reach; a single one is 0."""
    if points < 1 or not reach > 0:
        raise UsageError(f"points = {points}, reach = {reach}: both must be above 0")
    middle = (points - 1) / 2
    return tuple(reach * (index - middle) / middle if middle else 0.0 for index in range(points))
