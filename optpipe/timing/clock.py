"""Timing an engine by itself, or two in turn.

Machines are noisy, so a candidate is timed in turn with its baseline: whatever slows the machine for
longer than two runs slows both. Runs come in groups of four, baseline and candidate in the order ABBA or
BAAB at random, so that going first or second, following the other or oneself, and a steady drift weigh on
both alike.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator

import numpy as np

from optpipe.timing.figures import Conditions, Measurement, PairedMeasurement
from optpipe.timing.interval import median, median_interval, ratio_interval, with_session_spread
from optpipe.types import DeviceState, Sample, Session

_LOOK_GROWTH = 1.3


class Stopwatch:
    """Seconds of wall time since it was made, for how long a stage or a trial took."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


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
        before = session.state()
        samples: list[Sample] = []
        end = time.perf_counter() + budget_s
        look = min_samples
        while True:
            samples.append(session.sample())
            over = time.perf_counter() >= end or len(samples) >= max_samples
            if len(samples) < min_samples or not (over or len(samples) >= look):
                continue
            look = int(len(samples) * _LOOK_GROWTH) + 1
            values = np.array([sample.compute_ms for sample in samples])
            low, high = median_interval(values, rng)
            converged = (high - low) / 2 <= tolerance * median(values)
            if over or converged:
                transfers = np.array([_transfers(sample) for sample in samples])
                conditions = _conditions(session, before)
                return Measurement(values, (low, high), warmup, converged, transfers, conditions)


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
        before = baseline.state()
        pairs: list[tuple[Sample, Sample]] = []
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
            samples = np.array([[one.compute_ms, other.compute_ms] for one, other in pairs])
            order = np.array(first)
            ratio, within = ratio_interval(samples, order, rng)
            ci95 = with_session_spread(ratio, within)
            converged = (ci95[1] - ci95[0]) / 2 <= tolerance
            if over or converged:
                transfers = np.array([[_transfers(one), _transfers(other)] for one, other in pairs])
                conditions = _conditions(baseline, before), _conditions(candidate, before)
                return PairedMeasurement(
                    samples, order, ratio, ci95, warmup, converged, transfers, conditions
                )


def _time_pair(sessions: tuple[Session, Session], baseline_first: bool) -> tuple[Sample, Sample]:
    baseline, candidate = sessions
    if baseline_first:
        before = baseline.sample()
        return before, candidate.sample()
    after = candidate.sample()
    return baseline.sample(), after


def _transfers(sample: Sample) -> tuple[float, float, float]:
    enqueue, h2d, d2h = (
        math.nan if value is None else value for value in (sample.enqueue_ms, sample.h2d_ms, sample.d2h_ms)
    )
    return enqueue, h2d, d2h


def _conditions(session: Session, before: DeviceState | None) -> Conditions:
    return Conditions(session.headline, session.notes, before, session.state())


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
