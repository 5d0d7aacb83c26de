"""How smooth the loss is around a network's weights: condition number and surface (EKG, 3.1, 4.1 and A.3).

Pure: every function works on a copy of the network, whose weights, buffers, modes and gradients stay as they
were. Work is done where the network's parameters are, in their precision; float32 is enough.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optpipe.errors import RunError, UsageError

BatchNorm = Literal["batch", "running"]
Scale = Literal["gradient", "filter"]
Product = Callable[[Tensor], Tensor]

# How many times the iterations of the others the first point of a line gets.
_COLD = 3
# How much of a start that is taken over from the point before is random: an eigenvector that it lacks would
# never be found.
_FRESH = 0.2


# ---------------------------------------------------------------- the loss as a function of the weights


@dataclass(frozen=True, slots=True)
class Expansion:
    """The loss, its gradient (P,) and its Hessian's product with a vector (P,), at one point.

    ``hessian_vector`` differentiates twice and keeps the graph of the first time for all its calls: about
    the memory of a training step, thrice. Not JSON-able.
    """

    loss: float
    gradient: Tensor
    hessian_vector: Product


@dataclass(frozen=True, slots=True)
class Objective:
    """The mean cross-entropy on fixed images as a function of all P parameters, as one vector (P,).

    Make it with :func:`objective`. Not JSON-able.
    """

    network: nn.Module
    images: Tensor
    labels: Tensor

    def origin(self) -> Tensor:
        """The network's own parameters, in the order of ``named_parameters``."""
        return nn.utils.parameters_to_vector(self.network.parameters()).detach()

    def loss(self, at: Tensor) -> float:
        """The loss where the parameters are ``at``."""
        with torch.no_grad():
            return float(self._loss(at))

    def expand(self, at: Tensor) -> Expansion:
        """The loss to second order where the parameters are ``at``.

        Raises RunError where the loss or its gradient is no finite number.
        """
        point = at.detach().clone().requires_grad_()
        loss = self._loss(point)
        (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        if not bool(loss.isfinite()) or not bool(slope.isfinite().all()):
            raise RunError(
                f"the loss is {float(loss.detach()):g} at this point of the landscape and has no finite "
                "gradient; look less far around the weights (reach)"
            )

        def hessian_vector(vector: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(slope, point, vector, retain_graph=True, materialize_grads=True)
            return product

        return Expansion(float(loss.detach()), slope.detach(), hessian_vector)

    def _loss(self, at: Tensor) -> Tensor:
        parameters = dict(self.network.named_parameters())
        parts = torch.split(at, [parameter.numel() for parameter in parameters.values()])
        values = {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(parameters.items(), parts, strict=True)
        }
        logits = torch.func.functional_call(self.network, values, (self.images,))
        return F.cross_entropy(logits, self.labels)


def objective(
    network: nn.Module, images: Tensor, labels: Tensor, batch_norm: BatchNorm = "batch"
) -> Objective:
    """The loss of a copy of ``network`` on ``images`` (N, C, H, W) with classes ``labels`` (N,).

    ``batch_norm``: "batch" normalises by the mean and variance of these N images together, as EKG's search
    does; "running" by the stored ones, as the network deploys. All else is in eval mode.
    Raises UsageError where images and labels are not equally many or the network has no parameters.
    """
    if labels.shape != images.shape[:1] or not len(images):
        raise UsageError(
            f"{len(images)} images and labels of shape {tuple(labels.shape)}: one label an image"
        )
    own = copy.deepcopy(network).eval().requires_grad_(True)
    first = next(own.parameters(), None)
    if first is None:
        raise UsageError(f"{type(network).__name__} has no parameters, so its loss has no landscape")
    if batch_norm == "batch":
        for module in own.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                # Without stored statistics a layer uses the batch's, also in eval mode.
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
    return Objective(own, images.to(first.device, first.dtype), labels.to(first.device))


# ---------------------------------------------------------------- eigenvalues


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


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """A unit vector of random direction; drawn on the generator's device, so that others give the same."""
    drawn = torch.randn(like.shape, generator=generator, device=generator.device)
    return F.normalize(drawn.to(like), dim=0)


# ---------------------------------------------------------------- condition number


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
        _random(origin, generator),
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
    start = _random(origin, generator)
    losses: list[float] = []
    found: list[Extremes] = []
    steps = _even(reach, points)
    for step in steps:
        here = loss.expand(origin + step * gradient)
        allowed = iterations if found else _COLD * iterations
        extremes, between = _lanczos(here.hessian_vector, start, allowed, tolerance)
        losses.append(here.loss)
        found.append(extremes)
        start = between + _FRESH * _random(origin, generator)
    return Traverse(steps, tuple(losses), tuple(found), float(gradient.norm()))


def _even(reach: float, points: int) -> tuple[float, ...]:
    """Evenly spaced numbers from -reach to reach; a single one is 0."""
    if points < 1 or not reach > 0:
        raise UsageError(f"points = {points}, reach = {reach}: both must be above 0")
    middle = (points - 1) / 2
    return tuple(reach * (index - middle) / middle if middle else 0.0 for index in range(points))


# ---------------------------------------------------------------- surface


@dataclass(frozen=True, slots=True)
class Surface:
    """The loss on a grid: ``values[j][i]`` at x[i] times the gradient's direction plus y[j] times the other.

    A value is infinite or NaN where the loss was.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    scale: Scale

    @property
    def fluctuation(self) -> float:
        """How far the surface is from a smooth bowl, in units of the loss.

        The root mean square distance from the quadratic function of x and y that fits it best; infinite
        where a value is not finite. The paper shows its surfaces and gives no such figure.
        """
        values = torch.tensor(self.values, dtype=torch.float64)
        if not bool(values.isfinite().all()):
            return math.inf
        y, x = torch.meshgrid(
            torch.linspace(-1, 1, len(self.y), dtype=torch.float64),
            torch.linspace(-1, 1, len(self.x), dtype=torch.float64),
            indexing="ij",
        )
        terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1).reshape(-1, 6)
        wanted = values.reshape(-1, 1)
        fit = terms @ torch.linalg.lstsq(terms, wanted, driver="gelsd").solution
        return float((wanted - fit).square().mean().sqrt())


def surface(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    batch_norm: BatchNorm = "batch",
    reach: float = 0.1,
    points: int = 21,
    scale: Scale = "gradient",
) -> Surface:
    """The loss on ``points`` x ``points`` weights around the network's own (EKG, 4.1 and Fig. 4).

    One direction is the gradient, the other is random and orthogonal to it. ``scale``: "gradient" leaves
    the gradient as it is and gives the other its norm, so that x is what
    :func:`gradient_direction_condition` calls t; "filter" gives each filter of both the norm that it has
    in the network, and biases and batch-norm none, so that networks whose weights differ in size compare
    (Li et al., "Visualizing the loss landscape of neural nets", section 4); try reach = 1 there. Both run
    from -reach to reach; the paper says neither how far nor how scaled. Raises what :func:`objective` does,
    and RunError where the gradient is 0.
    """
    loss = objective(network, images, labels, batch_norm)
    origin = loss.origin()
    along, across = directions(loss, generator, scale)
    steps = _even(reach, points)
    values = tuple(tuple(loss.loss(origin + x * along + y * across) for x in steps) for y in steps)
    return Surface(steps, steps, values, scale)


def directions(loss: Objective, generator: torch.Generator, scale: Scale) -> tuple[Tensor, Tensor]:
    """The gradient (P,) and a random direction orthogonal to it, scaled as :func:`surface` says."""
    origin = loss.origin()
    gradient = loss.expand(origin).gradient
    if not bool(gradient.any()):
        raise RunError("the gradient is 0, so there is no gradient direction; give other images")
    other = _random(origin, generator)
    if scale == "gradient":
        other = _without(other, gradient)
        return gradient, other * (gradient.norm() / other.norm())
    shapes = [parameter.shape for parameter in loss.network.parameters()]
    sizes = [shape.numel() for shape in shapes]
    along, across, weights = (
        [part.view(shape) for part, shape in zip(torch.split(whole, sizes), shapes, strict=True)]
        for whole in (gradient, other, origin)
    )
    # Orthogonal filter by filter, they stay so however each filter is scaled.
    across = [_without(own, part) for own, part in zip(across, along, strict=True)]
    return _like_filters(along, weights), _like_filters(across, weights)


def _without(vector: Tensor, direction: Tensor) -> Tensor:
    """Each row (a whole vector is one) without its part along the same row of ``direction``."""
    rows, along = (t.reshape(1, -1) if t.ndim < 2 else t.flatten(1) for t in (vector, direction))
    for _ in range(2):  # the second time takes the rounding error of the first
        size = along.square().sum(1, keepdim=True)
        share = (rows * along).sum(1, keepdim=True) / torch.where(size > 0, size, 1.0)
        rows = rows - share * along
    return rows.view_as(vector)


def _like_filters(parts: list[Tensor], weights: list[Tensor]) -> Tensor:
    """One vector whose filters have the norms of the weights'; what is no filter is 0."""
    scaled = []
    for part, weight in zip(parts, weights, strict=True):
        if part.ndim < 2:
            scaled.append(torch.zeros_like(part).flatten())
            continue
        rows, norms = part.flatten(1), weight.flatten(1).norm(dim=1, keepdim=True)
        own = rows.norm(dim=1, keepdim=True)
        scaled.append((rows * norms / torch.where(own > 0, own, 1.0)).flatten())
    return torch.cat(scaled)
