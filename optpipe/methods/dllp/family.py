"""The nested family of networks that thresholds on theta give, and the largest that meets the budget."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from optpipe import graph
from optpipe.errors import RunError
from optpipe.methods._ladder import Ladder
from optpipe.methods._meter import Meter, Reading
from optpipe.methods.dllp.pressure import Pressure
from optpipe.types import Answer, Plan, Request, Trial

MOST = 400
"""Members of a family at most; thresholds in between are passed over."""
WELL_BELOW = 0.75
"""Down to this share of the lowest count that is clearly faster a group still has that count."""


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

    With ``ladders`` a group keeps the nearest number of channels that the target executes well, of two
    equally near the larger; or any number that is well below the lowest of them, where one layer alone
    showed no more time to save, so that the family does not end there.
    """
    values = torch.cat([one.flatten() for one in ranks]).sort().values
    cut = torch.linspace(0, len(values) - 1, min(MOST, len(values))).round().long()
    whole = tuple(shape.numel() for shape in masks.shapes)
    found: list[Nested] = []
    for threshold in dict.fromkeys(values[cut].tolist()):
        kept = masks.above(ranks, threshold)
        counts = tuple(int(mask.sum()) for mask in kept)
        for ladder in ladders:
            counts = _on_rungs(ladder, counts, masks)
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

    It begins where the cost is predicted to meet it, goes on in growing strides until one meets the budget
    and a larger one does not, and halves what is between them.

    Raises:
        RunError: not even the smallest meets it, or none of those that were tried.
    """
    if not members:
        raise RunError("every threshold on theta leaves the whole network: no unit was trained away")
    tried: dict[int, Tried] = {}

    def attempt(index: int) -> Generator[Sequence[Request], Sequence[Answer], bool]:
        nested = members[index]
        plan = masks.plan(masks.highest(ranks, nested.counts))
        (answer,) = yield [meter.ask(plan)]
        reading = meter.read(cast(Trial, answer))
        tried[index] = Tried(nested, plan, reading, meter.meets(reading))
        return tried[index].meets

    last = len(members) - 1
    at = next((index for index, one in enumerate(members) if one.predicted <= meter.allowed), last)
    meets = yield from attempt(at)
    above, below = (-1, at) if meets else (at, len(members))  # the last too large, the first small enough
    stride = 1
    while len(tried) < builds and below - above > 1:
        if below == len(members):
            at = min(last, above + stride)
        elif above == -1:
            at = max(0, below - stride)
        else:
            at = (above + below) // 2
        stride *= 2
        if (yield from attempt(at)):
            below = at
        else:
            above = at
    order = tuple(tried[index] for index in sorted(tried))
    if below == len(members):
        least = min(order, key=lambda one: one.reading.high)
        raise RunError(
            f"no network of the family meets the budget: the smallest that was tried leaves "
            f"{least.reading.ratio:.1%} ({least.reading.low:.1%} to {least.reading.high:.1%}) of the "
            f"{meter.what}, {meter.allowed:.1%} is allowed; lower the "
            "budget, raise [method] builds, or train for longer"
        )
    return tried[below], order


def _on_rungs(ladder: Ladder, counts: tuple[int, ...], masks: graph.Masks) -> tuple[int, ...]:
    found = list(counts)
    rungs = [ladder.channels, *(rung.count for rung in ladder.rungs)]
    for group in ladder.groups:
        if counts[group] > WELL_BELOW * rungs[-1]:
            found[group] = min(rungs, key=lambda rung: (abs(rung - counts[group]), -rung))
    return tuple(found)
