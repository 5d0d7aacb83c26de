"""Groups of channels that can only be pruned together."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import fx, nn

from optpipe.graph.trace import module_of, node_macs
from optpipe.types import ChannelGroup

# Following every channel is slow where there are many layers; these few, spread evenly, show the same ties.
_PROBES = 9


def channel_groups(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> tuple[ChannelGroup, ...]:
    """Every group of layers whose output channels are tied, in execution order.

    The ties are those of torch-pruning's dependency graph. A group that it cannot follow is not prunable
    and says why; so is the one that makes the logits.
    """
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    macs: dict[str, int] = {}
    for node in traced.graph.nodes:
        module, path = module_of(traced, node), str(node.target)
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers[path] = module
            macs[path] = macs.get(path, 0) + node_macs(traced, node)
    last = next(reversed(layers), None)
    groups = []
    for members, problem in _tied(traced, layers, input_shape):
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
    traced: fx.GraphModule, layers: dict[str, nn.Conv2d | nn.Linear], input_shape: tuple[int, int, int]
) -> list[tuple[tuple[str, ...], str]]:
    """(layers whose outputs are tied, why they cannot be pruned or ""), in execution order of the first."""
    order = {path: index for index, path in enumerate(layers)}
    paths = {id(module): path for path, module in layers.items()}
    try:
        partners = _partners(traced, input_shape)
    except Exception as error:  # it runs the network and walks its gradient: anything can go wrong there
        return [((path,), _failure(error)) for path in layers]
    seen: set[str] = set()
    found: list[tuple[tuple[str, ...], str]] = []
    for path, layer in layers.items():
        if path in seen:
            continue
        try:
            members = {path} | {paths[id(m)] for m in partners(layer) if id(m) in paths}
            problem = _mismatch(layers, members)
        except Exception as error:  # one layer that it cannot follow is no reason to lose the others
            members, problem = {path}, _failure(error)
        seen |= members
        found.append((tuple(sorted(members, key=order.__getitem__)), problem))
    return found


def _failure(error: Exception) -> str:
    return f"torch-pruning cannot follow it: {type(error).__name__}: {error}".splitlines()[0]


def _mismatch(layers: dict[str, nn.Conv2d | nn.Linear], members: set[str]) -> str:
    widths = sorted({layers[path].weight.shape[0] for path in members})
    if len(widths) == 1:
        return ""
    return (
        f"torch-pruning ties layers of {' and '.join(map(str, widths))} channels, which cannot lose the same "
        "ones (a shortcut pads them, or they are split or joined)"
    )


def _partners(
    traced: fx.GraphModule, input_shape: tuple[int, int, int]
) -> Callable[[nn.Module], list[nn.Module]]:
    """A function from a layer to the modules whose outputs are pruned together with its own."""
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

    def partners(layer: nn.Module) -> list[nn.Module]:
        pruner = graph.get_pruner_of_module(layer)
        width = pruner.get_out_channels(layer)
        probes = sorted({index * (width - 1) // (_PROBES - 1) for index in range(_PROBES)})
        group = graph.get_pruning_group(layer, pruner.prune_out_channels, probes)
        return [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]

    return partners
