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
WELL_BELOW = 0.75
"""Down to this share of the lowest count that is clearly faster a group still has that count."""


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
        """The counts that are clearly faster than the rung above them: those that no noise makes."""
        found: list[Rung] = []
        best = 0.0
        for rung in self.timed:
            if rung.low > best:
                found.append(rung)
                best = rung.high
        return tuple(found)

    @property
    def lowest(self) -> int:
        """The smallest count that the search may go to; all channels where no smaller count is faster."""
        return self.rungs[-1].count if self.rungs else self.channels

    def below(self, count: int, wanted: int) -> int | None:
        """The rung below ``count`` that is nearest to ``wanted``; None where there is none."""
        lower = [rung.count for rung in self.rungs if rung.count < count]
        return min(lower, key=lambda c: (abs(c - wanted), c), default=None)

    def saving(self, group: int, count: int) -> float:
        """What a group saves at a count: that of the lowest rung that is not below it."""
        above = [rung.saving for rung in self.rungs if rung.count >= count]
        return self.shares[self.groups.index(group)] * max([0.0, *above])


def classes(widths: graph.WidthMap) -> list[tuple[int, ...]]:
    """The indices of the groups of each class: equally many channels, alone or tied to other layers."""
    found: dict[tuple[int, bool, bool, int], list[int]] = {}
    for index, (group, blocks, tied) in enumerate(
        zip(widths.groups, widths.blocks, widths.tied, strict=True)
    ):
        # Channels that a depthwise convolution carries on cost otherwise than those that are read at once.
        carried = len(group.layers) > tied
        found.setdefault((group.channels, tied > 1, carried, blocks), []).append(index)
    return [tuple(members) for members in found.values()]


def counts(channels: int, blocks: int) -> tuple[int, ...]:
    """The counts of a width to time, descending: the seven between its eighths, all of them below eight."""
    parts = (channels * part // PROBES for part in range(1, PROBES))
    return tuple(sorted({count - count % blocks for count in parts} - {0}, reverse=True))


def measure(
    widths: graph.WidthMap, costs: graph.Costs
) -> Generator[Sequence[Request], Sequence[Answer], tuple[Ladder, ...]]:
    """The counts that the target executes well, for every class of groups."""
    groups = widths.groups
    whole = [group.channels for group in groups]
    _, macs = costs.of(whole)
    narrowest = widths.blocks
    saved = [
        macs - costs.of([*whole[:index], narrowest[index], *whole[index + 1 :]])[1]
        for index in range(len(groups))
    ]
    found = classes(widths)
    asked = [counts(groups[members[0]].channels, widths.blocks[members[0]]) for members in found]
    asks = [
        Ask(_plan(widths, members, count))
        for members, those in zip(found, asked, strict=True)
        for count in those
    ]
    trials = iter(cast("Sequence[Trial]", (yield asks)))
    return tuple(
        _ladder(groups, members, saved, [(count, next(trials)) for count in those])
        for members, those in zip(found, asked, strict=True)
    )


def _plan(widths: graph.WidthMap, members: Sequence[int], count: int) -> Plan:
    """All groups of a class at a count. Latency does not depend on which channels stay."""
    keep = []
    for index in members:
        group = widths.groups[index]
        keep.append((group.name, first(group.channels, widths.blocks[index], count)))
    return Plan(keep_channels=tuple(keep))


def _ladder(
    groups: Sequence[ChannelGroup],
    members: Sequence[int],
    macs: Sequence[int],
    trials: Sequence[tuple[int, Trial]],
) -> Ladder:
    """A class's ladder from its counts and their trials; ``macs`` are those that each group could save."""
    timed = []
    for count, trial in trials:
        latency = trial.latency
        assert latency is not None and latency.ratio_to_original is not None
        low, high = cast("tuple[float, float]", latency.ratio_ci95)
        timed.append(Rung(count, 1.0 - latency.ratio_to_original, 1.0 - high, 1.0 - low))
    total = sum(macs[index] for index in members) or 1  # groups of one channel have none to give
    shares = tuple(macs[index] / total for index in members)
    return Ladder(groups[members[0]].channels, tuple(members), shares, tuple(timed))


def rounded(ladders: Sequence[Ladder], counts: Sequence[int], within: float = 1.0) -> tuple[int, ...]:
    """The counts of all groups, each the nearest that the target executes well, of two as near the larger.

    A count that is well below the lowest of them stays as it is: one class alone showed no more time to save
    there, all together may. So does one from which the nearest is further than the share ``within`` of the
    width: of a class that is timed through noise few counts are clearly faster.
    """
    found = list(counts)
    for ladder in ladders:
        rungs = [ladder.channels, *(rung.count for rung in ladder.rungs)]
        for group in ladder.groups:
            if counts[group] > WELL_BELOW * rungs[-1]:
                nearest = min(rungs, key=lambda rung: (abs(rung - counts[group]), -rung))
                if abs(nearest - counts[group]) <= within * ladder.channels:
                    found[group] = nearest
    return tuple(found)


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


def first(channels: int, blocks: int, count: int) -> tuple[int, ...]:
    """The first channels of a whole group, equally many of each block, ``count`` of them in all."""
    size = channels // blocks
    return tuple(block * size + index for block in range(blocks) for index in range(count // blocks))
