"""Taking channels out of a traced network: what goes with them, and the cut."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from optpipe.errors import UsageError
from optpipe.graph.channels import Follow, Touched, dependencies, failure, groups_of
from optpipe.types import ChannelGroup

# Relative to the largest logit. Sums of fewer terms round otherwise; a wrong channel is off by far more.
_TOLERANCE = 1e-3


@dataclass(slots=True)
class Removed:
    """Channels that one layer loses, counted as in the original.

    A layer that handles channels one by one (batch-norm, depthwise convolution) has them as outputs alone.
    """

    outputs: set[int] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)


def removals(
    traced: fx.GraphModule,
    keep: Sequence[tuple[str, tuple[int, ...]]],
    input_shape: tuple[int, int, int],
) -> dict[str, Removed]:
    """What each layer loses where groups keep these channels, by the layer's path; ``traced`` is not changed.

    Raises UsageError for a group that is unknown, named twice or not prunable, for channels that are no
    ascending choice of the group's, and for channels that cannot go without others.
    """
    if not keep:
        return {}
    follow = dependencies(traced, input_shape)
    groups = groups_of(traced, follow)
    paths = {id(module): path for path, module in traced.named_modules()}
    removed: dict[str, Removed] = {}
    named: set[str] = set()
    for name, kept in keep:
        group = _group(groups, name)
        if name in named:
            raise UsageError(f"channel group {name!r} is named twice; name all its kept channels once")
        named.add(name)
        _check(group, kept)
        gone = set(range(group.channels)).difference(kept)
        if not gone or isinstance(follow, str):
            continue
        for path, part in touched_by(traced, follow, group, gone, paths):
            layer = removed.setdefault(path, Removed())
            (layer.outputs if part.outputs else layer.inputs).update(part.channels)
    return removed


def _group(groups: Sequence[ChannelGroup], name: str) -> ChannelGroup:
    """The prunable group of this name."""
    known = {group.name: group for group in groups}
    if name not in known:
        home = next((group.name for group in groups if name in group.layers), None)
        near = home or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.0)), None)
        hint = f"did you mean {near!r}?" if near else "the network has no convolution and no linear layer"
        if home:
            hint = f"that layer belongs to the group {home!r}"
        raise UsageError(f"no channel group is named {name!r}; {hint}")
    if not known[name].prunable:
        raise UsageError(f"channel group {name!r} cannot be narrowed: {known[name].why_not}")
    return known[name]


def _check(group: ChannelGroup, kept: tuple[int, ...]) -> None:
    what = f"channel group {group.name!r}"
    if not kept:
        raise UsageError(f"{what} would keep no channel; keep at least one of its {group.channels}")
    outside = [index for index in kept if not 0 <= index < group.channels]
    if outside:
        raise UsageError(f"{what} has no channel {outside[0]}; its channels are 0 to {group.channels - 1}")
    for before, after in itertools.pairwise(kept):
        if before >= after:
            raise UsageError(f"{what} keeps {before} before {after}; list each kept channel once, ascending")


def touched_by(
    traced: fx.GraphModule, follow: Follow, group: ChannelGroup, gone: set[int], paths: dict[int, str]
) -> list[tuple[str, Touched]]:
    """(path, what it loses) of each layer that loses channels where one group loses the channels ``gone``.

    ``paths`` are those of the modules by their id. Raises UsageError for channels that cannot go alone.
    """
    first = traced.get_submodule(group.name)
    try:
        touched = follow(first, sorted(gone))
    except Exception as error:  # torch-pruning's own code: anything can go wrong there
        raise UsageError(f"channel group {group.name!r} cannot be narrowed: {failure(error)}") from error
    own = {id(traced.get_submodule(path)) for path in group.layers}
    found = []
    for t in touched:
        path = paths.get(id(t.part))
        if path is None:  # a stand-in for a function: concatenation, addition
            continue
        if t.outputs and isinstance(t.part, nn.Conv2d | nn.Linear) and id(t.part) not in own:
            raise UsageError(
                f"channel group {group.name!r} cannot be narrowed: some of its channels are tied to {path}'s"
            )
        if t.part is first and t.outputs and not t.channels <= gone:
            more = min(t.channels - gone)
            raise UsageError(
                f"channel group {group.name!r} cannot keep channel {more}: it is tied to one that goes"
            )
        found.append((path, t))
    return found


def narrow(
    traced: fx.GraphModule,
    removed: dict[str, Removed],
    input_shape: tuple[int, int, int],
    take_out: Callable[[], None] | None = None,
) -> None:
    """Cut channels out of the layers of ``traced`` itself that are still there.

    One random image is run before, with zero weights for the channels that go, and after. Where the two
    differ, the dependencies were not the network's (a channel shuffle, a softmax over channels), and
    UsageError says so. ``take_out`` is called between the two, to take out what makes only such channels.
    """
    cuts = _cuts(traced, removed)
    like = next(traced.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *input_shape, generator=generator).to(like.device, like.dtype)
    with torch.no_grad():
        for path, layer, cut in cuts:
            _silence(path, layer, cut.inputs)
        expected = traced(image)
        if take_out is not None:
            take_out()
            cuts = _cuts(traced, removed)
        for path, layer, cut in cuts:
            _shrink(path, layer, cut)
        problem = ""
        try:
            off = (traced(image) - expected).abs().max()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            problem = f"does not run: {str(error).strip().splitlines()[0]}"
        else:
            limit = max(_TOLERANCE, 8 * torch.finfo(like.dtype).eps) * expected.abs().max()
            if not off <= limit and bool(expected.isfinite().all()):
                problem = "does not compute what the original does with those channels at zero"
    if problem:
        raise UsageError(
            f"the network narrowed in {', '.join(path for path, _, _ in cuts[:4])} {problem}; some operation "
            "on its channels is not what torch-pruning takes it for: leave these groups whole"
        )


def _cuts(traced: fx.GraphModule, removed: dict[str, Removed]) -> list[tuple[str, nn.Module, Removed]]:
    """(path, layer, what it loses) of the layers that are still there."""
    standing = dict(traced.named_modules())
    return [(path, standing[path], cut) for path, cut in removed.items() if path in standing]


def _kept(path: str, width: int, groups: int, gone: set[int]) -> list[list[int]]:
    """For each group of a layer's channels, those that stay, counted from the group's first."""
    size = width // groups
    kept = [[i for i in range(size) if first + i not in gone] for first in range(0, width, size)]
    counts = [len(group) for group in kept]
    if len(set(counts)) > 1:
        raise UsageError(
            f"{path} works in {groups} groups, which must keep equally many channels; they would keep "
            f"{', '.join(map(str, counts))}"
        )
    if not counts[0]:
        raise UsageError(f"{path} would be left without a channel; keep one more of those that reach it")
    return kept


def _silence(path: str, layer: nn.Module, inputs: set[int]) -> None:
    """Zero the weights that read these input channels."""
    if not inputs:
        return
    if isinstance(layer, nn.Linear):
        layer.weight[:, sorted(inputs)] = 0
    elif isinstance(layer, nn.Conv2d) and not is_depthwise(layer):
        size = layer.in_channels // layer.groups
        for part, kept in zip(
            layer.weight.chunk(layer.groups),
            _kept(path, layer.in_channels, layer.groups, inputs),
            strict=True,
        ):
            part[:, sorted(set(range(size)).difference(kept))] = 0


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution has one filter for each of its input channels."""
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def _shrink(path: str, layer: nn.Module, cut: Removed) -> None:
    """Take the channels out of one layer itself."""
    if isinstance(layer, nn.Conv2d):
        _shrink_conv(path, layer, cut)
        return
    if isinstance(layer, nn.Linear):
        (outputs,) = _kept(path, layer.out_features, 1, cut.outputs)
        (inputs,) = _kept(path, layer.in_features, 1, cut.inputs)
        _select(layer, outputs)
        layer.weight = _parameter(layer.weight[:, inputs], layer.weight)
        layer.out_features, layer.in_features = len(outputs), len(inputs)
    elif isinstance(layer, nn.PReLU):
        if layer.num_parameters > 1:
            (outputs,) = _kept(path, layer.num_parameters, 1, cut.outputs)
            _select(layer, outputs)
            layer.num_parameters = len(outputs)
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        (outputs,) = _kept(path, layer.num_features, 1, cut.outputs)
        _select(layer, outputs)
        layer.num_features = len(outputs)


def _shrink_conv(path: str, layer: nn.Conv2d, cut: Removed) -> None:
    if is_depthwise(layer):
        (outputs,) = _kept(path, layer.out_channels, 1, cut.outputs)
        _select(layer, outputs)
        layer.in_channels = layer.out_channels = layer.groups = len(outputs)
        return
    made = _kept(path, layer.out_channels, layer.groups, cut.outputs)
    read = _kept(path, layer.in_channels, layer.groups, cut.inputs)
    size = layer.out_channels // layer.groups
    _select(layer, [group * size + index for group, kept in enumerate(made) for index in kept])
    parts = [part[:, kept] for part, kept in zip(layer.weight.chunk(layer.groups), read, strict=True)]
    layer.weight = _parameter(torch.cat(parts), layer.weight)
    layer.out_channels, layer.in_channels = sum(map(len, made)), sum(map(len, read))


def _select(layer: nn.Module, outputs: list[int]) -> None:
    """Keep these output channels of all that a layer holds one of for each."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, _parameter(parameter[outputs], parameter))
    for name, buffer in list(layer.named_buffers(recurse=False)):
        if buffer.ndim:  # the count of batches is for all channels
            setattr(layer, name, buffer[outputs].clone())


def _parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=like.requires_grad)
