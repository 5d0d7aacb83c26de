"""What flows between rooms: frozen values, and the protocols at the seams.

Values are JSON-able unless they say otherwise. Nothing here touches a file, a clock or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

# ---------------------------------------------------------------- the network


@dataclass(frozen=True, slots=True)
class Plan:
    """What is taken out of a network: depth, width, resolution. The empty plan is the original."""

    drop_blocks: tuple[str, ...] = ()
    keep_channels: tuple[tuple[str, tuple[int, ...]], ...] = ()
    input_hw: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block of the traced graph; shapes are (C, H, W) of one image."""

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    droppable: bool
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that can only be pruned together; ``shape`` is the weight shape of its first layer."""

    name: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    channels: int
    parameters: int
    macs: int
    prunable: bool
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """What the trace of a network shows, in execution order."""

    blocks: tuple[Block, ...]
    groups: tuple[ChannelGroup, ...]
    parameters: int
    macs: int
    input_shape: tuple[int, int, int]
    classes: int

    @property
    def droppable(self) -> tuple[Block, ...]:
        """The blocks that can be dropped, in execution order."""
        return tuple(block for block in self.blocks if block.droppable)


# ---------------------------------------------------------------- measurement

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


# ---------------------------------------------------------------- a search's questions and answers


@dataclass(frozen=True, slots=True)
class Tune:
    """How to train a candidate to mimic the original's features.

    ``trainable``: "adaptors" trains only the 1x1 adaptors around the dropped blocks, "backbone" everything
    but the classifier. ``schedule``: "step" multiplies the rate by 0.1 after every 40% of the steps,
    "cosine" anneals it to 0; both rise linearly over the share ``warmup`` of the steps. ``stage_weight``
    adds the error of each stage's output to that of the features. ``autocast``: "auto" computes in bfloat16
    where the processor does so natively.
    """

    steps: int
    batch: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    warmup: float = 0.0
    stage_weight: float = 0.0
    trainable: Literal["adaptors", "backbone"] = "backbone"
    batch_norm: Literal["train", "eval"] = "train"
    augment: Literal["none", "resized_crop", "shift_cutmix"] = "resized_crop"
    autocast: Literal["auto", "off", "bf16"] = "off"


Want = Literal["latency", "quality", "distance"]


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about one candidate. ``distance`` is Eq. 31 of PRACTISE on the calibration set."""

    plan: Plan
    wants: tuple[Want, ...] = ("latency",)
    tune: Tune | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """The answer to an :class:`Ask`; a field that was not wanted is None. ``seconds`` is what it took."""

    key: str
    ask: Ask
    parameters: int
    macs: int
    latency: Latency | None = None
    quality: Quality | None = None
    distance: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """Slow work inside a search that is no candidate: a pure function, its result stored under a key.

    ``depends`` is all that the result depends on beside the original's weights, the calibration set and
    the run's seed; change it (a version number in it, say) when the function changes. Not JSON-able.
    """

    name: str
    depends: str
    function: Callable[[], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a :class:`Step` computed."""

    key: str
    name: str
    values: tuple[float, ...]
    seconds: float = 0.0


Request = Ask | Step
Answer = Trial | StepResult
Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Table:
    """A table for the report; ``None`` renders as an empty cell."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a search ended: what to take out, how to recover, why, and the tables that show it."""

    plan: Plan
    recover: Tune
    reason: str
    tables: tuple[Table, ...] = ()


Search = Generator[Sequence[Request], Sequence[Answer], Choice]


# ---------------------------------------------------------------- what a search may look at


@dataclass(frozen=True, slots=True)
class Budget:
    """What the result must meet; exactly one field is set.

    ``latency_reduction`` is a fraction of the original's latency, ``latency_ms`` an absolute time.
    """

    latency_reduction: float | None = None
    latency_ms: float | None = None
    drop_blocks: int | None = None

    def allowed_ratio(self, baseline: Latency) -> float | None:
        """The largest ratio to the baseline's latency that meets the budget; None if it is no latency."""
        if self.latency_reduction is not None:
            return 1.0 - self.latency_reduction
        if self.latency_ms is not None:
            return self.latency_ms / baseline.median_ms
        return None


class Images(Protocol):
    """A set of images held in memory, in a fixed order."""

    @property
    def labels(self) -> torch.Tensor | None:
        """Class of each image, int64 (N,), or None."""

    @property
    def digest(self) -> str:
        """sha256 over pixels, labels and preprocessing."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | slice) -> torch.Tensor:
        """Preprocessed, normalised images, float32 (N, C, H, W)."""


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a search may look at, read-only. Not JSON-able."""

    model: nn.Module
    graph: ModelGraph
    calibration: Images
    baseline: Latency
    budget: Budget
    recover: Tune
    seed: int


# ---------------------------------------------------------------- seams


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

    ``timing_cache`` is the cache that sped its build up, where the backend keeps one; ``notes`` are what the
    builder wants the user to know.
    """

    path: Path
    sha256: str
    build_s: float
    timing_cache: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineCount:
    """Where a search's latencies came from.

    Of ``candidates`` whose latency was asked for, ``structures`` differ; the others were answered by an
    equal structure. ``cached`` of the structures were timed by another run. ``builds_s`` are the first
    builds' times, ``second_build_s`` that of building one candidate again with a warm cache beside
    ``first_build_s`` of the same one.
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


class Method(Protocol):
    """A module in ``optpipe/methods``."""

    Config: type
    """A frozen dataclass: the keys of the recipe's ``[method]`` table and their defaults."""
    RECOVER: Tune
    """How to recover where the recipe's ``[recover]`` table does not say otherwise."""
    NEEDS_LABELS: bool

    def search(self, scene: Scene, config: object) -> Search:
        """Ask about candidates, then choose."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for the console and for events.jsonl; ``seconds`` is a duration."""

    kind: Literal["stage", "trial", "progress", "note", "warning"]
    name: str
    detail: str = ""
    done: int | None = None
    total: int | None = None
    seconds: float | None = None
    fields: tuple[tuple[str, Cell], ...] = field(default=())


Emit = Callable[[Event], None]
