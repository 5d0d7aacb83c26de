"""Groups of channels that can only be pruned together."""

from __future__ import annotations

import warnings

import torch
from torch import fx, nn

from optpipe.graph.trace import module_of, node_macs
from optpipe.types import ChannelGroup


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
    paths = {id(module): path for path, module in layers.items()}
    order = {path: index for index, path in enumerate(layers)}
    problem = "torch-pruning does not see it"
    found: list[tuple[tuple[str, ...], str]] = []
    try:
        for group in _pruning_groups(traced, input_shape):
            members = {paths[id(layer)] for layer in group if id(layer) in paths}
            found.append((tuple(sorted(members, key=order.__getitem__)), _mismatch(layers, members)))
    except Exception as error:  # torch-pruning fails in many ways, and one of its groups is no reason to stop
        problem = f"torch-pruning cannot follow it: {type(error).__name__}: {error}".splitlines()[0]
    seen = {path for members, _ in found for path in members}
    found += [((path,), problem) for path in layers if path not in seen]
    return sorted(((members, why) for members, why in found if members), key=lambda pair: order[pair[0][0]])


def _mismatch(layers: dict[str, nn.Conv2d | nn.Linear], members: set[str]) -> str:
    widths = sorted({layers[path].weight.shape[0] for path in members})
    if len(widths) == 1:
        return ""
    return f"it ties layers of {' and '.join(map(str, widths))} channels, as a shortcut that pads them does"


def _pruning_groups(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> list[list[nn.Module]]:
    """For each of torch-pruning's groups the modules whose outputs are pruned together."""
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
            return [
                [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
                for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear])
            ]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
