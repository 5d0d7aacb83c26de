"""The nested family of networks that thresholds on theta give, and the largest that meets the budget."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optpipe import graph
from optpipe.errors import RunError
from optpipe.methods import _nested
from optpipe.methods._ladder import Ladder, rounded
from optpipe.methods._meter import Meter, Reading
from optpipe.methods.dllp.pressure import Pressure
from optpipe.types import Answer, Plan, Request

MOST = 400
"""Members of a family at most; thresholds in between are passed over."""


@dataclass(frozen=True, slots=True)
class Nested:
    """A member of the family: the threshold, how many units of each set are above it, its predicted cost."""

    threshold: float
    counts: tuple[int, ...]
    predicted: float


@dataclass(frozen=True, slots=True)
class Tried:
    """A member that was built or counted."""

    nested: Nested
    plan: Plan
    reading: Reading
    meets: bool


def family(
    masks: graph.Masks, ranks: Sequence[Tensor], pressure: Pressure, ladders: Sequence[Ladder] = ()
) -> list[Nested]:
    """The networks of falling size; the whole one is not among them.

    With ``ladders`` a group keeps a number of channels that the target executes well
    (:func:`~optpipe.methods._ladder.rounded`).
    """
    values = torch.cat([one.flatten() for one in ranks]).sort().values
    cut = torch.linspace(0, len(values) - 1, min(MOST, len(values))).round().long()
    whole = tuple(shape.numel() for shape in masks.shapes)
    found: list[Nested] = []
    for threshold in dict.fromkeys(values[cut].tolist()):
        kept = masks.above(ranks, threshold)
        counts = tuple(int(mask.sum()) for mask in kept)
        counts = rounded(ladders, counts)
        if counts != whole and not (found and found[-1].counts == counts):
            cost = pressure.cost(torch.tensor(counts, dtype=torch.float64))
            found.append(Nested(threshold, counts, cost))
    return found


def largest(
    masks: graph.Masks,
    ranks: Sequence[Tensor],
    members: Sequence[Nested],
    meter: Meter,
    builds: int,
) -> Generator[Sequence[Request], Sequence[Answer], tuple[Tried, tuple[Tried, ...]]]:
    """The largest member that meets the budget as it is built, and all that were tried.

    Raises:
        RunError: not even the smallest meets it, or none of those that were tried.
    """
    if not members:
        raise RunError("every threshold on theta leaves the whole network: no unit was trained away")

    def plan_of(index: int) -> Plan:
        return masks.plan(masks.highest(ranks, members[index].counts))

    mend = "lower the budget, raise [method] builds, or train for longer"
    found, every = yield from _nested.largest(
        [one.predicted for one in members], plan_of, meter, builds, mend
    )
    tried = {one.index: Tried(members[one.index], one.plan, one.reading, one.meets) for one in every}
    return tried[found.index], tuple(tried.values())
