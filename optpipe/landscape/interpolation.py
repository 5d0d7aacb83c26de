"""The loss on the straight line between two networks of one structure (PRACTISE, Sec. 3, Figs 3 to 5)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from optpipe import graph
from optpipe.errors import UsageError
from optpipe.types import Plan

T = TypeVar("T")
State = Mapping[str, Tensor]

SHARES = tuple(index / 10 for index in range(-1, 12))
"""Where the paper's lines are looked at: from one end to the other, and a step beyond both."""
# A variance that is carried on beyond its ends stays above this part of the smaller one.
_LEAST_VARIANCE = 0.1


def between(start: State, end: State, share: float) -> dict[str, Tensor]:
    """The state (1 - share) * start + share * end (Eqs 2 and 4); beyond 0 and 1 it goes on straight.

    Batch-norm's running means and variances are mixed like the weights, so that both ends are the networks
    that were scored; the paper does not say what becomes of them. Re-estimating them on the images would
    move the ends. Beyond the ends a variance stays positive. Counters are the start's. Both states hold the
    same names and shapes.
    """
    mixed: dict[str, Tensor] = {}
    for name, first in start.items():
        last = end[name]
        if not first.is_floating_point():
            mixed[name] = first.clone()
            continue
        value = torch.lerp(first, last.to(first), share)
        if name.endswith("running_var"):
            value = torch.maximum(value, _LEAST_VARIANCE * torch.minimum(first, last.to(first)))
        mixed[name] = value
    return mixed


def along(
    network: nn.Module,
    ends: tuple[State, State],
    shares: Sequence[float],
    measure: Callable[[nn.Module], T],
) -> tuple[T, ...]:
    """What ``measure`` says of the network in eval mode at each share of the way between two states.

    Raises UsageError where the states do not hold what the network does.
    """
    start, end = ends
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for state in ends:
        if {name: tensor.shape for name, tensor in state.items()} != own:
            raise UsageError("the two ends of a line must have the network's own names and shapes of weights")
    moving = copy.deepcopy(network).eval()
    found: list[T] = []
    for share in shares:
        moving.load_state_dict(between(start, end, share))
        found.append(measure(moving))
    return tuple(found)


def embed(
    original: fx.GraphModule, plan: Plan, input_shape: tuple[int, int, int], pruned: State
) -> dict[str, Tensor]:
    """A pruned network's state in the original's structure: what the plan took out is zero (Fig. 2, step 1).

    Parameters inside a dropped block and filters that were taken out are zero, and so is what reads those;
    running statistics of what is gone are the original's. It computes what the pruned network does wherever
    parameters of zero make a branch or a channel zero. Raises UsageError as :func:`optpipe.graph.apply`.
    """
    # Surgery on a network whose every number is its own place shows where each number of a candidate lay.
    numbered = copy.deepcopy(original).double()
    for tensor in numbered.state_dict().values():
        places = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
        tensor.copy_(places.view(tensor.shape))
    places_of = graph.apply(numbered, plan, input_shape).state_dict()
    parameters = {name for name, _ in original.named_parameters(remove_duplicate=False)}
    whole = {
        name: torch.zeros_like(tensor) if name in parameters else tensor.clone()
        for name, tensor in original.state_dict().items()
    }
    for name, value in pruned.items():
        whole[name].view(-1)[places_of[name].long().flatten()] = value.flatten().to(whole[name])
    return whole


@dataclass(frozen=True, slots=True)
class Convexity:
    """How a loss between two networks lies to the chord through its ends.

    ``below`` is the share of the points between the ends at or below the chord, 1 where Eqs 3 and 7 hold.
    ``excess`` is the largest height above the chord, a barrier; ``leakage`` the largest depth below it, the
    loss leakage of Eq. 11, found at ``at``. Both are losses, at least 0.
    """

    below: float
    excess: float
    leakage: float
    at: float


def convexity(shares: Sequence[float], losses: Sequence[float]) -> Convexity:
    """How a curve lies to its chord; ``shares`` ascend and hold 0, 1 and something between.

    Points beyond the ends are left out. Raises UsageError without those shares.
    """
    values = dict(zip(shares, losses, strict=True))
    inner = [share for share in values if 0 < share < 1]
    if 0 not in values or 1 not in values or not inner:
        raise UsageError(
            f"convexity is judged between the shares 0 and 1 and inside them; there are {list(shares)}"
        )
    depth = {share: (1 - share) * values[0] + share * values[1] - values[share] for share in inner}
    # What float32 networks' losses are off by is no bend.
    slack = 1e-6 * max(abs(values[0]), abs(values[1]))
    depth = {share: one if abs(one) > slack else 0.0 for share, one in depth.items()}
    deepest = max(depth, key=depth.__getitem__)
    return Convexity(
        below=sum(one >= 0 for one in depth.values()) / len(inner),
        excess=max(0.0, -min(depth.values())),
        leakage=max(0.0, depth[deepest]),
        at=deepest if depth[deepest] > 0 else 0.0,
    )
