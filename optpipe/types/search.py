"""A search's questions and answers, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from optpipe.types.measurement import Latency, Quality
from optpipe.types.network import ModelGraph, Plan

if TYPE_CHECKING:
    import torch
    from torch import fx, nn


@dataclass(frozen=True, slots=True)
class Tune:
    """How to train a candidate.

    ``steps`` are how many batches; ``epochs``, where it is given, decides them. ``batch`` is images in a
    batch. ``optimizer`` is "sgd" or "adamw". ``lr`` is the highest rate. ``momentum`` is SGD's, Nesterov's
    with ``nesterov``. ``weight_decay`` is that of all weights.

    ``loss``: "mimic" compares its features with the original's (MiR; PRACTISE, Eq. 34), "kd" its logits with
    the original's on the same views at ``temperature`` (Hinton et al., 2015), "cross" both, the original's
    features going through the student's classifier too (``optpipe.losses.cross_distillation``); none of these
    needs labels. "labels" compares its logits with the labels: with one view and no teachers it is the plain
    back propagation that PRACTISE's tables call BP.

    ``trainable``: "adaptors" trains only the 1x1 adaptors around the dropped blocks, "backbone" everything
    but the classifier, "all" everything. ``batch_norm`` "train" normalises with each batch's statistics and
    learns the running ones anew, "eval" leaves them as they are. ``schedule``: "step" multiplies the rate by
    0.1 after every 40% of the steps, "milestones" by ``decay`` at each of the shares ``milestones`` of them,
    "cosine" anneals it to 0; all rise linearly over the share ``warmup`` of the steps. ``stage_weight`` adds
    the error of each stage's output to that of the features, where features are compared. ``augment``:
    "resized_crop" and a flip, as the others have too; "shift" by up to an eighth of the size, "shift_color"
    with other colours, "shift_cutmix" with parts of other images; "none" takes images as they are.
    ``autocast``: "auto" computes in bfloat16 where the processor does so natively.

    With ``loss = "labels"``, each of ``views`` random views of an image adds its cross-entropy and, with
    ``teachers``, the divergence from them at ``temperature`` (EKG, Eq. 12): "single" is the original,
    "ensemble" the mean of those of ``bank`` interim networks that are still ahead of the student (Eq. 13).
    ``rescale`` gives each kernel that lost inputs its old norm back before training, the batch-norm after
    it scaled alike, so that the network computes what it did.
    """

    steps: int
    epochs: float | None = None
    batch: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Literal["step", "milestones", "cosine"] = "step"
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    warmup: float = 0.0
    loss: Literal["mimic", "kd", "cross", "labels"] = "mimic"
    stage_weight: float = 0.0
    teachers: Literal["none", "single", "ensemble"] = "none"
    bank: int = 5
    temperature: float = 4.0
    views: int = 1
    rescale: bool = False
    trainable: Literal["adaptors", "backbone", "all"] = "backbone"
    batch_norm: Literal["train", "eval"] = "train"
    augment: Literal["none", "resized_crop", "shift", "shift_color", "shift_cutmix"] = "resized_crop"
    autocast: Literal["auto", "off", "bf16"] = "off"

    @property
    def compares_features(self) -> bool:
        """Whether the student's features must have the shape of the original's."""
        return self.loss in ("mimic", "cross")


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
class Candidate:
    """A network that the search built and timed beside the original, before the recovery of what is shipped.

    ``ratio`` is the median of paired ratios to the original's latency, ``ratio_ci95`` its interval.
    ``quality`` is None where the search measured none; its ``split`` says on which images it did.
    """

    name: str
    parameters: int
    macs: int
    median_ms: float
    ratio: float
    ratio_ci95: tuple[float, float]
    quality: Quality | None = None
    chosen: bool = False


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


@dataclass(frozen=True, slots=True)
class Start:
    """Where a network starts but at the original: the key of a :class:`Trained` or :class:`Fitted`, its plan.

    ``part`` names the network among the weights of a :class:`Fitted`, with what comes before their names.
    """

    key: str
    plan: Plan
    part: str = ""


@dataclass(frozen=True, slots=True)
class Train:
    """Train a candidate on some of the calibration images (all of them by default) and hand it over.

    It starts with the original's weights, or with those of ``start``, whose plan must take out nothing
    that ``plan`` leaves in. With ``score``, the candidate's quality on those calibration images is wanted, or
    on the validation images. Images have the plan's resolution. ``tune.teachers`` may be "single", the
    original at its own resolution; there is no ensemble on the way.
    """

    plan: Plan
    tune: Tune
    images: tuple[int, ...] | None = None
    start: Start | None = None
    score: tuple[int, ...] | Literal["validation"] | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """What a :class:`Train` came to. Not JSON-able.

    ``network`` is in eval mode, for reading only. ``digest`` is the sha256 of its weights: on another machine
    the same request may come to others, so that what is computed from them depends on it. ``quality`` is
    None where none was wanted.
    """

    key: str
    network: fx.GraphModule
    digest: str
    quality: Quality | None = None
    seconds: float = 0.0


class Objective(Protocol):
    """The loss of a step, and what it must remember from one step to the next."""

    def loss(self, which: Sequence[int], images: torch.Tensor) -> torch.Tensor:
        """The loss of the training images ``which``; ``images`` are their views, one view after the other."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of it."""

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Put such a state back."""


@runtime_checkable
class Divisible(Objective, Protocol):
    """An objective whose batches may be taken in parts: its loss is a mean over images.

    ``loss`` may then be asked of one part of a step's images after the other, and changes no state: what is
    to be remembered of the images is noted, and taken over when the whole step is done.
    """

    def noted(self) -> torch.Tensor:
        """What the last loss noted of each of its images, (B,), and notes no more; (0,) if nothing."""

    def remember(self, noted: torch.Tensor) -> None:
        """Take over what was noted of all images of a step, in the batch's order."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Train what a method makes itself, by an objective of its own, on all calibration images.

    ``make`` makes the module as it is before training, and the objective that trains it; a pure function.
    ``depends`` is all that the result depends on beside the original's weights, the calibration set, the
    run's seed and ``tune``, of which all parameters are trained. Without steps the module is stored as it is
    made. Not JSON-able.
    """

    name: str
    depends: str
    tune: Tune
    make: Callable[[], tuple[nn.Module, Objective]]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a :class:`Fit` came to: the module in eval mode, for reading only. Not JSON-able.

    ``digest`` is the sha256 of its weights, as in :class:`Trained`.
    """

    key: str
    module: nn.Module
    digest: str
    seconds: float = 0.0


Request = Ask | Step | Train | Fit
Answer = Trial | StepResult | Trained | Fitted
Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Table:
    """A table for the report; ``None`` renders as an empty cell."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (x, y) of a figure, joined by a line in their order or each a dot; the legend has the name.

    "interval" is the line of another point's uncertainty: thin and grey, whatever its name;
    "ticks" are strokes at one height, for points of which x alone is known.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: Literal["line", "dots", "interval", "ticks"] = "line"


@dataclass(frozen=True, slots=True)
class Surface:
    """Values over two ascending axes: ``values[j][i]`` belongs to x[i] and y[j]; None is left white."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    values: tuple[tuple[float | None, ...], ...]
    label: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure for the report: curves, over a surface where there is one."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...] = ()
    surface: Surface | None = None


@dataclass(frozen=True, slots=True)
class Interim:
    """A network on the way from the original to the chosen one, a teacher for its recovery.

    ``loss`` is its cross-entropy to labels where the search measured it.
    """

    plan: Plan
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A network of an ensemble: the training that it is made of, and its plan."""

    plan: Plan
    start: Start


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a search ended: what to take out, how to recover, why, and the tables and figures that show it.

    ``start`` is the training that the chosen network is made of, by taking out what the plan has beyond it;
    None is the original. ``interim`` are the networks on the way, the original's own first, the chosen one
    last; they are made of ``start`` where its plan is empty, else of the original. ``members`` are networks
    that are as likely as the chosen one, for an ensemble that tells how far it can be trusted.
    """

    plan: Plan
    recover: Tune
    reason: str
    tables: tuple[Table, ...] = ()
    start: Start | None = None
    interim: tuple[Interim, ...] = ()
    figures: tuple[Figure, ...] = ()
    members: tuple[Member, ...] = ()


Search = Generator[Sequence[Request], Sequence[Answer], Choice]


@dataclass(frozen=True, slots=True)
class Budget:
    """What the result must meet; exactly one field is set.

    ``latency_reduction`` is a fraction of the original's latency. ``latency_ms`` is an absolute time of a
    batch. ``macs_reduction`` and ``parameters_reduction`` are fractions of the original's. ``sparsity`` is
    the share of the weights of convolutions and linear layers that is zero. ``drop_blocks`` is a number of
    blocks.
    """

    latency_reduction: float | None = None
    latency_ms: float | None = None
    macs_reduction: float | None = None
    parameters_reduction: float | None = None
    sparsity: float | None = None
    drop_blocks: int | None = None

    def met_in_size(self, macs: float, parameters: float) -> bool | None:
        """Whether these fractions of the original's MACs and parameters meet it; None if it is no size."""
        # 0.9 of the MACs is a reduction by 0.1, whatever 1 - 0.9 is in floating point.
        if self.macs_reduction is not None:
            return macs <= 1.0 - self.macs_reduction + 1e-9
        if self.parameters_reduction is not None:
            return parameters <= 1.0 - self.parameters_reduction + 1e-9
        return None

    def allowed_ratio(self, baseline: Latency) -> float | None:
        """The largest ratio to the baseline's latency that meets the budget; None if it is no latency."""
        if self.latency_reduction is not None:
            return 1.0 - self.latency_reduction
        if self.latency_ms is not None:
            return self.latency_ms / baseline.median_ms
        return None


class Images(Protocol):
    """A set of images in a fixed order: in memory, or read when they are asked for."""

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
    """All that a search may look at, read-only. Not JSON-able.

    ``validation`` are images that no training sees, to learn accuracy from, where the recipe gives any.
    ``device`` is where torch computes, ``native_bf16`` whether it has instructions for bfloat16.
    """

    model: nn.Module
    graph: ModelGraph
    calibration: Images
    baseline: Latency
    budget: Budget
    recover: Tune
    seed: int
    device: str = "cpu"
    native_bf16: bool = False
    validation: Images | None = None
