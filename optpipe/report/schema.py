"""report.json: an interface, versioned; every value in it was measured in the run that wrote it.

Fractions run from 0 to 1, times are milliseconds per batch unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from optpipe.types import (
    Budget,
    Candidate,
    EngineCount,
    Figure,
    Latency,
    LayerTimes,
    Plan,
    Precision,
    Quality,
    Reliability,
    Selective,
    Table,
    Target,
    Tune,
)

SCHEMA = "optpipe.report/1"


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """What was asked, what the final measurement shows, and whether that meets it."""

    asked: Budget
    met: bool
    verdict: str


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """One network as it deploys. ``agreement`` is with the original's classes on the evaluation images.

    ``reliability`` is measured on them too, where they have labels. ``sparsity`` is the share of the
    weights of convolutions and linear layers that are zero.
    """

    quality: Quality
    latency: Latency
    parameters: int
    macs: int
    onnx_bytes: int
    agreement: Quality | None = None
    reliability: Reliability | None = None
    sparsity: float = 0.0


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """The result at one precision, on its engine; the latency's ratio is to the original's engine.

    ``source_bytes`` is the size of the file that the engine was built from. ``failed`` says why there is no
    engine; the measured fields are None then. ``kept_in_float`` lists what stayed above the precision.
    """

    precision: Precision
    latency: Latency | None
    quality: Quality | None
    agreement: Quality | None
    source_bytes: int
    engine_bytes: int
    build_s: float
    max_rel: float | None
    kept_in_float: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failed: str = ""
    reliability: Reliability | None = None


@dataclass(frozen=True, slots=True)
class EnsembleReport:
    """The shipped ensemble, and what it costs to know how far its answers can be trusted.

    ``latency``, ``quality`` and ``reliability`` are those of its logits alone on an engine at the target's
    precision; ``failed`` says why there is none, and they are None then. ``aleatoric_variance`` is 1/d^2 of
    the DLLP paper (Eq. 9) over the evaluation images. ``expected_entropy`` and ``mutual_information`` are
    means over them in nats, from the bundle's file, ``max_abs`` how far its log-probabilities and
    uncertainties are from torch's. ``by_information`` rejects the images of greatest mutual information.
    """

    members: int
    onnx_bytes: int
    build_s: float
    latency: Latency | None
    quality: Quality | None
    agreement: Quality | None
    reliability: Reliability | None
    aleatoric_variance: float | None
    expected_entropy: float | None
    mutual_information: float | None
    by_information: tuple[Selective, ...]
    max_abs: tuple[float, float] | None
    failed: str = ""


@dataclass(frozen=True, slots=True)
class StageReport:
    """``seconds`` is the wall time of the attempt that finished the stage."""

    seconds: float


@dataclass(frozen=True, slots=True)
class EnvironmentReport:
    """Where the run was made. ``executed_on`` says on what the engines really ran."""

    optpipe: str
    python: str
    platform: str
    executed_on: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class DataReport:
    """The image sets: how many, and the sha256 over pixels, labels and preprocessing.

    Without validation images there are 0 of them, and no sha256. ``contact_sheet`` is where synthesised
    calibration images are shown, seen from the report; None where they are not synthesised.
    """

    calibration_count: int
    calibration_sha256: str
    evaluation_count: int
    evaluation_sha256: str
    validation_count: int = 0
    validation_sha256: str | None = None
    contact_sheet: str | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and the 95% interval that a bootstrap over images gives it."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class HalvesReport:
    """Loss leakage (PRACTISE, Eq. 11) between networks recovered on two halves of ``images`` each.

    All are feature errors on the same unseen images: ``half`` the mean of the two networks', ``whole`` that
    of the network recovered on all images. ``leakage`` is Eq. 11; ``relative`` is that, and ``union`` what
    going from a half to all really took away (Eq. 12), as shares of ``whole``.
    """

    images: int
    half: float
    whole: float
    leakage: Interval
    relative: Interval
    union: Interval


@dataclass(frozen=True, slots=True)
class LeakageReport:
    """How much more images would help a recovery by mimicking, and the advice that follows.

    ``seen`` and ``unseen`` are the result's feature errors on calibration and evaluation images, ``ratio``
    the latter as a multiple of the former, ``control`` that before recovery. ``doubling`` is the share of the
    unseen error that twice as many images would take away, by the scatter of fitted weights (Claim 3).
    ``halves`` are measured where the recipe asks for curves.
    """

    advice: str
    seen: float
    unseen: float
    seen_images: int
    unseen_images: int
    ratio: Interval
    control: Interval
    doubling: Interval
    halves: HalvesReport | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The whole report. A figure stands below the table of the same title, else below all tables."""

    schema: str
    name: str
    method: str
    model: str
    seed: int
    target: Target
    budget: BudgetReport
    original: NetworkReport
    result: NetworkReport
    quality_before_recovery: Quality
    plan: Plan
    recover: Tune
    reason: str
    tables: tuple[Table, ...]
    data: DataReport
    stages: dict[str, StageReport]
    environment: EnvironmentReport
    sha256: dict[str, str]
    precisions: tuple[PrecisionReport, ...] = ()
    engines: EngineCount | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    ensemble: EnsembleReport | None = None
    leakage: LeakageReport | None = None
    candidates: tuple[Candidate, ...] = ()
    layers: LayerTimes | None = None
