"""A search's questions and answers, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from optpipe.types.measurement import Latency, Quality
from optpipe.types.network import ModelGraph, Plan

if TYPE_CHECKING:
    import torch
    from torch import nn


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
