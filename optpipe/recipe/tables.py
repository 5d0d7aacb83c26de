"""The tables of a recipe but for those that a method binds itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from optpipe.data import DataSpec, Preprocess
from optpipe.precision import Settings
from optpipe.types import Precision, Synthesis

WHO_COMPUTES = ("workers", "address", "worker_cpus", "worker_gpus", "store", "devices")
"""Keys of ``[run]`` that change nothing of what is computed, but for rounding."""


@dataclass(frozen=True, slots=True)
class DataTable:
    """Where images come from and how they are prepared.

    ``calibration`` is what searches and recoveries learn from: 50 to 1000 images for those without labels.
    ``evaluation`` must be there: it is never trained on, and an accuracy measured on calibration images would
    flatter the result. ``preprocess`` holds for all of them. ``validation`` is what a search may learn
    accuracy from, by itself disjoint from both; without it a search learns from calibration images, which the
    original may know by heart. ``synthesize`` says how calibration images of source "synthesize" are made;
    None for all others.
    """

    calibration: DataSpec
    evaluation: DataSpec
    preprocess: Preprocess
    validation: DataSpec | None = None
    synthesize: Synthesis | None = None


@dataclass(frozen=True, slots=True)
class TargetTable:
    """The engine and the device.

    ``batch`` images go into an engine at once. ``device`` is "cpu" or "cuda", which ``--gpu`` sets.
    ``threads`` are those of a CPU, by default as many as it has cores.

    ``backend`` names one, or is "auto": onnxruntime on a CPU, on a GPU the first of tensorrt, onnxruntime
    and inductor that loads; or "fastest": every one that loads is built and timed, the fastest is taken.
    ``precision`` is what candidates are timed in and the budget is held against. ``options`` are the
    backend's own.
    """

    backend: str = "auto"
    precision: Precision = "fp32"
    batch: int = 16
    device: str = "cpu"
    threads: int | None = None
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExportTable:
    """The precisions in which the result is shipped, scored and timed, beside the target's own.

    ``precisions`` are by default all that the backend runs. ``quantize`` says how ranges and layers are
    chosen for int8. With ``uncertainty`` the networks that the search leaves beside the chosen one are
    shipped with it as an ensemble that says how far each of its answers can be trusted.
    """

    precisions: tuple[Precision, ...] | None = None
    quantize: Settings = field(default_factory=Settings)
    uncertainty: bool = False


@dataclass(frozen=True, slots=True)
class TimingTable:
    """When a measurement ends: at its tolerance or after its time, whichever is first.

    ``tolerance`` is the half-width of the 95% interval of the ratio to the original. ``budget_s`` (in
    seconds) is for each candidate of a search, ``final_budget_s`` for each engine of the final benchmark.
    ``drift`` is how far (as a fraction) the original's own latency may have moved when a run is resumed
    before this run's latencies are taken afresh.
    """

    tolerance: float = 0.005
    budget_s: float = 5.0
    final_budget_s: float = 10.0
    drift: float = 0.5


@dataclass(frozen=True, slots=True)
class ReportTable:
    """What the report shows beyond what a run measures anyway.

    ``curves`` follows the losses between the original, the pruned and the recovered networks and measures
    loss leakage, for the price of three more recoveries.
    """

    curves: bool = False


@dataclass(frozen=True, slots=True)
class RunTable:
    """The run itself.

    ``name`` is that of its folder under ``runs/``. ``seed`` decides all that is drawn. ``cache`` reuses
    latencies that other runs in the same parent folder measured. ``checkpoint_every`` so many steps a
    training is stored, to go on from there when it is interrupted. ``workers`` says who scores and trains
    candidates: "serial" is this process, "local:N" are N processes beside it, "ray" is a cluster. ``address``
    is where that listens. ``worker_cpus`` cores and ``worker_gpus`` GPUs of the cluster are each worker's.
    Engines are always timed by this process, on this machine. ``store`` is where answers lie for workers on
    machines that do not see the run's folder: an address that fsspec knows, such as "s3://bucket/folder".
    ``trainer`` is the device that scores and trains: "target" is the target's own where torch can use it,
    "cuda" a GPU also where the target is a processor, "cpu" none.
    ``devices`` of this machine share the batches of the recovery: GPUs, or on a CPU as many processes.
    """

    name: str
    seed: int = 0
    cache: bool = True
    checkpoint_every: int = 50
    workers: str = "serial"
    address: str = "auto"
    worker_cpus: int = 1
    worker_gpus: float = 0.0
    store: str = ""
    trainer: Literal["target", "cpu", "cuda"] = "target"
    devices: int = 1

    @property
    def local_workers(self) -> int | None:
        """N of "local:N"; None for the others."""
        kind, _, count = self.workers.partition(":")
        return int(count) if kind == "local" else None
