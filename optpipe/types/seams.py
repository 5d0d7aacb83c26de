"""The protocols of backends and methods, and what passes through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from optpipe.types.measurement import DeviceState, Fingerprint, LayerTime, Precision, Target
from optpipe.types.network import ModelGraph
from optpipe.types.search import Budget, Cell, Images, Scene, Search, Tune

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed inference: ``compute_ms`` is the headline; the others are None where they do not exist."""

    compute_ms: float
    enqueue_ms: float | None = None
    h2d_ms: float | None = None
    d2h_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine. Loading one compares its bytes with ``sha256`` first: a plan is executable code.

    ``timing_cache`` is the cache that sped its build up, where the backend keeps one; ``flags`` are the
    options that it was built with, defaults included; ``notes`` are what the builder wants the user to know.
    """

    path: Path
    sha256: str
    build_s: float
    timing_cache: Path | None = None
    flags: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineCount:
    """Where a search's latencies came from.

    Of ``candidates`` whose latency was asked for, ``structures`` differ; the others were answered by an
    equal structure. ``cached`` of the structures were timed by another run. ``builds_s`` are the first
    builds' times of the rest, ``second_build_s`` that of building one of them again with a warm cache beside
    ``first_build_s`` of the same one; None where the backend keeps no cache or nothing was built.
    """

    candidates: int
    structures: int
    cached: int
    builds_s: tuple[float, ...]
    first_build_s: float | None
    second_build_s: float | None


class Session(Protocol):
    """A loaded engine with fixed input and output buffers."""

    @property
    def headline(self) -> str:
        """What ``Sample.compute_ms`` is: "Latency" on a CPU, "GPU Compute Time" on a GPU."""

    @property
    def notes(self) -> tuple[str, ...]:
        """How the engine is run, where that is a choice: "CUDA graph", say, or why there is none."""

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (N, C, H, W); any N, padded to the engine's batch inside."""

    def sample(self) -> Sample:
        """Time one inference of the target's batch on the fixed buffers."""

    def state(self) -> DeviceState | None:
        """The device's clocks now; None where there is nothing to read."""

    def close(self) -> None:
        """Release what the session holds."""


class Backend(Protocol):
    """A module in ``optpipe/backends``; it imports its SDK inside its functions only."""

    SOURCE: Literal["onnx", "program"]
    """What it builds from: an ONNX file at the target's precision, or a ``torch.export`` program in fp32."""
    CACHES_BUILDS: bool
    """Whether building an engine a second time is quicker, because the first left a cache."""
    INT8_REST: Literal["fp32", "fp16"]
    """The precision of what an int8 network leaves unquantized."""

    def precisions(self, device: str) -> tuple[Precision, ...]:
        """The precisions in which it runs on "cpu" or "cuda"; empty where it does not run at all."""

    def missing(self, target: Target) -> str | None:
        """What this machine lacks to run the target and how to mend it; None if nothing.

        Raises UsageError for a target that it runs on no machine.
        """

    def fingerprint(self, target: Target) -> Fingerprint:
        """The machine, as this backend sees it."""

    def build(self, source: Path, target: Target, folder: Path) -> Engine:
        """Build an engine from a file of the kind ``SOURCE`` into ``folder``."""

    def load(self, engine: Engine, target: Target) -> Session:
        """Open an engine for running and timing; RunError where its bytes are not those of its sha256."""


@runtime_checkable
class LayerTimer(Protocol):
    """A backend that can also tell how long each layer takes."""

    def layer_times(self, engine: Engine, target: Target, repeats: int) -> tuple[LayerTime, ...]:
        """The layers in the order in which they run, each with its median time over ``repeats`` inferences.

        Telling slows an engine down: this takes a session of its own, set as :meth:`Backend.load` sets it but
        for the telling, and what is timed is never that one. Empty where the target's device does not tell.
        RunError as for :meth:`Backend.load`.
        """


class Method(Protocol):
    """A module in ``optpipe/methods``."""

    Config: type
    """A frozen dataclass: the keys of the recipe's ``[method]`` table and their defaults."""
    RECOVER: Tune
    """How to recover where the recipe's ``[recover]`` table does not say otherwise."""
    NEEDS_LABELS: bool

    def check(
        self,
        shown: ModelGraph,
        calibration: Images,
        budget: Budget,
        config: object,
        recover: Tune,
        validation: Images | None = None,
    ) -> None:
        """UsageError for what no search can be made of; asked before anything is built or measured."""

    def search(self, scene: Scene, config: object) -> Search:
        """Ask about candidates, then choose."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for the console and for events.jsonl; ``seconds`` is a duration.

    "begin" is a request that is being answered, "trial" one that was. Where a latency was measured beside the
    original's, ``fields`` hold it as "ratio", with the ends of its interval as "ratio_low" and "ratio_high".
    """

    kind: Literal["stage", "begin", "trial", "progress", "note", "warning"]
    name: str
    detail: str = ""
    done: int | None = None
    total: int | None = None
    seconds: float | None = None
    fields: tuple[tuple[str, Cell], ...] = field(default=())


Emit = Callable[[Event], None]
