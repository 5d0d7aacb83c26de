"""What each stage leaves behind: the result.json of its folder. ``seconds`` is the stage's wall time."""

from __future__ import annotations

from dataclasses import dataclass

from optpipe.onnx_export import Parity
from optpipe.types import (
    Candidate,
    Choice,
    EngineCount,
    Latency,
    LayerTimes,
    ModelGraph,
    Precision,
    Quality,
    Reliability,
    Selective,
    Table,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """inputs.json: sha256 of what the run was begun with; a resumed run must find the same."""

    model: str
    calibration: str
    evaluation: str
    validation: str | None = None


@dataclass(frozen=True, slots=True)
class Ingested:
    """The original: its graph, its quality on the evaluation images, its latency by itself.

    ``engine`` is relative to the run's folder; what is timed beside it later is held against this one.
    ``borrowed`` says that another run of the same sweep measured it. ``logits_sha256`` is of the file of its
    logits on the evaluation images.
    """

    graph: ModelGraph
    quality: Quality
    latency: Latency
    onnx_bytes: int
    engine: str
    engine_sha256: str
    epoch: int
    seconds: float
    borrowed: bool = False
    logits_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Analyzed:
    """Where the search ended, where its latencies came from, and every network that it timed."""

    choice: Choice
    engines: EngineCount
    seconds: float
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Pruned:
    """The chosen candidate before recovery; ``sparsity`` is the share of its weights that are zero.

    ``weights_sha256`` is of the file of its weights.
    """

    parameters: int
    macs: int
    quality: Quality
    seconds: float
    sparsity: float = 0.0
    weights_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Recovered:
    """The recovered weights, and the loss where training began and where it ended; None without training."""

    weights_sha256: str
    loss_first: float | None
    loss_last: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Shipped:
    """One engine of the bundle; its files are relative to the run's folder.

    ``failed`` says why a precision is not shipped; nothing else of it is meaningful then.
    """

    precision: Precision
    source: str = ""
    source_bytes: int = 0
    engine: str = ""
    engine_sha256: str = ""
    engine_bytes: int = 0
    build_s: float = 0.0
    parity: Parity | None = None
    kept_in_float: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    flags: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    failed: str = ""


@dataclass(frozen=True, slots=True)
class ShippedEnsemble:
    """The bundle's ensemble of ``members`` networks, and the engine that shows what it costs.

    The engine gives the ensemble's logits alone, at the target's precision, and is no part of the bundle; it
    is relative to the run's folder. ``failed`` says why there is none. ``max_abs`` are the largest
    differences of the ensemble's file from torch: of a log-probability, and of an uncertainty in nats; None
    where ONNX Runtime was not there to run it.
    """

    members: int
    bytes: int
    max_abs: tuple[float, float] | None
    engine: str = ""
    engine_sha256: str = ""
    build_s: float = 0.0
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Exported:
    """The deploy bundle: the engine of the target's precision first; sha256 of every file by its name."""

    engines: tuple[Shipped, ...]
    onnx_bytes: int
    sha256: dict[str, str]
    seconds: float
    ensemble: ShippedEnsemble | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """One shipped precision, measured on its engine beside the original at the target's precision.

    ``reliability`` is None where the evaluation images have no labels.
    """

    precision: Precision
    latency: Latency
    quality: Quality
    agreement: Quality
    reliability: Reliability | None


@dataclass(frozen=True, slots=True)
class ScoredEnsemble:
    """The ensemble on its engine, beside the original at the target's precision as any result.

    The bundle's own file gives the means over the evaluation images, in nats, of expected entropy and mutual
    information, and ``by_information``: the accuracy of its answers when those of greatest mutual information
    are rejected. What takes labels, or ONNX Runtime, is None or empty where there are none.
    """

    latency: Latency
    quality: Quality
    agreement: Quality
    reliability: Reliability | None
    aleatoric_variance: float | None
    expected_entropy: float | None = None
    mutual_information: float | None = None
    by_information: tuple[Selective, ...] = ()


@dataclass(frozen=True, slots=True)
class Benchmarked:
    """Original and results side by side, on engines timed in turn; the target's precision comes first."""

    original: Latency
    original_quality: Quality
    original_reliability: Reliability | None
    results: tuple[Scored, ...]
    seconds: float
    ensemble: ScoredEnsemble | None = None
    layers: LayerTimes | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """All six, in the order of the pipeline."""

    ingest: Ingested
    analyze: Analyzed
    prune: Pruned
    recover: Recovered
    export: Exported
    benchmark: Benchmarked
