"""The Stein variational direction of a set of particles (Eqs 14 and 15, Algorithm 1 lines 2 and 7).

KL(q || p(Theta | Y, X)) of Eq. 13 is not computed. Moving every particle by a small step along a function
phi changes it at a rate that is lowest, among the functions of unit norm of the kernel's space, for
(Liu and Wang, 2016)

    phi(x) = E over y ~ q of [ k(y, x) grad_y log p(y | Y, X) + grad_y k(y, x) ]                     (14)

and with q the N particles themselves, k(y, x) = exp(-||x - y||^2 / h), K_ij = k(x_j, x_i), s_j = grad log p
at particle j,

    grad_{x_j} k(x_j, x_i) = (2 / h) K_ij (x_i - x_j)
    phi_i = (1/N) sum_j K_ij s_j  +  (1/N) (2/h) sum_j K_ij (x_i - x_j)
          = (1/N) [ (K s)_i       +  (2/h) ((sum_j K_ij) x_i - (K x)_i) ]

The first sum draws every particle up the posterior, by its neighbours' scores too; the second pushes it away
from its neighbours. The scores need log p up to a constant only. Training descends along

    grad J = grad L - beta phi                                                                       (15)

The paper writes S with either sign; descending Eq. 13 moves Theta by +beta phi, as here. Any minus sign in
front of phi would push particles together and down the posterior.

The kernel, a deviation. Algorithm 1 (line 2) has one kernel over all weights of both networks with h = log 2:
``"paper"``. Networks differ by ||x_0 - x_1||^2 of far more than log 2, K_01 is then exactly zero in float32
and with it the push: two maximisers that do not know of each other. The median heuristic (Liu and Wang,
2016) is h = med^2 / log N with med the median distance of two particles; for N = 2 this is exp(-log 2
||x_0 - x_1||^2 / med^2) = 1/2, the same as the paper's exponent but for the median and for a factor
log^2 2, and the push of each on the other is log 2 / (2 med), whatever the dimension.

What a kernel spans is the other choice. ``"median"`` has one for each block, a parameter tensor, with its own
bandwidth; ``"whole"`` one over all blocks; ``"each"`` one for every single number. Under a kernel over D
numbers the push per number falls as 1 / D against the score, so that few particles are too close: two on a
D-dimensional standard normal settle with half their distance at sqrt(log 2) = 0.83 (pull a / 4, push log 2 /
(4 a) at x = +-a), in whatever D, where sqrt(D) would be right. Under ``"each"`` it is 0.83 for every number.
The price of kernels of parts: the particles' parts are tied to each other by the scores alone. The marginals
come out near, correlations between parts are not to be read from the particles (Zhuo et al., 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from optpipe.errors import RunError

Kernel = Literal["median", "whole", "each", "paper"]
Particle = Mapping[str, Tensor]
"""One network's parameters, or their scores: a tensor for each block."""

NEAREST = 1e-3


@torch.no_grad()
def directions(
    particles: Sequence[Particle],
    scores: Sequence[Particle],
    kernel: Kernel = "median",
    *,
    bandwidth: float | None = None,
    nearest: float = NEAREST,
) -> list[dict[str, Tensor]]:
    """The Stein direction of each of N particles, block by block (Eq. 14), to be gone along upwards.

    ``scores`` are the gradients of log p at each, in the same blocks. ``kernel`` says what one kernel spans
    (see the top of this file). ``bandwidth`` is h for every kernel; None takes the median's, or the paper's.
    ``nearest`` bounds the median distance from below: the push, which grows as one over the distance, is then
    at most about one over ``nearest``. Particles that coincide exchange their scores and do not push.

    Nothing of size (N, N, D) is formed but under ``"each"``. Raises RunError for fewer than two particles or
    blocks that differ.
    """
    _check(particles, scores)
    return _moved(particles, _stacked(scores), kernel, bandwidth, nearest)


@torch.no_grad()
def repulsions(
    particles: Sequence[Particle],
    kernel: Kernel = "median",
    *,
    bandwidth: float | None = None,
    nearest: float = NEAREST,
) -> list[dict[str, Tensor]]:
    """The second sum of Eq. 14 alone, the push of the particles on each other; arguments as before."""
    _check(particles, particles)
    return _moved(particles, {}, kernel, bandwidth, nearest)


@torch.no_grad()
def gram(
    positions: Tensor, bandwidth: float | None = None, nearest: float = NEAREST
) -> tuple[Tensor, Tensor]:
    """K (..., N, N) and h (..., 1, 1) of positions (..., N, D); None takes h by the median.

    Leading dimensions are so many separate sets of particles.
    """
    return _gram(_squared_distances(positions), bandwidth, nearest)


@torch.no_grad()
def field(
    positions: Tensor, scores: Tensor, bandwidth: float | None = None, nearest: float = NEAREST
) -> Tensor:
    """The Stein direction (..., N, D) of positions and scores (..., N, D), one kernel for each set (Eq. 14).

    What :func:`directions` does for a block, for many sets of particles at once.
    """
    centred = _centred(positions)
    return _field(centred, scores, *gram(centred, bandwidth, nearest))


def _moved(
    particles: Sequence[Particle],
    scores: Mapping[str, Tensor],
    kernel: Kernel,
    bandwidth: float | None,
    nearest: float,
) -> list[dict[str, Tensor]]:
    """Eq. 14 for every block; without ``scores`` its push alone."""
    xs = {name: _centred(x) for name, x in _stacked(particles).items()}
    if kernel == "each":
        found = {name: _each(x, scores.get(name), bandwidth, nearest) for name, x in xs.items()}
    else:
        kernels = _kernels(xs, kernel, bandwidth, nearest)
        found = {name: _field(x, scores.get(name), *kernels[name]) for name, x in xs.items()}
    return _unstacked(found, particles)


def _field(centred: Tensor, scores: Tensor | None, weights: Tensor, h: Tensor) -> Tensor:
    """Eq. 14 for K = ``weights``, the last line of the derivation, with (``scores``) or without its pull."""
    count = centred.shape[-2]
    apart = torch.diag_embed(weights.sum(dim=-1)) - weights
    push = (2 / h / count * apart) @ centred
    return push if scores is None else push + (weights / count) @ scores.to(push)


def _each(x: Tensor, scores: Tensor | None, bandwidth: float | None, nearest: float) -> Tensor:
    """Eq. 14 for positions (N, D) with a kernel for each of the D numbers, its second line."""
    count = len(x)
    apart = x.unsqueeze(1) - x
    squares = apart.square()
    if bandwidth is None:
        rows, columns = torch.triu_indices(count, count, 1, device=x.device)
        h = squares[rows, columns].median(dim=0).values.clamp(min=nearest**2) / math.log(count)
    else:
        h = x.new_full((), bandwidth)
    weights = torch.exp(-squares / h)
    push = (weights * apart).sum(dim=1) * (2 / h)
    total = push if scores is None else push + (weights * scores.to(push)).sum(dim=1)
    return total / count


def _kernels(
    xs: Mapping[str, Tensor], kernel: Kernel, bandwidth: float | None, nearest: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """The kernel (K, h) of every block (N, D)."""
    squares = {name: _squared_distances(x) for name, x in xs.items()}
    if kernel == "median":
        return {name: _gram(square, bandwidth, nearest) for name, square in squares.items()}
    if kernel == "paper" and bandwidth is None:
        bandwidth = math.log(2)
    first = next(iter(squares.values()))
    total = torch.stack([square.to(first) for square in squares.values()]).sum(dim=0)
    weights, h = _gram(total, bandwidth, nearest)
    return {name: (weights.to(x), h.to(x)) for name, x in xs.items()}


def _gram(squares: Tensor, bandwidth: float | None, nearest: float) -> tuple[Tensor, Tensor]:
    """K and h of squared distances (..., N, N)."""
    count = squares.shape[-1]
    if bandwidth is None:
        rows, columns = torch.triu_indices(count, count, 1, device=squares.device)
        median = squares[..., rows, columns].median(dim=-1).values
        h = median.clamp(min=nearest**2)[..., None, None] / math.log(count)
    else:
        h = squares.new_full((*squares.shape[:-2], 1, 1), bandwidth)
    return torch.exp(-squares / h), h


def _squared_distances(positions: Tensor) -> Tensor:
    """(..., N, N) from (..., N, D), by differences: the expanded square cancels where particles are near."""
    if positions.shape[-1] == 1:
        return (positions - positions.transpose(-1, -2)).square()
    return torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist").square()


def _centred(positions: Tensor) -> Tensor:
    """About the particles' mean: the push is a difference of two sums, and would lose its digits far out."""
    return positions - positions.mean(dim=-2, keepdim=True)


def _stacked(particles: Sequence[Particle]) -> dict[str, Tensor]:
    """Every block as (N, D), in float32 at least."""
    return {
        name: torch.stack([_wide(particle[name]).flatten() for particle in particles])
        for name in particles[0]
    }


def _unstacked(found: Mapping[str, Tensor], particles: Sequence[Particle]) -> list[dict[str, Tensor]]:
    """Rows (N, D) of each block back in the blocks' shapes and types."""
    return [
        {name: rows[i].view(particle[name].shape).to(particle[name].dtype) for name, rows in found.items()}
        for i, particle in enumerate(particles)
    ]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check(particles: Sequence[Particle], scores: Sequence[Particle]) -> None:
    if len(particles) < 2:
        raise RunError(f"Stein's direction is among particles: at least two, not {len(particles)}")
    if len(scores) != len(particles):
        raise RunError(f"{len(particles)} particles have {len(scores)} scores: one for each is needed")
    wanted = {name: block.shape for name, block in particles[0].items()}
    for i, other in enumerate((*particles, *scores)):
        shapes = {name: block.shape for name, block in other.items()}
        if shapes != wanted:
            kind, number = ("particle", i) if i < len(particles) else ("score", i - len(particles))
            differing = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
            raise RunError(f"{kind} {number} differs from particle 0 in its blocks {differing}")
