"""Which layers a step tries, and how many filters each would lose."""

from __future__ import annotations

from collections.abc import Sequence

TRIM = 0.1
"""The share of the layers that is left out at either end before the threshold is sought."""


def tried(sums: Sequence[float], most: int = 0) -> tuple[int, ...]:
    """The indices of the layers whose summed low scores are not above the trimmed Otsu threshold.

    Greedy search need not evaluate a layer whose cheapest filters are already costly. At least the lowest
    one is tried, and of more than ``most`` (0 is no limit) the lowest.
    """
    limit = trimmed_otsu(sums)
    below = [index for index, value in enumerate(sums) if value <= limit]
    if most and len(below) > most:
        below = sorted(sorted(below, key=sums.__getitem__)[:most])
    return tuple(below)


def trimmed_otsu(values: Sequence[float]) -> float:
    """The threshold between the two classes that Otsu's method finds in values without their extremes.

    Otsu (1979) maximises the variance between the two classes; here on the sorted values themselves, no
    histogram. A few values far above the rest would make a class of their own and leave the others
    together, so a share :data:`TRIM` is left out at both ends. The threshold is the lower class's largest
    value; of fewer than three values it is the largest.
    """
    ordered = sorted(values)
    cut = int(TRIM * len(ordered))
    ordered = ordered[cut : len(ordered) - cut]
    if len(ordered) < 3:
        return ordered[-1]
    total, below = sum(ordered), 0.0
    best, threshold = -1.0, ordered[-1]
    for count, value in enumerate(ordered[:-1], start=1):
        below += value
        others = len(ordered) - count
        between = count * others * (below / count - (total - below) / others) ** 2
        if between > best:
            best, threshold = between, value
    return threshold


def fewer(channels: int, ratio: float, tied: int, blocks: int) -> int:
    """How many of a group's channels stay when it loses the share ``ratio`` of them; at least one goes.

    Removing a channel of a group of several layers tied by a residual sum takes a filter from each, so that
    its share is divided by their number. Of ``blocks`` equal runs each keeps equally many.
    """
    left = channels - max(1, round(channels * ratio / tied))
    return left - left % blocks


def ascending(kept: Sequence[int], scores: Sequence[float], channels: int, blocks: int) -> list[int]:
    """The kept channels, the lowest score first; with several blocks, one of each block in turn."""
    ordered = sorted(kept, key=scores.__getitem__)
    size = channels // blocks
    rank: dict[int, int] = {}
    seen = [0] * blocks
    for channel in ordered:
        rank[channel] = seen[channel // size]
        seen[channel // size] += 1
    return sorted(ordered, key=rank.__getitem__)
