"""From raw samples to the figures of a report, by the names that trtexec gives them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optpipe.timing.interval import coefficient_of_variation, median, percentile
from optpipe.types import DeviceState, Fingerprint, Latency

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.float64]

GPU_COMPUTE = "GPU Compute Time"
# trtexec warns of enqueuing from the same share on, of a spread from 1% on already.
_UNSTABLE = 0.025
_ENQUEUE_BOUND = 0.8


@dataclass(frozen=True, slots=True)
class Conditions:
    """How one engine was run while it was timed, and the device before and after."""

    headline: str = "Latency"
    notes: tuple[str, ...] = ()
    before: DeviceState | None = None
    after: DeviceState | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One engine timed by itself, and the 95% interval of its median. Not JSON-able.

    ``samples_ms`` (runs,) are the raw headline times; ``transfers_ms`` (runs, 3) those of enqueue, copy to
    the device and copy back, not a number where there is none.
    """

    samples_ms: Samples
    median_ci95_ms: tuple[float, float]
    warmup: int
    converged: bool
    transfers_ms: Samples
    conditions: Conditions

    def latency(self, fingerprint: Fingerprint) -> Latency:
        """What the samples say, as it goes into a report."""
        return to_latency(
            self.samples_ms,
            fingerprint,
            warmup=self.warmup,
            converged=self.converged,
            transfers_ms=self.transfers_ms,
            conditions=self.conditions,
        )


@dataclass(frozen=True, slots=True)
class PairedMeasurement:
    """Two engines timed in turn. Not JSON-able.

    ``samples_ms`` is (pairs, 2): baseline, candidate; ``baseline_first`` (pairs,) says who went first.
    ``transfers_ms`` is (pairs, 2, 3), as in :class:`Measurement`; ``conditions`` are of each.
    """

    samples_ms: Samples
    baseline_first: NDArray[np.bool_]
    ratio: float
    ratio_ci95: tuple[float, float]
    warmup: int
    converged: bool
    transfers_ms: Samples
    conditions: tuple[Conditions, Conditions]

    def baseline(self, fingerprint: Fingerprint) -> Latency:
        """The baseline's side; it has no ratio."""
        return to_latency(
            self.samples_ms[:, 0],
            fingerprint,
            warmup=self.warmup,
            converged=self.converged,
            transfers_ms=self.transfers_ms[:, 0],
            conditions=self.conditions[0],
        )

    def candidate(self, fingerprint: Fingerprint) -> Latency:
        """The candidate's side, with its ratio to the baseline."""
        return to_latency(
            self.samples_ms[:, 1],
            fingerprint,
            warmup=self.warmup,
            converged=self.converged,
            ratio=self.ratio,
            ratio_ci95=self.ratio_ci95,
            transfers_ms=self.transfers_ms[:, 1],
            conditions=self.conditions[1],
        )


def to_latency(
    samples_ms: Samples,
    fingerprint: Fingerprint,
    *,
    warmup: int,
    converged: bool,
    ratio: float | None = None,
    ratio_ci95: tuple[float, float] | None = None,
    transfers_ms: Samples | None = None,
    conditions: Conditions | None = None,
) -> Latency:
    """The figures of a report from raw samples in ms; ValueError if there are none.

    ``transfers_ms`` is (runs, 3): enqueue, copy to the device, copy back.
    """
    if not samples_ms.size:
        raise ValueError("no samples to summarise")
    conditions = conditions or Conditions()
    p90, p95, p99 = (percentile(samples_ms, q) for q in (90.0, 95.0, 99.0))
    enqueue, h2d, d2h, end_to_end = _other_medians(samples_ms, transfers_ms)
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
        headline=conditions.headline,
        enqueue_ms=enqueue,
        h2d_ms=h2d,
        d2h_ms=d2h,
        end_to_end_ms=end_to_end,
        before=conditions.before,
        after=conditions.after,
        notes=conditions.notes,
        warnings=_warnings(samples_ms, enqueue, conditions),
    )


def _other_medians(samples_ms: Samples, transfers_ms: Samples | None) -> tuple[float | None, ...]:
    """Medians of enqueue, copy there, copy back, and of copy, compute and copy; None where there is none."""
    if transfers_ms is None:
        return None, None, None, None
    columns = (*transfers_ms.T, samples_ms + transfers_ms[:, 1] + transfers_ms[:, 2])
    return tuple(None if np.isnan(column).any() else median(column) for column in columns)


def _warnings(samples_ms: Samples, enqueue_ms: float | None, conditions: Conditions) -> tuple[str, ...]:
    """Why the figures of a GPU may mislead: trtexec's two reasons, and clocks that were held down."""
    found: list[str] = []
    variation = coefficient_of_variation(samples_ms)
    if conditions.headline == GPU_COMPUTE and variation > _UNSTABLE:
        found.append(
            f"GPU Compute Time is unstable: its coefficient of variation is {variation:.1%}, above "
            f"{_UNSTABLE:.1%}; lock the clocks or keep other work off the GPU"
        )
    if enqueue_ms is not None and enqueue_ms > _ENQUEUE_BOUND * median(samples_ms):
        found.append(
            f"the time to enqueue ({enqueue_ms:.3f} ms) is above {_ENQUEUE_BOUND:g} of GPU Compute Time: the "
            "host may be what limits it; run the engine as a CUDA graph"
        )
    states = [state for state in (conditions.before, conditions.after) if state is not None]
    reasons = sorted({reason for state in states for reason in state.throttle})
    if reasons:
        clocks = " and ".join(f"{state.sm_clock_mhz} MHz at {state.temperature_c} C" for state in states)
        found.append(f"the GPU was throttled ({', '.join(reasons)}; {clocks} before and after)")
    return tuple(found)
