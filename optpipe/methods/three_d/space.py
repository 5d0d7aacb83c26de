"""The networks that can be built: how deep, how wide, at which resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from optpipe import graph
from optpipe.methods.three_d.config import Dimension
from optpipe.types import Plan

SIXTEENTHS = 16
"""Widths are tried in steps of one in so many; a layer of 16 channels then loses one at a time."""

Kept = tuple[tuple[str, tuple[int, ...]], ...]
Share = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Level:
    """A network that can be built: blocks dropped, ratio of the channels kept, input size (H, W)."""

    dropped: int
    ratio: float
    size: tuple[int, int]

    def is_within(self, other: Level) -> bool:
        """Whether the other takes out all that this does."""
        return self.dropped <= other.dropped and self.ratio >= other.ratio and self.size >= other.size

    def equals(self, other: Level, dimension: Dimension) -> bool:
        """Whether both take out equally much along a dimension."""
        if dimension == "depth":
            return self.dropped == other.dropped
        return self.ratio == other.ratio if dimension == "width" else self.size == other.size


@dataclass(frozen=True, slots=True)
class Space:
    """What can be taken out of the original along each dimension, and in which order.

    ``blocks`` are all of its units of depth, whether they can be dropped or not; ``order`` those that can,
    the least important first, ``units`` the same in execution order. ``scores`` has the importance of each
    channel of each group of ``widths``; ``sizes`` are those below the original's that it takes, falling.
    """

    input_shape: tuple[int, int, int]
    blocks: int
    units: tuple[str, ...]
    order: tuple[str, ...]
    widths: graph.WidthMap
    scores: tuple[tuple[float, ...], ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def whole(self) -> Level:
        """The original."""
        return Level(0, 1.0, self.input_shape[1:])

    def levels(self, dimension: Dimension) -> tuple[Level, ...]:
        """The networks along one dimension alone, from the mildest to the strongest."""
        if dimension == "depth":
            return tuple(replace(self.whole, dropped=count) for count in range(1, len(self.order) + 1))
        if dimension == "width":
            ratios = [part / SIXTEENTHS for part in range(SIXTEENTHS - 1, 0, -1)]
            return tuple(replace(self.whole, ratio=ratio) for ratio in ratios)
        return tuple(replace(self.whole, size=size) for size in self.sizes)

    def share(self, level: Level) -> Share:
        """(d, w, r) of Eq. 2."""
        return 1.0 - level.dropped / self.blocks, level.ratio, level.size[0] / self.input_shape[1]

    def plan(self, level: Level) -> Plan:
        """What makes the original this network: the least important blocks and channels go."""
        dropped = set(self.order[: level.dropped])
        kept = keep(self.widths, self.scores, level.ratio) if level.ratio < 1 else ()
        return Plan(self.in_order(dropped), kept, self.size_of(level))

    def in_order(self, dropped: Sequence[str] | set[str]) -> tuple[str, ...]:
        """Blocks in execution order, so that equal sets are equal plans."""
        return tuple(name for name in self.units if name in dropped)

    def size_of(self, level: Level) -> tuple[int, int] | None:
        """The plan's resolution; None where it is the original's."""
        return None if level.size == self.whole.size else level.size


def combined(levels: Sequence[Level]) -> Level:
    """What all of these take out together."""
    return Level(
        max(level.dropped for level in levels),
        min(level.ratio for level in levels),
        min(level.size for level in levels),
    )


def counts(widths: graph.WidthMap, ratio: float) -> tuple[int, ...]:
    """How many channels each group keeps at a ratio: at least one of each run, equally many of all runs."""
    return tuple(
        max(blocks, round(group.channels * ratio / blocks) * blocks)
        for group, blocks in zip(widths.groups, widths.blocks, strict=True)
    )


def keep(widths: graph.WidthMap, scores: Sequence[Sequence[float]], ratio: float) -> Kept:
    """The channels that each group keeps at a ratio: those of the largest scores."""
    found = []
    for group, blocks, own, count in zip(
        widths.groups, widths.blocks, scores, counts(widths, ratio), strict=True
    ):
        if count < group.channels:
            found.append((group.name, graph.keep_largest(own, count, blocks)))
    return tuple(found)


def sizes_below(whole: tuple[int, int], step: int) -> list[tuple[int, int]]:
    """The sizes (H, W) of the same shape of which the height is a multiple of the step, falling."""
    height, width = whole
    heights = range((height - 1) // step * step, 0, -step)
    return [(h, max(1, round(width * h / height))) for h in heights]


def default_step(height: int) -> int:
    """The power of two that is nearest above a sixteenth of the height: 2 of 32 pixels, 16 of 224."""
    step = 1
    while step < height / 16:
        step *= 2
    return step
