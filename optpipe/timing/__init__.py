"""How long an engine takes, and the ratio of two engines with an interval that can be trusted.

The only clock.
"""

from optpipe.timing.clock import Stopwatch, paired, single
from optpipe.timing.figures import Conditions, Measurement, PairedMeasurement, to_latency
from optpipe.timing.interval import (
    RESAMPLES,
    SESSION_SD,
    coefficient_of_variation,
    median,
    median_interval,
    percentile,
    ratio_interval,
    with_session_spread,
)
from optpipe.timing.lock import device_lock

__all__ = [
    "RESAMPLES",
    "SESSION_SD",
    "Conditions",
    "Measurement",
    "PairedMeasurement",
    "Stopwatch",
    "coefficient_of_variation",
    "device_lock",
    "median",
    "median_interval",
    "paired",
    "percentile",
    "ratio_interval",
    "single",
    "to_latency",
    "with_session_spread",
]
