"""Where the channels of each prunable group are made, carried and read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from optpipe.errors import UsageError
from optpipe.graph.channels import Follow, dependencies, groups_of
from optpipe.graph.trace import trace
from optpipe.graph.widths import is_depthwise, touched_by
from optpipe.types import ChannelGroup


@dataclass(frozen=True, slots=True)
class Part:
    """Where a group's channels lie at one side of a layer: ``channels[i]`` is at its ``positions[i]``.

    A concatenation shifts positions; behind a flattening one channel has several. A layer that handles
    channels one by one (batch-norm, depthwise convolution) has them as outputs alone.
    """

    layer: str
    outputs: bool
    positions: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def multiplicity(self) -> int:
        """At how many positions each channel lies."""
        return len(self.positions) // len(set(self.channels))


@dataclass(frozen=True, slots=True)
class WidthMap:
    """The prunable groups of a network in execution order, and the parts that each of them reaches.

    ``blocks[i]`` equal runs of the channels of group i must keep equally many each, for a grouped
    convolution's sake; 1 where every choice is fine. ``tied[i]`` is how many layers of it make channels of
    their own, each losing a filter with a channel: depthwise convolutions only carry them on.
    ``fixed`` are the other groups, each with its reason.
    Layers are named by path, so the map holds for every network of the same structure.
    """

    groups: tuple[ChannelGroup, ...]
    parts: tuple[tuple[Part, ...], ...]
    blocks: tuple[int, ...]
    tied: tuple[int, ...]
    fixed: tuple[ChannelGroup, ...]

    def readers(self, group: int) -> tuple[str, ...]:
        """The layers that read the group's channels as inputs, by path."""
        return tuple(part.layer for part in self.parts[group] if not part.outputs)

    def without(self, layers: Collection[str], reason: str) -> WidthMap:
        """The map in which groups that one of these layers reads stay whole, for that reason."""
        reads = (bool(set(self.readers(index)) & set(layers)) for index in range(len(self.groups)))
        return self.holding(tuple(reads), reason)

    def holding(self, stays: Sequence[bool], reason: str) -> WidthMap:
        """The map in which these groups, true for each that does, stay whole, for that reason."""
        held = tuple(
            replace(group, prunable=False, why_not=reason)
            for group, stay in zip(self.groups, stays, strict=True)
            if stay
        )
        free = [index for index, stay in enumerate(stays) if not stay]
        return WidthMap(
            tuple(self.groups[index] for index in free),
            tuple(self.parts[index] for index in free),
            tuple(self.blocks[index] for index in free),
            tuple(self.tied[index] for index in free),
            (*held, *self.fixed),
        )


def width_map(model: nn.Module, input_shape: tuple[int, int, int]) -> WidthMap:
    """The width map of a network for images (C, H, W).

    Raises UsageError for a model that cannot be traced; groups that cannot be narrowed are ``fixed``.
    """
    return width_map_of(trace(model, input_shape), input_shape)


def width_map_of(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> WidthMap:
    """The width map of a module that was traced already."""
    follow = dependencies(traced, input_shape)
    paths = {id(module): path for path, module in traced.named_modules()}
    groups, parts, blocks, tied, fixed = [], [], [], [], []
    for group in groups_of(traced, follow):
        if not group.prunable or isinstance(follow, str):
            fixed.append(group)
            continue
        try:
            reached = _parts(traced, follow, group, paths)
            runs = _blocks(traced, group, reached)
        except UsageError as error:
            fixed.append(replace(group, prunable=False, why_not=str(error)))
            continue
        groups.append(group)
        parts.append(reached)
        blocks.append(runs)
        tied.append(max(1, sum(_mixes(traced.get_submodule(path)) for path in group.layers)))
    return WidthMap(tuple(groups), tuple(parts), tuple(blocks), tuple(tied), tuple(fixed))


def _mixes(layer: nn.Module) -> bool:
    """Whether a layer makes channels of its own, and does not only carry on those that it reads."""
    return not (isinstance(layer, nn.Conv2d) and is_depthwise(layer))


def _parts(
    traced: fx.GraphModule, follow: Follow, group: ChannelGroup, paths: dict[int, str]
) -> tuple[Part, ...]:
    # Followed all at once, a channel that drags another along would not show.
    touched_by(traced, follow, group, {0}, paths)
    parts = []
    for path, touched in touched_by(traced, follow, group, set(range(group.channels)), paths):
        pairs = sorted(touched.origins, key=lambda pair: pair[0])
        part = Part(path, touched.outputs, tuple(p for p, _ in pairs), tuple(c for _, c in pairs))
        own = touched.outputs and path in group.layers
        even = set(Counter(part.channels).values()) == {part.multiplicity}
        if not even or len(set(part.channels)) != group.channels or (own and part.positions != part.channels):
            raise UsageError(f"its channels do not reach {path} one for one")
        parts.append(part)
    return tuple(parts)


def _blocks(traced: fx.GraphModule, group: ChannelGroup, parts: tuple[Part, ...]) -> int:
    """Into how many runs grouped convolutions divide a group's channels."""
    runs = 1
    for part in parts:
        layer = traced.get_submodule(part.layer)
        if not isinstance(layer, nn.Conv2d) or layer.groups == 1 or is_depthwise(layer):
            continue
        width = layer.out_channels if part.outputs else layer.in_channels
        if part.positions != part.channels or len(part.positions) != width:
            raise UsageError(f"{part.layer} works in {layer.groups} groups, and reads others' channels too")
        runs = math.lcm(runs, layer.groups)
    if runs > 1 and (group.channels % runs or group.channels == runs):
        raise UsageError(f"grouped convolutions divide it into {runs} runs, of which none can lose a channel")
    return runs
