"""How well the best convolution in a dropped block's place would do: recoverability without training.

The adaptors of PRACTISE are linear maps around the dropped block, trained until the features match
(Eq. 31). Here one linear map is fitted in closed form instead: the k x k convolution that predicts, in
least squares, what the block adds to its stream. What it cannot predict reaches the features, and that
error is the score. It ranks blocks as the trained adaptors do (``benchmarks/scoring.py`` compares the
two) for the price of a few passes over the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe.graph.blocks import Residual, residuals
from optpipe.graph.features import split
from optpipe.graph.flow import past_nothing
from optpipe.graph.surgery import apply, discard_unused, erase
from optpipe.graph.trace import propagate, shape, trace
from optpipe.types import Images, Plan

# A 3x3 map sees what the block's own convolutions see; beyond this many inputs its normal equations cost
# more than they tell, and a 1x1 map, which is what one adaptor is, takes its place.
MAX_INPUTS = 2400
# Ridge, relative to the mean power of the inputs: keeps dead channels from making the system singular.
RIDGE = 1e-3
# Positions that a layer's least squares sees at the most; they come from images spread over the whole set.
MAX_POSITIONS = 2**15
BATCH_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class _Normal:
    """Normal equations of one block: ``gram`` (D, D) and ``moment`` (D, C), in double precision."""

    kernel: int
    gram: torch.Tensor
    moment: torch.Tensor

    def solve(self) -> torch.Tensor:
        """The coefficients (D, C), the last row being the bias."""
        ridge = RIDGE * self.gram.diagonal().mean()
        regular = self.gram + ridge * torch.eye(len(self.gram)).to(self.gram)
        solution: torch.Tensor = torch.linalg.solve(regular, self.moment)
        return solution


def refit_errors(
    model: nn.Module,
    dropped: Plan,
    names: Sequence[str],
    images: Images,
    input_shape: tuple[int, int, int],
    count: int,
) -> tuple[float, ...]:
    """For each name the feature error of dropping that block beside those of ``dropped``.

    The error is the mean squared difference from ``model``'s features on the first ``count`` images, the
    blocks of ``dropped`` being gone without a substitute and the named one replaced by its best linear map.
    """
    original = split(trace(model, input_shape))[0]
    base = apply(model, dropped, input_shape)
    found = {residual.block.name: residual for residual in residuals(base)}
    total = min(count, len(images))
    size = _batch_size(base)
    with torch.no_grad():
        batches = [images.batch(part) for part in _slices(total, size)]
        wanted = [original(batch) for batch in batches]
        systems = _normal_equations(base, [found[name] for name in names], batches)
        errors: list[float] = []
        for name, system in zip(names, systems, strict=True):
            backbone = split(_with_substitute(base, name, system, input_shape))[0]
            squares = [
                F.mse_loss(backbone(batch), features, reduction="sum").double()
                for batch, features in zip(batches, wanted, strict=True)
            ]
            elements = sum(features.numel() for features in wanted)
            errors.append(float(torch.stack(squares).sum() / elements))
    return tuple(errors)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _batch_size(traced: fx.GraphModule) -> int:
    """As many images as let the stored feature maps of one batch stay small."""
    per_image = sum(torch.Size(shape(node) or (0,)).numel() for node in traced.graph.nodes) * 4
    return max(1, min(128, BATCH_BYTES // per_image))


def _branch(traced: fx.GraphModule, residual: Residual) -> fx.Node:
    """The operand of a droppable block's add that is not the stream."""
    stream = past_nothing(traced, residual.stream)
    return next(o for o in residual.add.all_input_nodes if past_nothing(traced, o) is not stream)


def _normal_equations(
    base: fx.GraphModule, blocks: Sequence[Residual], batches: Sequence[torch.Tensor]
) -> list[_Normal]:
    """The least squares of every block, from one pass over the images."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(base.graph, mapping)
    taps = [(mapping[r.stream], mapping[_branch(base, r)]) for r in blocks]
    graph.output(tuple(node for pair in taps for node in pair))
    tapped = fx.GraphModule(base, graph)
    systems: list[_Normal] = []
    count = sum(len(batch) for batch in batches)
    for batch in batches:
        values = tapped(batch)
        for number, (stream, update) in enumerate(zip(values[::2], values[1::2], strict=True)):
            kernel = 3 if 9 * stream.shape[1] < MAX_INPUTS else 1
            every = max(1, count * stream.shape[2] * stream.shape[3] // MAX_POSITIONS)
            inputs = _patches(stream[::every], kernel)
            outputs = update[::every].permute(0, 2, 3, 1).flatten(0, 2)
            gram, moment = (inputs.T @ inputs).double(), (inputs.T @ outputs).double()
            if number == len(systems):
                systems.append(_Normal(kernel, gram, moment))
            else:
                systems[number].gram.add_(gram)
                systems[number].moment.add_(moment)
    return systems


def _patches(maps: torch.Tensor, kernel: int) -> torch.Tensor:
    """The inputs of a k x k convolution with a bias, (N*H*W, C*k*k + 1), in the order of its weight."""
    unfolded = F.unfold(maps, kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1)
    return F.pad(unfolded, (0, 1), value=1.0)


def _with_substitute(
    base: fx.GraphModule, name: str, system: _Normal, input_shape: tuple[int, int, int]
) -> fx.GraphModule:
    """A copy of ``base`` whose named block adds the fitted convolution of its stream instead."""
    traced = trace(base, input_shape)
    residual = next(r for r in residuals(traced) if r.block.name == name)
    branch = _branch(traced, residual)
    channels = residual.block.input_shape[0]
    solved = system.solve().float()
    convolution = nn.Conv2d(channels, channels, system.kernel, padding=system.kernel // 2, device="meta")
    convolution.weight = nn.Parameter(
        solved[:-1].T.reshape(channels, channels, system.kernel, system.kernel).contiguous()
    )
    convolution.bias = nn.Parameter(solved[-1].contiguous())
    traced.add_submodule("optpipe_substitute", convolution)
    with traced.graph.inserting_before(residual.add):
        substitute = traced.graph.call_module("optpipe_substitute", (residual.stream,))
    residual.add.replace_input_with(branch, substitute)
    erase(traced, branch)
    discard_unused(traced)
    propagate(traced, input_shape)
    return traced
