"""Groups of channels that can only be pruned together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from optpipe.graph.trace import module_of, node_macs
from optpipe.types import ChannelGroup

# Following every channel is slow where there are many layers; these few, spread evenly, show the same ties.
_PROBES = 9

# What can lose single channels without any other channel noticing.
_NARROWABLE = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.PReLU)


@dataclass(frozen=True, slots=True)
class Touched:
    """Channels of one part of a network that go when others go: outputs of it, or inputs only.

    ``origins`` holds, for each of them once, (the part's own channel, the followed channel it goes with).
    """

    part: nn.Module | nn.Parameter
    outputs: bool
    origins: tuple[tuple[int, int], ...]

    @property
    def channels(self) -> frozenset[int]:
        """The part's own channels."""
        return frozenset(channel for channel, _ in self.origins)


# From a layer and some of its output channels to all that goes with them.
Follow = Callable[[nn.Module, Sequence[int]], list[Touched]]


def channel_groups(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> tuple[ChannelGroup, ...]:
    """Every group of layers whose output channels are tied, in execution order.

    The ties are those of torch-pruning's dependency graph. A group that it cannot follow is not prunable
    and says why; so is the one that makes the logits.
    """
    return groups_of(traced, dependencies(traced, input_shape))


def groups_of(traced: fx.GraphModule, follow: Follow | str) -> tuple[ChannelGroup, ...]:
    """The groups by these dependencies; by why there are none, each layer on its own and not prunable."""
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    macs: dict[str, int] = {}
    for node in traced.graph.nodes:
        module, path = module_of(traced, node), str(node.target)
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers[path] = module
            macs[path] = macs.get(path, 0) + node_macs(traced, node)
    last = next(reversed(layers), None)
    groups = []
    for members, problem in _tied(traced, layers, follow):
        first = layers[members[0]]
        why_not = "its channels are the classes" if last in members else problem
        groups.append(
            ChannelGroup(
                name=members[0],
                layers=members,
                shape=tuple(first.weight.shape),
                channels=first.weight.shape[0],
                parameters=sum(p.numel() for path in members for p in layers[path].parameters()),
                macs=sum(macs[path] for path in members),
                prunable=not why_not,
                why_not=why_not,
            )
        )
    return tuple(groups)


def _tied(
    traced: fx.GraphModule, layers: dict[str, nn.Conv2d | nn.Linear], follow: Follow | str
) -> list[tuple[tuple[str, ...], str]]:
    """(layers whose outputs are tied, why they cannot be pruned or ""), in execution order of the first."""
    if isinstance(follow, str):
        return [((path,), follow) for path in layers]
    order = {path: index for index, path in enumerate(layers)}
    paths = {id(module): path for path, module in layers.items()}
    seen: set[str] = set()
    found: list[tuple[tuple[str, ...], str]] = []
    for path, layer in layers.items():
        if path in seen:
            continue
        try:
            touched = follow(layer, _probes(layer.weight.shape[0]))
            members = {path} | {paths[id(t.part)] for t in touched if t.outputs and id(t.part) in paths}
            problem = _mismatch(layers, members) or _obstacle(traced, touched)
        except Exception as error:  # one layer that it cannot follow is no reason to lose the others
            members, problem = {path}, failure(error)
        seen |= members
        found.append((tuple(sorted(members, key=order.__getitem__)), problem))
    return found


def _probes(width: int) -> list[int]:
    return sorted({index * (width - 1) // (_PROBES - 1) for index in range(_PROBES)})


def failure(error: Exception) -> str:
    """Why a network or a layer of it has no dependencies, in one line."""
    return f"torch-pruning cannot follow it: {type(error).__name__}: {error}".splitlines()[0]


def _mismatch(layers: dict[str, nn.Conv2d | nn.Linear], members: set[str]) -> str:
    widths = sorted({layers[path].weight.shape[0] for path in members})
    if len(widths) == 1:
        return ""
    return (
        f"torch-pruning ties layers of {' and '.join(map(str, widths))} channels, which cannot lose the same "
        "ones (a shortcut pads them, or they are split or joined)"
    )


def _obstacle(traced: fx.GraphModule, touched: list[Touched]) -> str:
    """Why channels that reach these parts cannot go without a change to those that stay; "" if they can."""
    paths = {id(module): path for path, module in traced.named_modules()}
    for part in (t.part for t in touched):
        if isinstance(part, nn.Parameter):
            return f"its channels meet a parameter of shape {tuple(part.shape)} that belongs to no layer"
        path = paths.get(id(part))
        if path is None:  # torch-pruning's stand-in for a function
            continue
        if not isinstance(part, _NARROWABLE):
            return f"its channels pass through {path}, and no {type(part).__name__} is narrowed"
        if isinstance(part, nn.Conv2d) and 1 < part.groups == part.out_channels != part.in_channels:
            return f"its channels pass through {path}, which joins several of them to one, group by group"
    return ""


def dependencies(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> Follow | str:
    """A function from output channels of a layer to all that goes with them, the layer's own included.

    Where torch-pruning cannot follow the network: why, in one line.
    """
    try:
        return _dependencies(traced, input_shape)
    except Exception as error:  # it runs the network and walks its gradient: anything can go wrong there
        return failure(error)


def _dependencies(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> Follow:
    import torch_pruning

    like = next(traced.parameters())
    image = torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
    frozen = [parameter for parameter in traced.parameters() if not parameter.requires_grad]
    for parameter in frozen:  # the dependency graph is read off the gradient's
        parameter.requires_grad_(True)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(traced, example_inputs=(image,))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)

    def follow(layer: nn.Module, channels: Sequence[int]) -> list[Touched]:
        pruner = graph.get_pruner_of_module(layer)
        group = graph.get_pruning_group(layer, pruner.prune_out_channels, list(channels))
        return [
            Touched(
                item.dep.target.module,
                graph.is_out_channel_pruning_fn(item.dep.handler),
                tuple(zip(item.idxs, item.root_idxs, strict=True)),
            )
            for item in group
        ]

    return follow
