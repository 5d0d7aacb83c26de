"""How well a network without a block can be refitted: recoverability in closed form, without training.

PRACTISE trains linear maps around the dropped block until the features match (Eq. 31). Here the maps are
found one after another by least squares, in the order of execution, each for what the network computes by
then: a k x k convolution of the stream in the dropped block's place, then a 1x1 map of what every later
residual block yields, all towards what the original has at the same node. The error that is left in the
features is the score.

Without the later maps, what is lost early would reach the features as it is, and early blocks would look
worse than they are (``benchmarks/scoring.py`` compares the ranks). What runs before a dropped block is the
same for all candidates and runs once; so does the original.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe.graph.blocks import Residual, residuals
from optpipe.graph.features import feature_node
from optpipe.graph.surgery import chosen
from optpipe.graph.trace import shape, trace
from optpipe.types import Images, Plan

# A 3x3 map sees what the block's own convolutions see; beyond this many inputs its normal equations cost
# more than they tell, and a 1x1 map, which is what one adaptor is, takes its place.
MAX_INPUTS = 2400
# Ridge, relative to the mean power of the inputs: keeps dead channels from making the system singular.
RIDGE = 1e-3
# Places, over all images, that the least squares of one map see at the most.
MAX_PLACES = 2**15
# Places for each input below which a map is not fitted: it would learn these places, and the error with them.
MIN_PLACES = 3
BATCH = 32

_Values: TypeAlias = dict[fx.Node, object]
"""What nodes yielded for one batch, as long as later nodes read it."""


@dataclass(frozen=True, slots=True)
class _Course:
    """A network up to its features.

    ``order``: the nodes to run, images apart. ``ends``: the residual block that an add ends. ``expire``: what
    nothing reads any more after a node. ``targets``: what the original has at every place that the fit of an
    add sees, (places, C) for each batch. ``features``: the original's, for each batch.
    """

    interpreter: fx.Interpreter
    order: tuple[fx.Node, ...]
    ends: dict[fx.Node, Residual]
    expire: dict[fx.Node, tuple[fx.Node, ...]]
    targets: dict[fx.Node, list[torch.Tensor]]
    features: list[torch.Tensor]


def refit_errors(
    model: nn.Module,
    dropped: Plan,
    names: Sequence[str],
    images: Images,
    input_shape: tuple[int, int, int],
    count: int,
) -> tuple[float, ...]:
    """For each name the feature error of dropping that block beside those of ``dropped``, all refitted.

    The error is the mean squared difference from ``model``'s features on the first ``count`` images. It is
    that of the set: the same whichever of its blocks is the one named.

    Raises:
        UsageError: a block is unknown or cannot be dropped, or the plan does more than to drop blocks.
    """
    traced = trace(model, input_shape)
    found = residuals(traced)
    gone = frozenset(residual.add for residual in chosen(found, dropped))
    named = {residual.add: residual.block.name for residual in chosen(found, Plan(drop_blocks=tuple(names)))}
    total = min(count, len(images))
    parts = [slice(start, min(start + BATCH, total)) for start in range(0, total, BATCH)]
    with torch.no_grad():
        batches = [images.batch(part) for part in parts]
        course = _course(traced, found, batches)
        errors = _errors(course, _start(traced, batches), gone, named)
    return tuple(errors[name] for name in names)


def _start(traced: fx.GraphModule, batches: Sequence[torch.Tensor]) -> list[_Values]:
    entry = next(node for node in traced.graph.nodes if node.op == "placeholder")
    return [{entry: batch} for batch in batches]


def _course(traced: fx.GraphModule, found: Sequence[Residual], batches: Sequence[torch.Tensor]) -> _Course:
    """Run the original once and keep what the candidates are compared with."""
    nodes, last = list(traced.graph.nodes), feature_node(traced)
    order = tuple(node for node in nodes[: nodes.index(last) + 1] if node.op != "placeholder")
    ends = {residual.add: residual for residual in found if residual.add in order}
    course = _Course(fx.Interpreter(traced), order, ends, _expiry(order, ends), {}, [])
    running = _start(traced, batches)
    for node in order:
        _run(course, node, running)
        if node in ends:
            stride = _stride(shape(node) or (), sum(len(batch) for batch in batches))
            course.targets[node] = [_places(value, 1, stride) for value in _tensors(running, node)]
        _forget(course, node, running)
    course.features.extend(_tensors(running, last))
    return course


def _expiry(order: Sequence[fx.Node], ends: dict[fx.Node, Residual]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """What no node reads after each one; a block's stream may be asked for as late as at its add."""
    reader: dict[fx.Node, fx.Node] = {}
    for node in order:
        reader.update(dict.fromkeys(node.all_input_nodes, node))
        if node in ends:
            reader[ends[node].stream] = node
    reader.pop(order[-1], None)
    return {node: tuple(source for source, user in reader.items() if user is node) for node in order}


def _errors(
    course: _Course, running: list[_Values], gone: frozenset[fx.Node], named: dict[fx.Node, str]
) -> dict[str, float]:
    """The error of each named block's set: what runs before its add is shared, what runs after is its own."""
    errors: dict[str, float] = {}
    fitted = False
    for number, node in enumerate(course.order):
        if node in named:
            alone = [dict(values) for values in running]
            errors[named[node]] = _finish(course, alone, number, gone | {node}, fitted)
        fitted = _step(course, node, running, gone, fitted)
    return errors


def _finish(
    course: _Course, running: list[_Values], number: int, gone: frozenset[fx.Node], fitted: bool
) -> float:
    """Run the rest, from a node on, and compare the features."""
    for node in course.order[number:]:
        fitted = _step(course, node, running, gone, fitted)
    squares = [
        F.mse_loss(own, features, reduction="sum").double()
        for own, features in zip(_tensors(running, course.order[-1]), course.features, strict=True)
    ]
    return float(torch.stack(squares).sum()) / sum(features.numel() for features in course.features)


def _step(
    course: _Course, node: fx.Node, running: list[_Values], gone: AbstractSet[fx.Node], fitted: bool
) -> bool:
    """Run one node; returns whether anything was fitted so far, after which all that an add yields is."""
    if node in gone:
        _fit(course, running, course.ends[node].stream, node, 3)
        fitted = True
    elif not any(node in course.ends[add].region for add in gone):
        _run(course, node, running)
        if fitted and node in course.ends:
            _fit(course, running, node, node, 1)
    _forget(course, node, running)
    return fitted


def _run(course: _Course, node: fx.Node, running: Sequence[_Values]) -> None:
    for values in running:
        course.interpreter.env = values
        values[node] = course.interpreter.run_node(node)


def _forget(course: _Course, node: fx.Node, running: Sequence[_Values]) -> None:
    for values in running:
        for source in course.expire[node]:
            values.pop(source, None)


def _tensors(running: Sequence[_Values], node: fx.Node) -> list[torch.Tensor]:
    return [cast(torch.Tensor, values[node]) for values in running]


def _fit(course: _Course, running: Sequence[_Values], source: fx.Node, add: fx.Node, widest: int) -> None:
    """Let ``add`` yield the convolution of ``source`` that is nearest to what the original's yields.

    Fitted is what is to be added to ``source``, so that the ridge draws the map to the identity. The kernel
    is ``widest``, or 1 where that has too many inputs; where even so there are too few places, ``add``
    yields ``source`` as it is.
    """
    inputs = _tensors(running, source)
    channels = inputs[0].shape[1]
    stride = _stride(tuple(inputs[0].shape), sum(len(value) for value in inputs))
    places = sum(len(target) for target in course.targets[add])
    kernel = widest if widest**2 * channels < MAX_INPUTS and _enough(places, widest, channels) else 1
    if not _enough(places, kernel, channels):
        for values, value in zip(running, inputs, strict=True):
            values[add] = value
        return
    gram = torch.zeros(kernel**2 * channels + 1, kernel**2 * channels + 1, dtype=torch.float64)
    moment = torch.zeros(len(gram), channels, dtype=torch.float64)
    for value, target in zip(inputs, course.targets[add], strict=True):
        seen = F.pad(_places(value, kernel, stride), (0, 1), value=1.0)
        gram += seen.T @ seen
        moment += seen.T @ (target - _places(value, 1, stride))
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, moment).float()
    weight = solved[:-1].T.reshape(channels, channels, kernel, kernel)
    weight[:, :, kernel // 2, kernel // 2] += torch.eye(channels)
    for values, value in zip(running, inputs, strict=True):
        values[add] = F.conv2d(value, weight, solved[-1], padding=kernel // 2)


def _enough(places: int, kernel: int, channels: int) -> bool:
    return places >= MIN_PLACES * (kernel**2 * channels + 1)


def _stride(size: tuple[int, ...], count: int) -> int:
    """How far apart the places of a feature map (N, C, H, W) lie that are seen, in both directions.

    Odd, so that no later layer of stride 2 reads all of them or none.
    """
    stride = 1
    while count * math.ceil(size[2] / stride) * math.ceil(size[3] / stride) > MAX_PLACES and stride < max(
        size[2:]
    ):
        stride += 2
    return stride


def _places(maps: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """What a k x k convolution sees at every ``stride``-th place, (places, C*k*k) in its weight's order."""
    if kernel == 1:
        return maps[:, :, ::stride, ::stride].permute(0, 2, 3, 1).flatten(0, 2)
    return F.unfold(maps, kernel, padding=kernel // 2, stride=stride).transpose(1, 2).flatten(0, 1)
