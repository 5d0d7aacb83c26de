"""What presses units out of a network: the cost of the channels that are expected to stay.

Nothing in Eqs 9 to 13 prefers a small network: the spike gains by itself no more than its theta says. So
structures z have a prior p(z) proportional to exp(-mu C(z)), with C the network's cost as a fraction of the
original's. To first order that lowers the log-odds of a unit by mu times what it costs,

    theta_g = sigmoid(phi_g - mu c_g),    c_g the unit's cost, of mean 1 over all units,

with phi_g the evidence for the unit that training gathers; sharpened, the log-odds are s times that. mu is
not tuned: it is what brings the expected cost C(theta) down to what is allowed, solved for at every step, or
up to the budget's, being negative, where the evidence alone would leave less: few images do not pay for the
weights of many units (the spike gains n_g log(epsilon / lambda) for one that closes), and a network that is
asked to be 20% faster is to be the best of those, not the smallest that explains its images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from optpipe import graph
from optpipe.methods._ladder import Ladder

MOST = 200.0
"""The largest mu, of either sign: beyond it theta is 0 or 1 in any type."""
HALVINGS = 40


class Pressure(Protocol):
    """The expected cost of a network."""

    def cost(self, counts: Tensor) -> float:
        """The cost, a fraction of the original's, where each set keeps so many units, whole or not."""


@dataclass(frozen=True, slots=True)
class Sized:
    """MACs or parameters of a network of so many channels, by arithmetic."""

    costs: graph.Costs
    what: Literal["MACs", "parameters"]
    whole: float

    def cost(self, counts: Tensor) -> float:
        """A fraction of the original's."""
        parameters, macs = self.costs.expected(counts)
        return float(macs if self.what == "MACs" else parameters) / self.whole


@dataclass(frozen=True, slots=True)
class Timed:
    """The latency of each channel count: lines between the counts that the target executes well.

    A count between two of them costs as much as the larger one when it is built; the line leads on to the
    next that is faster. What groups save adds up here; what a network really takes is measured when it is
    built.
    """

    ladders: tuple[Ladder, ...]

    def cost(self, counts: Tensor) -> float:
        """A fraction of the original's."""
        kept = counts.tolist()
        saved = (
            share * along(ladder, kept[group])
            for ladder in self.ladders
            for group, share in zip(ladder.groups, ladder.shares, strict=True)
        )
        return 1.0 - sum(saved)


@dataclass(frozen=True, slots=True)
class Kept:
    """The share of the single weights that stay."""

    total: int

    def cost(self, counts: Tensor) -> float:
        """Between 0 and 1."""
        return float(counts.sum()) / self.total


def along(ladder: Ladder, count: float) -> float:
    """What a class saves at a number of channels that need not be whole; below the lowest rung no more."""
    points = [(ladder.channels, 0.0), *((rung.count, rung.saving) for rung in ladder.rungs)]
    saving = 0.0
    for (above, more), (below, less) in itertools.pairwise(points):
        saving += (less - more) / (above - below) * (above - min(max(count, below), above))
    return saving


def unit_costs(pressure: Pressure, sizes: Sequence[int]) -> list[float]:
    """c of the units of each set: what half of them cost, each; of mean 1 over all units.

    Units that save nothing have 0 and are never pressed out.
    """
    whole = torch.tensor(sizes, dtype=torch.float64)
    full = pressure.cost(whole)
    found = []
    for index, size in enumerate(sizes):
        half = whole.clone()
        half[index] = size / 2
        found.append(max(0.0, full - pressure.cost(half)) / (size / 2))
    mean = sum(cost * size for cost, size in zip(found, sizes, strict=True)) / sum(sizes)
    return [cost / mean if mean > 0 else 1.0 for cost in found]


def multiplier(cost: Callable[[float], float], least: float, most: float) -> float:
    """The mu nearest to 0 at which the expected cost, falling in mu, is neither below nor above the two.

    Where none of at most :data:`MOST` is, the one that comes nearest to it.
    """
    free = cost(0.0)
    if least <= free <= most:
        return 0.0
    low, high, wanted = (0.0, MOST, most) if free > most else (-MOST, 0.0, least)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > wanted else (low, middle)
    return high
