"""The dense layers of a traced graph, found from its concatenations, and what reads their features.

A dense layer (Huang et al., "Densely Connected Convolutional Networks") computes new features from all those
before it and concatenates them with those.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe.graph.blocks import Unit, between, goes_on, holding_module, parameters_of
from optpipe.graph.flow import dominators, is_feature_map, past_nothing
from optpipe.graph.trace import is_computed, module_of, node_macs, shape, tensor_inputs
from optpipe.graph.widths import Removed, is_depthwise
from optpipe.types import Block

_CATS = frozenset({torch.cat, torch.concat, torch.concatenate})

_ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardtanh, nn.Tanh, nn.Softplus),
)
_ACTIVATION_FUNCTIONS = frozenset(
    {
        *(F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu),
        *(F.silu, F.mish, F.hardswish, F.hardtanh, F.softplus, F.tanh, torch.tanh),
    }
)
_ACTIVATION_METHODS = frozenset({"relu", "relu_", "tanh"})

# These, too, hand each channel on by itself.
_CHANNELWISE = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Upsample),
    *(nn.modules.dropout._DropoutNd, nn.Sigmoid, nn.Hardsigmoid),
)
_CHANNELWISE_FUNCTIONS = frozenset(
    {
        *(F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
        *(F.interpolate, torch.sigmoid, F.sigmoid, F.hardsigmoid),
    }
)
_CHANNELWISE_METHODS = frozenset({"sigmoid", "contiguous", "clone"})


def dense_units(traced: fx.GraphModule) -> list[Unit]:
    """Every dense layer in the order of the graph.

    A layer's features are one part of a concatenation along the channels; the other parts, in their order,
    are all that the layer reads, and one node that every path to the features passes carries them: the
    stream. It is droppable where nothing but concatenations reads the features, and each of their channels
    can be taken out of every layer that reads those.
    """
    immediate, parts = dominators(traced.graph), _parts(traced)
    found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in traced.graph.nodes:
        if concatenated(node) is None:
            continue
        for features in parts[node]:
            others = tuple(part for part in parts[node] if part is not features)
            stream = immediate[features]
            while stream is not None and parts[stream] != others:
                stream = immediate[stream]
            if stream is not None:
                found.setdefault(features, (stream, node))
    units = [_unit(traced, features, *ends) for features, ends in found.items()]
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    return sorted((unit for unit in units if unit.block.macs), key=lambda unit: order[unit.end])


def concatenated(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The feature maps that a node joins along the channels, in order; None if it does no such thing."""
    if node.op != "call_function" or node.target not in _CATS or not is_feature_map(node):
        return None
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    named = node.kwargs.get("dim", node.kwargs.get("axis", 0))
    along = node.args[1] if len(node.args) > 1 else named
    if along not in {1, -3} or not isinstance(tensors, tuple | list):
        return None
    maps = tuple(tensor for tensor in tensors if isinstance(tensor, fx.Node) and is_feature_map(tensor))
    return maps if maps and len(maps) == len(tensors) else None


def _parts(traced: fx.GraphModule) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For each node the nodes, none a concatenation itself, whose channels its own are, in order."""
    parts: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in traced.graph.nodes:
        joined = concatenated(node)
        if joined is not None:
            parts[node] = tuple(part for source in joined for part in parts[source])
        else:
            source = past_nothing(traced, node)
            parts[node] = (node,) if source is node else parts[source]
    return parts


def _unit(traced: fx.GraphModule, features: fx.Node, stream: fx.Node, end: fx.Node) -> Unit:
    region = between(stream, features) | {features}
    why_not = _obstacle(traced, features, region)
    block = Block(
        name=holding_module(traced, region) or features.name,
        input_shape=(shape(stream) or ())[1:],
        output_shape=(shape(end) or ())[1:],
        parameters=parameters_of(traced, region),
        macs=sum(node_macs(traced, node) for node in region),
        droppable=not why_not,
        why_not=why_not,
        kind="dense",
    )
    return Unit(block, stream, end, region, features)


def _obstacle(traced: fx.GraphModule, features: fx.Node, region: frozenset[fx.Node]) -> str:
    handed_on = carriers(traced, features)
    inside = region - {features}
    if any(goes_on(user) for node in inside for user in node.users if user not in region):
        return "a part of it is used elsewhere too"
    for reader in (user for node in handed_on for user in node.users if user not in handed_on):
        if not goes_on(reader):
            continue
        joined = concatenated(reader)
        if joined is None:
            return f"its features are read by {_called(reader)} too"
        if set(joined) <= handed_on:
            return f"{_called(reader)} would join nothing"
    lost = readers(traced, {features})
    return lost if isinstance(lost, str) else ""


def carriers(traced: fx.GraphModule, features: fx.Node) -> set[fx.Node]:
    """The node and those that hand its tensor on as it is (identity, dropout)."""
    return {node for node in traced.graph.nodes if past_nothing(traced, node) is features}


def _called(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def readers(traced: fx.GraphModule, features: Collection[fx.Node]) -> dict[str, Removed] | str:
    """What each layer loses, by its path, where all channels of these nodes go; the reason if they cannot.

    The network without them is the original with zero weights wherever a convolution or a linear layer
    reads those channels.
    """
    gone: dict[fx.Node, list[int]] = {}
    removed: dict[str, Removed] = {}
    for node in traced.graph.nodes:
        if node in features:
            gone[node] = list(range((shape(node) or ())[1]))
        elif is_computed(node) and any(source in gone for source in node.all_input_nodes):
            left = _through(traced, node, gone, removed)
            if isinstance(left, str):
                return left
            if left:
                gone[node] = left
    return removed


def _through(
    traced: fx.GraphModule, node: fx.Node, gone: dict[fx.Node, list[int]], removed: dict[str, Removed]
) -> list[int] | str:
    """Which channels of a node go because some of its inputs' do; why they cannot, where they cannot."""
    joined = concatenated(node)
    if joined is not None:
        found, first = list[int](), 0
        for source in joined:
            found += [first + channel for channel in gone.get(source, ())]
            first += (shape(source) or ())[1]
        return found
    if node.op == "output" or len(tensor_inputs(node)) != 1:
        return f"its features meet others in {_called(node)}"
    source = tensor_inputs(node)[0]
    channels, module, path = gone[source], module_of(traced, node), str(node.target)
    mixes = isinstance(module, nn.Conv2d) and not is_depthwise(module) and module.groups == 1
    if mixes or (isinstance(module, nn.Linear) and len(shape(source) or ()) == 2):
        removed.setdefault(path, Removed()).inputs.update(channels)
        return []
    each = _has_one_for_each(module)
    if each:
        removed.setdefault(path, Removed()).outputs.update(channels)
    if each or is_activation(traced, node) or _is_channelwise(module, node):
        return channels
    return _flattened(traced, node, source, channels)


def _has_one_for_each(module: nn.Module | None) -> bool:
    """Whether a layer handles channels one by one and holds something for each."""
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        or (isinstance(module, nn.PReLU) and module.num_parameters > 1)
        or (isinstance(module, nn.Conv2d) and is_depthwise(module))
    )


def is_activation(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node applies a non-linearity to each value; a sigmoid makes gates, and is none here."""
    return (
        isinstance(module_of(traced, node), _ACTIVATIONS)
        or (node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS)
        or (node.op == "call_method" and node.target in _ACTIVATION_METHODS)
    )


def _is_channelwise(module: nn.Module | None, node: fx.Node) -> bool:
    means = (node.op == "call_method" and node.target == "mean") or node.target is torch.mean
    if means:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dims, tuple | list) and {d % 4 if isinstance(d, int) else d for d in dims} == {2, 3}
    return (
        isinstance(module, _CHANNELWISE)
        or (node.op == "call_function" and node.target in _CHANNELWISE_FUNCTIONS)
        or (node.op == "call_method" and node.target in _CHANNELWISE_METHODS)
    )


def _flattened(
    traced: fx.GraphModule, node: fx.Node, source: fx.Node, channels: list[int]
) -> list[int] | str:
    """The positions of these channels behind a flattening, where the node is one."""
    flattens = isinstance(module_of(traced, node), nn.Flatten) or (
        node.target in {torch.flatten, torch.reshape}
        if node.op == "call_function"
        else node.op == "call_method" and node.target in {"flatten", "view", "reshape"}
    )
    before, after = shape(source) or (), shape(node) or ()
    if not flattens or len(before) != 4 or after != (before[0], torch.Size(before[1:]).numel()):
        return f"its features pass through {_called(node)}, where single channels are not followed"
    pixels = before[2] * before[3]
    return [channel * pixels + pixel for channel in channels for pixel in range(pixels)]
