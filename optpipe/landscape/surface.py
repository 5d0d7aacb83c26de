"""The loss on a plane through the weights (EKG, Fig. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from optpipe.errors import RunError
from optpipe.landscape.objective import BatchNorm, Objective, objective
from optpipe.landscape.spectrum import even, unit

Scale = Literal["gradient", "filter"]


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
    steps = even(reach, points)
    values = tuple(tuple(loss.loss(origin + x * along + y * across) for x in steps) for y in steps)
    return Surface(steps, steps, values, scale)


def directions(loss: Objective, generator: torch.Generator, scale: Scale) -> tuple[Tensor, Tensor]:
    """The gradient (P,) and a random direction orthogonal to it, scaled as :func:`surface` says."""
    origin = loss.origin()
    gradient = loss.expand(origin).gradient
    if not bool(gradient.any()):
        raise RunError("the gradient is 0, so there is no gradient direction; give other images")
    other = unit(origin, generator)
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
