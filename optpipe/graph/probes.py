"""How much each unit of depth adds to what a linear classifier can tell from the features.

Comprehensive pruning (Wang et al., "Accelerate CNNs from Three Dimensions", section 3.3) ranks layers as
Wang et al., "DBP: Discrimination Based Block-Level Pruning", do: linear classifiers, the probes, are put
behind all of them, and a layer matters as much as the accuracy rises from the probe before it to the one
behind it. Here the probes are fitted in closed form, all of them in one pass over the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Argument

from optpipe.errors import UsageError
from optpipe.graph.flow import past_nothing, relu_ceiling
from optpipe.graph.trace import module_of, shape, trace
from optpipe.graph.units import depth_units
from optpipe.types import Images

# Relative to the power of a standardised feature, which is 1.
RIDGE = 3e-2
# Features that vary by less than this share of their mean are constant: what varies is their rounding.
CONSTANT = 1e-5
# The largest feature map of a batch, in elements, and the most images in one.
BATCH_ELEMENTS = 2**24
BATCH_IMAGES = 64


@dataclass(frozen=True, slots=True)
class UnitScore:
    """What the probes before and after one unit of depth tell apart on the images that they are scored on.

    ``before`` and ``after`` are top-1 accuracies from 0 to 1. ``skill_before`` and ``skill_after`` are the
    share of the labels' variance that the probes explain there: 1 minus the squared error to one-hot labels
    over that of always answering the classes' frequencies (the Brier skill score). It is 1 at best, and
    below 0 where a probe is worse than none. Every image moves it, not only those whose class changes, so
    that it has no ties and less noise than accuracy where images are few.
    """

    name: str
    before: float
    after: float
    skill_before: float
    skill_after: float

    @property
    def importance(self) -> float:
        """How much accuracy the unit adds; below 0 where it costs some."""
        return self.after - self.before

    @property
    def gain(self) -> float:
        """How much skill the unit adds: it breaks ties of importance, or takes its place."""
        return self.skill_after - self.skill_before


@torch.no_grad()
def unit_discrimination(
    network: fx.GraphModule | nn.Module,
    images: Images,
    fit: Sequence[int],
    score: Sequence[int],
    input_shape: tuple[int, int, int],
    *,
    scored_on: Images | None = None,
    device: str = "cpu",
    autocast: bool = False,
    ridge: float = RIDGE,
) -> tuple[UnitScore, ...]:
    """The score of every droppable unit of depth in execution order, weights and all as they are now.

    Probes read the globally averaged features at each unit's input and output; the output of a dense layer
    is all that the next one reads, the features before it too. They are fitted to the
    images ``fit`` and scored on the images ``score``, by index; both have the shape ``input_shape``. The
    latter are those of another set, ``scored_on``, where one is given. Each
    image goes through the network once. Beside one batch, memory holds for each probe of C features a
    (C, C) matrix in double precision, however many images there are. ``autocast`` computes the features in
    bfloat16; ``ridge`` weighs the squared coefficients of standardised features against the mean squared
    error.
    Raises UsageError for images without labels, for no images to fit or to score, for one that is in both,
    for images to fit that are all of one class, and for a model that cannot be traced.
    """
    other = images if scored_on is None else scored_on
    targets, wanted_there = (one.to(device) for one in _targets(images, fit, other, score))
    traced = trace(network, input_shape)
    units = [unit for unit in depth_units(traced) if unit.block.droppable]
    if not units:
        return ()
    ends = [(past_nothing(traced, unit.stream), _handed_on(traced, unit.stream, unit.end)) for unit in units]
    nodes = list(dict.fromkeys(node for pair in ends for node in pair))
    network_to = _pooling(traced, nodes).to(device)
    run = _Run(network_to, images, targets, _batch(traced), device, autocast)
    scoring = replace(run, images=other, targets=wanted_there)
    sums = [_Sums.of((shape(node) or ())[1], targets.shape[1], device) for node in nodes]
    for pooled, wanted in run.over(fit):
        for one, features in zip(sums, pooled, strict=True):
            one.add(features, wanted)
    probes = [one.solve(ridge) for one in sums]
    frequencies = targets[list(fit)].mean(0)
    tallies = [_Tally() for _ in nodes]
    for pooled, wanted in scoring.over(score):
        for tally, probe, features in zip(tallies, probes, pooled, strict=True):
            tally.add(probe(features), wanted, frequencies)
    found = dict(zip(nodes, tallies, strict=True))
    return tuple(
        UnitScore(
            unit.block.name,
            found[before].accuracy,
            found[after].accuracy,
            found[before].skill,
            found[after].skill,
        )
        for unit, (before, after) in zip(units, ends, strict=True)
    )


def _targets(
    images: Images, fit: Sequence[int], other: Images, score: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-hot labels of both sets, double (N, classes), once it is sure that probes can be fitted."""
    labels, others = images.labels, other.labels
    if labels is None or others is None:
        raise UsageError(
            "units of depth are ranked by probes that tell classes apart, and these images have no labels; "
            "give labelled images"
        )
    for what, chosen, those in (("fit", fit, images), ("score", score, other)):
        if not len(chosen):
            raise UsageError(f"there are no images to {what} probes with; give some of the {len(those)}")
    both = set(fit) & set(score) if other is images else set()
    if both:
        raise UsageError(
            f"image {min(both)} is to be scored by probes that are fitted to it; keep the two sets apart"
        )
    seen = {int(label) for label in labels[list(fit)]}
    if len(seen) < 2:
        raise UsageError(
            f"all {len(fit)} images that probes are to be fitted to are of class {seen.pop()}; give images "
            "of several classes"
        )
    classes = 1 + int(max(labels.max(), others.max()))
    own, there = (F.one_hot(one.long(), classes).double() for one in (labels, others))
    return own, there


def _handed_on(traced: fx.GraphModule, stream: fx.Node, end: fx.Node) -> fx.Node:
    """The end of a unit, with the ReLU behind it where its stream has passed one as well.

    Both ends are then in the state in which they are read, and a unit that adds nothing changes nothing.
    """
    before = stream
    while isinstance(module_of(traced, before), nn.MaxPool2d | nn.Identity | nn.modules.dropout._DropoutNd):
        before = before.all_input_nodes[0]
    reader = next(iter(end.users)) if len(end.users) == 1 else end
    ceiling = relu_ceiling(traced, reader)
    return reader if ceiling is not None and ceiling == relu_ceiling(traced, before) else end


def _pooling(traced: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A network of images that returns the globally averaged maps of these nodes, float32 (N, C) each."""
    order = list(traced.graph.nodes)
    last = max(order.index(node) for node in nodes)
    graph, copied, pooled = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, fx.Node]()
    for node in order[: last + 1]:
        copied[node] = graph.node_copy(node, copied.__getitem__)
        if node in nodes:  # at once: what comes later may change the map in place
            options: dict[str, Argument] = {"dim": (2, 3), "dtype": torch.float32}
            pooled[node] = graph.call_function(torch.mean, (copied[node],), options)
    graph.output(tuple(pooled[node] for node in nodes))
    return fx.GraphModule(traced, graph, f"{type(traced).__name__}Pooled")


def _batch(traced: fx.GraphModule) -> int:
    """As many images as let the largest feature map of a batch stay small."""
    largest = max(torch.Size(shape(node) or (0,)).numel() for node in traced.graph.nodes)
    return max(1, min(BATCH_IMAGES, BATCH_ELEMENTS // largest))


@dataclass(frozen=True, slots=True)
class _Run:
    """The pooled features of images, and the targets that belong to them, batch by batch."""

    network: fx.GraphModule
    images: Images
    targets: torch.Tensor
    batch: int
    device: str
    autocast: bool

    def over(self, chosen: Sequence[int]) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        dtype = next((p.dtype for p in self.network.parameters()), torch.float32)
        kind = torch.device(self.device).type
        for start in range(0, len(chosen), self.batch):
            part = list(chosen[start : start + self.batch])
            batch = self.images.batch(part).to(self.device, dtype)
            with torch.autocast(kind, torch.bfloat16, enabled=self.autocast):
                pooled = self.network(batch)
            yield [features.double() for features in pooled], self.targets[part]


@dataclass(slots=True)
class _Sums:
    """What the least squares of one probe needs of the images seen so far, in double precision."""

    count: int
    features: torch.Tensor
    squares: torch.Tensor
    targets: torch.Tensor
    moments: torch.Tensor

    @classmethod
    def of(cls, channels: int, classes: int, device: str) -> _Sums:
        """The sums over no image."""
        shapes = ((channels,), (channels, channels), (classes,), (channels, classes))
        return cls(0, *(torch.zeros(size, dtype=torch.float64, device=device) for size in shapes))

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in a batch of features (N, C) and targets (N, classes)."""
        self.count += len(features)
        self.features += features.sum(0)
        self.squares += features.T @ features
        self.targets += targets.sum(0)
        self.moments += features.T @ targets

    def solve(self, ridge: float) -> _Probe:
        """The ridge regression of the targets on standardised features; the bias is not held down."""
        mean, target = self.features / self.count, self.targets / self.count
        covariance = self.squares / self.count - mean.outer(mean)
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        constant = deviation <= CONSTANT * mean.abs()
        scale = torch.where(constant, 0.0, 1 / deviation)
        regular = covariance * scale.outer(scale)
        regular.diagonal().add_(ridge).add_(constant.double())
        moments = (self.moments / self.count - mean.outer(target)) * scale[:, None]
        weight = torch.linalg.solve(regular, moments) * scale[:, None]
        return _Probe(weight, target - mean @ weight)


@dataclass(frozen=True, slots=True)
class _Probe:
    """A linear classifier of pooled features: ``weight`` (C, classes), ``bias`` (classes,)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.weight + self.bias


@dataclass(slots=True)
class _Tally:
    """How a probe has done on the images seen so far."""

    count: int = 0
    right: int = 0
    error: float = 0.0
    spread: float = 0.0

    def add(self, answers: torch.Tensor, targets: torch.Tensor, frequencies: torch.Tensor) -> None:
        """Take in a batch of answers and targets (N, classes)."""
        self.count += len(answers)
        self.right += int((answers.argmax(1) == targets.argmax(1)).sum())
        self.error += float((answers - targets).square().sum())
        self.spread += float((frequencies - targets).square().sum())

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def skill(self) -> float:
        return 1 - self.error / self.spread
