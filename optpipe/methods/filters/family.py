"""The networks of one ratio for all groups, from the widest to the narrowest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from optpipe import graph
from optpipe.methods import _ladder as ladder
from optpipe.methods._meter import Meter

PARTS = 400
"""The ratios that are tried are multiples of one in so many."""
WITHIN = 0.25
"""A group is rounded by this share of its width at most, half the way between two counts that lie half a
width apart: further, and the ratio would be one for all groups in name alone."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """A network of the family: the smallest ratio that gives these widths, and what it is predicted to cost.

    ``predicted`` and ``macs`` are fractions of the original's, ``predicted`` of what the budget counts.
    """

    ratio: float
    counts: tuple[int, ...]
    predicted: float
    macs: float


def family(
    widths: graph.WidthMap, costs: graph.Costs, meter: Meter, ladders: Sequence[ladder.Ladder] = ()
) -> list[Uniform]:
    """The networks of rising ratio, narrower each; the whole one is not among them.

    A group of C channels keeps the whole number nearest to (1 - ratio) C that its runs can share, one of each
    at least; with ``ladders`` the nearest that the target executes well, if it is near. Their savings are
    then the prediction of a latency; where they come to too little, or there are none, the MACs are.
    """
    whole = tuple(group.channels for group in widths.groups)
    all_parameters, all_macs = costs.of(whole)
    found: list[Uniform] = []
    for part in range(1, PARTS + 1):
        counts = tuple(
            max(1, round((1 - part / PARTS) * group.channels / runs)) * runs
            for group, runs in zip(widths.groups, widths.blocks, strict=True)
        )
        counts = ladder.rounded(ladders, counts, WITHIN)
        if counts == (found[-1].counts if found else whole):
            continue
        parameters, macs = costs.of(counts)
        predicted = parameters / all_parameters if meter.what == "parameters" else macs / all_macs
        found.append(Uniform(part / PARTS, counts, predicted, macs / all_macs))
    timed = [
        1.0 - sum(one.saving(index, member.counts[index]) for one in ladders for index in one.groups)
        for member in found
    ]
    if not ladders or min(timed, default=1.0) > meter.allowed:
        return found
    return [replace(member, predicted=left) for member, left in zip(found, timed, strict=True)]
