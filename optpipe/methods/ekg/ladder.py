"""Which channel counts the target executes well: measured, not assumed.

Engines work in blocks of channels, so that many counts cost as much as the next larger block. Groups of
equal width are narrowed together to each of a few counts and timed; a count is a rung where it is clearly
faster than every larger one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

from optpipe import graph
from optpipe.types import Answer, Ask, Cell, ChannelGroup, Plan, Request, Table, Trial

PROBES = 8
"""Into how many equal parts a width is divided: the counts that are timed lie between them."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A channel count of a class of groups and what it saves when all of them have it."""

    count: int
    saving: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ladder:
    """A class of groups of equal width: which they are, and all counts that were timed, descending.

    ``shares`` says which part of the class's saving each of them brings: that of its MACs.
    """

    channels: int
    groups: tuple[int, ...]
    shares: tuple[float, ...]
    timed: tuple[Rung, ...]

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The counts that are clearly faster than every larger one."""
        found: list[Rung] = []
        best = 0.0
        for rung in self.timed:
            if rung.low > best:
                found.append(rung)
                best = rung.high
        return tuple(found)

    def below(self, count: int, wanted: int) -> int | None:
        """The rung below ``count`` that is nearest to ``wanted``; None where there is none."""
        lower = [rung.count for rung in self.rungs if rung.count < count]
        return min(lower, key=lambda c: (abs(c - wanted), c), default=None)

    def saving(self, group: int, count: int) -> float:
        """What a group saves at a count: that of the nearest count timed that is not smaller."""
        above = [rung.saving for rung in self.timed if rung.count >= count]
        return self.shares[self.groups.index(group)] * max([0.0, *above])


def classes(groups: Sequence[ChannelGroup]) -> list[tuple[int, ...]]:
    """The indices of the groups of each class: equally many channels, alone or tied to other layers."""
    found: dict[tuple[int, bool], list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault((group.channels, len(group.layers) > 1), []).append(index)
    return [tuple(members) for members in found.values()]


def counts(channels: int) -> tuple[int, ...]:
    """The counts of a width to time, descending: the seven between its eighths, all of them below eight."""
    return tuple(sorted({channels * part // PROBES for part in range(1, PROBES)} - {0}, reverse=True))


def plan(groups: Sequence[ChannelGroup], members: Sequence[int], count: int) -> Plan:
    """All groups of a class at a count. Latency does not depend on which channels stay."""
    return Plan(keep_channels=tuple((groups[index].name, tuple(range(count))) for index in members))


def _ladder(
    groups: Sequence[ChannelGroup], members: Sequence[int], macs: Sequence[int], trials: Sequence[Trial]
) -> Ladder:
    """A class's ladder from the trials of :func:`counts`; ``macs`` are those that each group could save."""
    channels = groups[members[0]].channels
    timed = []
    for count, trial in zip(counts(channels), trials, strict=True):
        latency = trial.latency
        assert latency is not None and latency.ratio_to_original is not None
        low, high = cast("tuple[float, float]", latency.ratio_ci95)
        timed.append(Rung(count, 1.0 - latency.ratio_to_original, 1.0 - high, 1.0 - low))
    total = sum(macs[index] for index in members)
    return Ladder(channels, tuple(members), tuple(macs[index] / total for index in members), tuple(timed))


def measure(
    groups: Sequence[ChannelGroup], costs: graph.Costs
) -> Generator[Sequence[Request], Sequence[Answer], tuple[Ladder, ...]]:
    """The counts that the target executes well, for every class of groups."""
    found = classes(groups)
    asks = [
        Ask(plan(groups, members, count))
        for members in found
        for count in counts(groups[members[0]].channels)
    ]
    trials = iter(cast("Sequence[Trial]", (yield asks)))
    whole = [group.channels for group in groups]
    _, macs = costs.of(whole)
    saved = [
        macs - costs.of([*whole[:index], 1, *whole[index + 1 :]])[1] for index, group in enumerate(groups)
    ]
    return tuple(
        _ladder(groups, members, saved, [next(trials) for _ in counts(groups[members[0]].channels)])
        for members in found
    )


def table(groups: Sequence[ChannelGroup], ladders: Sequence[Ladder]) -> Table:
    """Every count that was timed, and whether the search may stop there."""
    rows: list[tuple[Cell, ...]] = []
    for one in ladders:
        names = f"{len(one.groups)} of {one.channels} channels ({groups[one.groups[0]].name}, ...)"
        if len(one.groups) == 1:
            names = f"{groups[one.groups[0]].name}, {one.channels} channels"
        for rung in one.timed:
            verdict = "taken" if rung in one.rungs else "passed over: no faster than more channels"
            rows.append((names, rung.count, rung.saving, rung.low, rung.high, verdict))
    columns = ("groups", "channels each", "measured saving", "low", "high", "verdict")
    return Table("Channel counts on this target", columns, tuple(rows))
