"""95% intervals of differences between two results, from what their reports hold. Pure."""

from __future__ import annotations

import math
from typing import Protocol

from optpipe.types import Latency, Quality

Ends = tuple[float, float]


class Scored(Protocol):
    """A network's quality, and its agreement with the original where it was taken on the same images."""

    @property
    def quality(self) -> Quality:
        """How well it does."""

    @property
    def agreement(self) -> Quality | None:
        """How often it says what the original says; None where that is not known."""


def difference(first: Quality, second: Quality, disagreements: int | None = None) -> Ends:
    """The interval of ``first`` - ``second``, as fractions: Newcombe's square-and-add of Wilson's.

    Without ``disagreements`` the two are taken as independent (Newcombe 1998, Stat. Med. 17:873, method 10).
    That many images at most are classed differently by two networks that saw the same ones; then it is the
    interval of paired proportions (Stat. Med. 17:2635, method 10). How many images one network alone has
    right is not in a report, but an image that both class alike is right for both or for neither, so the
    number cannot be above ``disagreements``. It is taken as large as it can be, which makes the interval as
    wide as it can be, though never wider than that of independent samples.
    """
    d = first.value - second.value
    phi = 0.0 if disagreements is None else _least_correlation(first, second, disagreements)
    below = math.sqrt(_squared(first.value - first.ci95[0], second.ci95[1] - second.value, phi))
    above = math.sqrt(_squared(second.value - second.ci95[0], first.ci95[1] - first.value, phi))
    return d - below, d + above


def _squared(a: float, b: float, phi: float) -> float:
    return max(0.0, a * a - 2 * phi * a * b + b * b)


def _least_correlation(first: Quality, second: Quality, disagreements: int) -> float:
    """Newcombe's phi with its continuity correction, were the discordant images as many as they can be."""
    n = first.count
    a, b = round(first.value * n), round(second.value * n)
    margins = a * (n - a) * b * (n - b)
    if not margins:
        return 0.0
    # Of the disagreements, first alone is right on a - b more images than second alone is.
    second_alone = max(min((disagreements - (a - b)) // 2, b, n - a), 0, b - a)
    first_alone = second_alone + a - b
    both, neither = a - first_alone, n - b - first_alone
    return max(0.0, both * neither - first_alone * second_alone - n / 2) / math.sqrt(margins)


def disagreements(*networks: Scored) -> int | None:
    """On how many images at most any two of these and their common original differ; None if not known.

    Where two networks both agree with the original they agree with each other.
    """
    total = 0
    for network in networks:
        if network.quality.metric != "top1" or network.agreement is None:
            return None
        total += round((1 - network.agreement.value) * network.agreement.count)
    return total


def quotient(first: Latency, second: Latency) -> tuple[float, Ends] | None:
    """The two ratios to a common original, one divided by the other, and its interval.

    The two runs' errors are independent: logarithms' distances to their ends add as squares (the same
    square-and-add). None where a latency was not timed beside its original.
    """
    if first.ratio_to_original is None or second.ratio_to_original is None:
        return None
    if first.ratio_ci95 is None or second.ratio_ci95 is None:
        return None
    f, s = math.log(first.ratio_to_original), math.log(second.ratio_to_original)
    f_low, f_high = (math.log(end) for end in first.ratio_ci95)
    s_low, s_high = (math.log(end) for end in second.ratio_ci95)
    low = f - s - math.hypot(f - f_low, s_high - s)
    high = f - s + math.hypot(f_high - f, s - s_low)
    return math.exp(f - s), (math.exp(low), math.exp(high))
