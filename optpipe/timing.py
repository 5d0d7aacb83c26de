"""How long an engine takes, and the ratio of two engines with an interval that can be trusted.

The only clock. Machines are noisy, so a candidate is timed in turn with its baseline: whatever slows the
machine for longer than two runs slows both. Runs come in groups of four, baseline and candidate in the
order ABBA or BAAB at random, so that going first or second, following the other or oneself, and a steady
drift weigh on both alike.

The ratio is the median of the ratios of neighbouring runs, taken within each of the two orders and
averaged over them: the two orders may differ by more than the noise does (the second run of a pair finds
the first one's data in the caches), and the median of such a two-humped sample would be ill-defined. Its
interval is a moving-block bootstrap over the groups: neighbouring groups are alike on a machine that
others use too, and drawing them one by one would make the interval too narrow.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optpipe.types import Fingerprint, Latency, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.float64]


class Stopwatch:
    """Seconds of wall time since it was made, for how long a stage or a trial took."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


RESAMPLES = 1000
"""Bootstrap resamples: the ends of a 95% interval then vary by a few percent of its width."""

SESSION_SD = 0.0013
"""Standard deviation of a ratio from one pair of sessions to the next of the same two engines.

Where a session's memory and threads happen to lie stays with it, so no number of runs of one pair shows
this spread, and an interval without it misses the truth too often. It is the variance of the ratio over 30
fresh pairs of one ResNet-56 engine, less the mean square of their standard errors, on two cores; a rerun of
``benchmarks/clock.py`` gives what it takes to measure it on another machine.
"""

_LOOK_GROWTH = 1.3


@dataclass(frozen=True, slots=True)
class Measurement:
    """One engine timed by itself: raw samples in ms, and the 95% interval of their median. Not JSON-able."""

    samples_ms: Samples
    median_ci95_ms: tuple[float, float]
    warmup: int
    converged: bool

    def latency(self, fingerprint: Fingerprint, headline: str = "Latency") -> Latency:
        """What the samples say, as it goes into a report."""
        return to_latency(
            self.samples_ms, fingerprint, warmup=self.warmup, converged=self.converged, headline=headline
        )


@dataclass(frozen=True, slots=True)
class PairedMeasurement:
    """Two engines timed in turn. Not JSON-able.

    ``samples_ms`` is (pairs, 2): baseline, candidate; ``baseline_first`` (pairs,) says who went first.
    """

    samples_ms: Samples
    baseline_first: NDArray[np.bool_]
    ratio: float
    ratio_ci95: tuple[float, float]
    warmup: int
    converged: bool

    def baseline(self, fingerprint: Fingerprint, headline: str = "Latency") -> Latency:
        """The baseline's side; it has no ratio."""
        return to_latency(
            self.samples_ms[:, 0],
            fingerprint,
            warmup=self.warmup,
            converged=self.converged,
            headline=headline,
        )

    def candidate(self, fingerprint: Fingerprint, headline: str = "Latency") -> Latency:
        """The candidate's side, with its ratio to the baseline."""
        return to_latency(
            self.samples_ms[:, 1],
            fingerprint,
            warmup=self.warmup,
            converged=self.converged,
            ratio=self.ratio,
            ratio_ci95=self.ratio_ci95,
            headline=headline,
        )


def single(
    session: Session,
    *,
    tolerance: float = 0.005,
    budget_s: float = 5.0,
    warmup_s: float = 0.2,
    seed: int,
    min_samples: int = 40,
    max_samples: int = 100_000,
) -> Measurement:
    """Time an engine by itself until the 95% interval of its median is within ``tolerance`` of it.

    ``tolerance`` is half the interval's width as a fraction of the median; ``budget_s`` ends the timing
    earlier, but never before ``min_samples``. Warm-up comes first and is not part of the samples.
    """
    rng = np.random.default_rng(seed)
    with _no_garbage_collection():
        warmup = _warm_up((session,), warmup_s)
        samples: list[float] = []
        end = time.perf_counter() + budget_s
        look = min_samples
        while True:
            samples.append(session.sample().compute_ms)
            over = time.perf_counter() >= end or len(samples) >= max_samples
            if len(samples) < min_samples or not (over or len(samples) >= look):
                continue
            look = int(len(samples) * _LOOK_GROWTH) + 1
            values = np.array(samples)
            low, high = median_interval(values, rng)
            converged = (high - low) / 2 <= tolerance * median(values)
            if over or converged:
                return Measurement(values, (low, high), warmup, converged)


def paired(
    baseline: Session,
    candidate: Session,
    *,
    tolerance: float = 0.005,
    budget_s: float = 5.0,
    warmup_s: float = 0.2,
    seed: int,
    min_pairs: int = 40,
    max_pairs: int = 100_000,
) -> PairedMeasurement:
    """Time two engines in turn until the 95% interval of their ratio is at most ``tolerance`` to each side.

    ``budget_s`` ends the timing earlier, but never before ``min_pairs``. The two sessions must be two: an
    engine against itself is timed in two sessions.
    """
    rng = np.random.default_rng(seed)
    sessions = (baseline, candidate)
    with _no_garbage_collection():
        warmup = _warm_up(sessions, warmup_s)
        pairs: list[tuple[float, float]] = []
        first: list[bool] = []
        end = time.perf_counter() + budget_s
        look = min_pairs
        while True:
            for baseline_first in rng.permutation([True, False]).tolist():
                pairs.append(_time_pair(sessions, baseline_first))
                first.append(baseline_first)
            over = time.perf_counter() >= end or len(pairs) >= max_pairs
            if len(pairs) < min_pairs or not (over or len(pairs) >= look):
                continue
            look = int(len(pairs) * _LOOK_GROWTH) + 1
            samples, order = np.array(pairs), np.array(first)
            ratio, within = ratio_interval(samples, order, rng)
            ci95 = with_session_spread(ratio, within)
            converged = (ci95[1] - ci95[0]) / 2 <= tolerance
            if over or converged:
                return PairedMeasurement(samples, order, ratio, ci95, warmup, converged)


def _time_pair(sessions: tuple[Session, Session], baseline_first: bool) -> tuple[float, float]:
    baseline, candidate = sessions
    if baseline_first:
        before = baseline.sample().compute_ms
        return before, candidate.sample().compute_ms
    after = candidate.sample().compute_ms
    return baseline.sample().compute_ms, after


def _warm_up(sessions: tuple[Session, ...], warmup_s: float) -> int:
    """Run the engines in turn, at least three times each; returns the number of runs of each."""
    runs = 0
    end = time.perf_counter() + warmup_s
    while runs < 3 or time.perf_counter() < end:
        for session in sessions:
            session.sample()
        runs += 1
    return runs


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def to_latency(
    samples_ms: Samples,
    fingerprint: Fingerprint,
    *,
    warmup: int,
    converged: bool,
    ratio: float | None = None,
    ratio_ci95: tuple[float, float] | None = None,
    headline: str = "Latency",
) -> Latency:
    """The figures of a report from raw samples in ms; ValueError if there are none."""
    if not samples_ms.size:
        raise ValueError("no samples to summarise")
    p90, p95, p99 = (percentile(samples_ms, q) for q in (90.0, 95.0, 99.0))
    return Latency(
        median_ms=median(samples_ms),
        mean_ms=float(samples_ms.mean()),
        min_ms=float(samples_ms.min()),
        max_ms=float(samples_ms.max()),
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        samples=int(samples_ms.size),
        warmup=warmup,
        fingerprint=fingerprint,
        ratio_to_original=ratio,
        ratio_ci95=ratio_ci95,
        converged=converged,
        headline=headline,
    )


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


@contextlib.contextmanager
def device_lock(device: str, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep every other process from measuring on ``device`` meanwhile.

    Waits while another process holds the lock, after calling ``on_wait`` once; the system releases it when
    its holder dies. Not re-entrant: taken twice in one process, it waits for itself.
    """
    import fcntl

    name = re.sub(r"[^A-Za-z0-9]+", "-", device)
    path = Path(tempfile.gettempdir()) / f"optpipe-{name}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        descriptor = os.open(path, os.O_RDONLY)  # another user's file: enough to lock it
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock
