"""What each stage leaves behind: the result.json of its folder. ``seconds`` is the stage's wall time."""

from __future__ import annotations

from dataclasses import dataclass

from optpipe.onnx_export import Parity
from optpipe.types import Choice, Latency, ModelGraph, Quality


@dataclass(frozen=True, slots=True)
class Inputs:
    """inputs.json: sha256 of what the run was begun with; a resumed run must find the same."""

    model: str
    calibration: str
    evaluation: str


@dataclass(frozen=True, slots=True)
class Ingested:
    """The original: its graph, its quality on the evaluation images, its latency by itself."""

    graph: ModelGraph
    quality: Quality
    latency: Latency
    onnx_bytes: int
    epoch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Analyzed:
    """Where the search ended."""

    choice: Choice
    seconds: float


@dataclass(frozen=True, slots=True)
class Pruned:
    """The chosen candidate before recovery."""

    parameters: int
    macs: int
    quality: Quality
    seconds: float


@dataclass(frozen=True, slots=True)
class Recovered:
    """The recovered weights, and the loss where training began and where it ended."""

    weights_sha256: str
    loss_first: float
    loss_last: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Exported:
    """The deploy bundle; ``engine`` is relative to the run's folder."""

    engine: str
    onnx_bytes: int
    parity: Parity
    sha256: dict[str, str]
    seconds: float


@dataclass(frozen=True, slots=True)
class Benchmarked:
    """Original and result side by side, on engines timed in turn."""

    original: Latency
    result: Latency
    original_quality: Quality
    quality: Quality
    agreement: Quality
    seconds: float


@dataclass(frozen=True, slots=True)
class Results:
    """All six, in the order of the pipeline."""

    ingest: Ingested
    analyze: Analyzed
    prune: Pruned
    recover: Recovered
    export: Exported
    benchmark: Benchmarked
