"""Where an engine runs, how long it takes, how well it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how an engine runs. ``input_shape`` is (C, H, W); ``options`` belong to the backend."""

    backend: str
    batch: int
    input_shape: tuple[int, int, int]
    precision: Precision = "fp32"
    device: str = "cpu"
    threads: int | None = None
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The machine as far as it decides a latency."""

    device: str
    driver: str
    versions: tuple[tuple[str, str], ...]
    threads: int
    clocks: str = ""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """An accelerator's clocks at one moment, read and never set.

    ``throttle`` holds the reasons why the clocks are held below what they could be, empty when they are not.
    """

    sm_clock_mhz: int
    memory_clock_mhz: int
    temperature_c: int
    power_w: float | None = None
    throttle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one inference of a whole batch.

    ``ratio_to_original`` is the median of paired ratios, ``ratio_ci95`` its bootstrap interval; both are
    None for a baseline timed by itself. ``converged`` says whether the interval reached the tolerance
    before the time budget ran out. ``headline`` names the figure as trtexec does: "Latency" on a CPU,
    "GPU Compute Time" on a GPU. The medians of a GPU's other figures stand beside it: of the host's time to
    enqueue, of the copies to and from the device, and of copy, compute and copy end to end. ``notes`` say
    how the engine was run, ``warnings`` why the figures may mislead.
    """

    median_ms: float
    mean_ms: float
    min_ms: float
    max_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    samples: int
    warmup: int
    fingerprint: Fingerprint
    ratio_to_original: float | None = None
    ratio_ci95: tuple[float, float] | None = None
    converged: bool = True
    headline: str = "Latency"
    enqueue_ms: float | None = None
    h2d_ms: float | None = None
    d2h_ms: float | None = None
    end_to_end_ms: float | None = None
    before: DeviceState | None = None
    after: DeviceState | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[tuple[str, float], ...]:
        """The ratio and its interval as an event's fields; none for a baseline."""
        if self.ratio_to_original is None or self.ratio_ci95 is None:
            return ()
        low, high = self.ratio_ci95
        return (("ratio", self.ratio_to_original), ("ratio_low", low), ("ratio_high", high))


@dataclass(frozen=True, slots=True)
class LayerTime:
    """A layer of an engine as the engine runs it: ``kind`` in its own words, ``ms`` a median of inferences.

    Engines fuse layers, so that one of them may be several of the network's.
    """

    name: str
    kind: str
    ms: float


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """The layers of the original's engine and of the result's, over ``repeats`` inferences each.

    Taken in sessions of their own, which telling slows down: the times do not add up to the latency. Where
    they cannot be had both are empty, and ``failed`` says why.
    """

    original: tuple[LayerTime, ...]
    result: tuple[LayerTime, ...]
    repeats: int
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a network does on one split; values are fractions from 0 to 1.

    ``metric`` is "top1" where there are labels and "agreement" (with the original) where there are none.
    ``ci95`` is the Wilson interval of ``value`` over ``count`` images.
    """

    metric: Literal["top1", "agreement"]
    value: float
    ci95: tuple[float, float]
    count: int
    split: str
    top5: float | None = None


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Predictions whose likeliest class has a probability above ``low`` and at most ``high``.

    ``confidence`` is the mean of that probability, ``accuracy`` how often the class was right; both are None
    where there are no such predictions.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether probabilities are as often right as they say; ``error`` is the expected calibration error."""

    error: float
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True, slots=True)
class Selective:
    """The accuracy on the ``kept`` images when the least sure, a share ``rejected``, get no answer."""

    rejected: float
    kept: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """How far a network's probabilities can be trusted on one split."""

    calibration: Calibration
    selective: tuple[Selective, ...]
