"""Medians and ratios of noisy times, with intervals that can be trusted. Pure.

The ratio is the median of the ratios of neighbouring runs, taken within each of the two orders and
averaged over them: the two orders may differ by more than the noise does (the second run of a pair finds
the first one's data in the caches), and the median of such a two-humped sample would be ill-defined. Its
interval is a moving-block bootstrap over the groups: neighbouring groups are alike on a machine that
others use too, and drawing them one by one would make the interval too narrow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.float64]

RESAMPLES = 1000
"""Bootstrap resamples: the ends of a 95% interval then vary by a few percent of its width."""

SESSION_SD = 0.0013
"""Standard deviation of a ratio from one pair of sessions to the next of the same two engines.

Where a session's memory and threads happen to lie stays with it, so no number of runs of one pair shows
this spread, and an interval without it misses the truth too often. It is the variance of the ratio over 30
fresh pairs of one ResNet-56 engine, less the mean square of their standard errors, on two cores; a rerun of
``benchmarks/clock.py`` gives what it takes to measure it on another machine.
"""


def median(values: Samples) -> float:
    """The middle value, or the mean of the middle two."""
    return float(np.median(values))


def percentile(values: Samples, q: float) -> float:
    """The value below which ``q`` percent lie, interpolated between neighbours."""
    return float(np.percentile(values, q))


def coefficient_of_variation(values: Samples) -> float:
    """Sample standard deviation as a fraction of the mean; 0 for a single value."""
    return float(values.std(ddof=1) / values.mean()) if values.size > 1 else 0.0


def median_interval(values: Samples, rng: np.random.Generator) -> tuple[float, float]:
    """The 95% moving-block bootstrap interval of the median of ``values``, which are in order of time."""
    draws = _block_draws(len(values), rng)
    return _middle_95(np.median(values[draws], axis=1))


def ratio_interval(
    samples_ms: Samples, baseline_first: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[float, tuple[float, float]]:
    """The ratio candidate / baseline of (pairs, 2) samples, and its 95% interval.

    Every two pairs in turn hold one of each order, as :func:`paired` takes them. The mean over the two
    orders is geometric: swapping baseline and candidate gives the reciprocal.
    """
    ratios = np.log(samples_ms[:, 1] / samples_ms[:, 0])
    orders = np.stack([ratios[baseline_first], ratios[~baseline_first]])
    draws = _block_draws(orders.shape[1], rng)
    resampled = np.median(orders[:, draws], axis=2).mean(axis=0)
    low, high = _middle_95(np.exp(resampled))
    return float(np.exp(np.median(orders, axis=1).mean())), (low, high)


def with_session_spread(ratio: float, ci95: tuple[float, float]) -> tuple[float, float]:
    """An interval from one pair of sessions, widened by :data:`SESSION_SD` as independent errors add."""
    spread = 1.96 * SESSION_SD * ratio
    return ratio - math.hypot(ratio - ci95[0], spread), ratio + math.hypot(ci95[1] - ratio, spread)


def _block_draws(count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices (RESAMPLES, count): runs of neighbours at random, wrapping from the last to the first."""
    length = max(1, round(count ** (1 / 3)))
    starts = rng.integers(count, size=(RESAMPLES, -(-count // length), 1))
    runs = (starts + np.arange(length)) % count
    return runs.reshape(RESAMPLES, -1)[:, :count]


def _middle_95(values: Samples) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
