"""How tensors flow through a traced graph: adds, dominators, and nodes that keep the channels as they are."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe.graph.trace import is_computed, module_of, shape, tensor_inputs

_ADDS = frozenset({operator.add, operator.iadd, torch.add})
_ADD_METHODS = frozenset({"add", "add_"})
_MULS = frozenset({operator.mul, operator.imul, torch.mul})
_MUL_METHODS = frozenset({"mul", "mul_"})

_KEEPING_MODULES = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
)
_KEEPING_FUNCTIONS = frozenset(
    {
        *(F.relu, F.relu6, F.relu_, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.mish),
        *(F.leaky_relu, F.elu, F.hardtanh, F.softplus, torch.relu, torch.relu_, torch.sigmoid, torch.tanh),
        *(
            F.max_pool2d,
            torch.max_pool2d,
            F.avg_pool2d,
            F.batch_norm,
            F.layer_norm,
            F.group_norm,
            torch.permute,
        ),
    }
)
_KEEPING_METHODS = frozenset({"relu", "relu_", "sigmoid", "tanh", "permute", "contiguous", "clone"})


def is_feature_map(node: fx.Node) -> bool:
    """Whether a node yields a tensor of four dimensions."""
    return len(shape(node) or ()) == 4


def _two_operands(
    node: fx.Node, functions: frozenset[object], methods: frozenset[str]
) -> tuple[fx.Node, fx.Node] | None:
    if node.target not in (functions if node.op == "call_function" else methods):
        return None
    first, second = (*node.args, node.kwargs.get("other"), None)[:2]
    if isinstance(first, fx.Node) and isinstance(second, fx.Node):
        return first, second
    return None


def add_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two computed feature maps, equal in shape, that a node adds; None if it is no such add."""
    pair = _two_operands(node, _ADDS, _ADD_METHODS)
    if pair is None or pair[0] is pair[1] or not is_feature_map(node):
        return None
    if any(not is_computed(operand) or shape(operand) != shape(node) for operand in pair):
        return None
    return pair


def dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node | None]:
    """The immediate dominator of each node: the nearest one that every path from the image to it passes.

    Parameters and plain numbers count for nothing. None for the image, and for what reads no image.
    """
    immediate: dict[fx.Node, fx.Node | None] = {}
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        common: fx.Node | None = None
        for index, source in enumerate(s for s in tensor_inputs(node) if s in depth):
            other: fx.Node | None = source
            while index and common is not other:
                if common is None or other is None:
                    common = other = None
                elif depth[common] >= depth[other]:
                    common = immediate[common]
                else:
                    other = immediate[other]
            common = other
        immediate[node] = common
        if common is not None or node.op == "placeholder":
            depth[node] = depth[common] + 1 if common is not None else 0
    return immediate


def past_nothing(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node whose tensor ``node`` hands on: back through Identity and Dropout modules."""
    while isinstance(module_of(traced, node), nn.Identity | nn.modules.dropout._DropoutNd):
        node = node.all_input_nodes[0]
    return node


def relu_ceiling(traced: fx.GraphModule, node: fx.Node) -> float | None:
    """What a ReLU node caps its output at: infinity for ReLU, 6 for ReLU6; None for any other node."""
    module = module_of(traced, node)
    if isinstance(module, nn.ReLU6) or (node.op == "call_function" and node.target is F.relu6):
        return 6.0
    if isinstance(module, nn.ReLU):
        return float("inf")
    functions = {F.relu, F.relu_, torch.relu, torch.relu_}
    if (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in {"relu", "relu_"}
    ):
        return float("inf")
    return None


def _kept_from(
    traced: fx.GraphModule, node: fx.Node, immediate: dict[fx.Node, fx.Node | None]
) -> tuple[fx.Node, ...]:
    """The nodes whose channels, in number and meaning, are those of ``node``."""
    sources = tensor_inputs(node)
    if not sources or not is_feature_map(node):
        return ()
    added = add_operands(node)
    if added is not None:
        return added
    if _two_operands(node, _MULS, _MUL_METHODS) is not None:
        # x * gate(x): the channels are those of x, though a map of 1x1 gives the gate the same shape.
        common = immediate[node]
        return (common,) if common in sources else tuple(s for s in sources if shape(s) == shape(node))
    module = module_of(traced, node)
    keeps = (
        isinstance(module, _KEEPING_MODULES)
        or (type(module).__module__ == "torch.nn.modules.activation" and len(sources) == 1)
        or (node.op == "call_function" and node.target in _KEEPING_FUNCTIONS)
        or (node.op == "call_method" and node.target in _KEEPING_METHODS)
    )
    averages = isinstance(module, nn.AvgPool2d) or node.target is F.avg_pool2d
    if averages and (shape(node) or ())[2:] == (1, 1):  # global pooling: the stream ends
        return ()
    return (sources[0],) if keeps else ()


def channel_spaces(traced: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """For each node one representative, shared by all nodes that carry the same channels.

    Adds tie their operands; activations, normalisation, max-pooling, dropout and permutation tie their
    input; convolutions, padding of channels, concatenation and flattening start a new space.
    """
    immediate = dominators(traced.graph)
    parent: dict[fx.Node, fx.Node] = {node: node for node in traced.graph.nodes}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in traced.graph.nodes:
        for source in _kept_from(traced, node, immediate):
            parent[find(source)] = find(node)
    return {node: find(node) for node in parent}
