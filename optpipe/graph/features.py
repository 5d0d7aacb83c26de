"""Where a network's features end and its classifier begins."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe.errors import UsageError
from optpipe.graph.flow import dominators, is_feature_map
from optpipe.graph.trace import is_computed, module_of, shape

_POOLING_MODULES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)
_POOLING_FUNCTIONS = frozenset(
    {F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d, torch.mean, torch.amax}
)


def feature_node(traced: fx.GraphModule) -> fx.Node:
    """The node whose (N, C, H, W) tensor enters the last global pooling before the classifier.

    A network without one (VGG) gives the last feature map before the flattening.
    Raises UsageError where no single feature map lies between the images and the logits.
    """
    immediate = dominators(traced.graph)
    last_map: fx.Node | None = None
    node = immediate[next(n for n in traced.graph.nodes if n.op == "output")]
    while node is not None:
        source = immediate[node]
        if _pools_globally(traced, node, source) and source is not None:
            return source
        if last_map is None and is_feature_map(node) and (shape(node) or ())[2:] != (1, 1):
            last_map = node
        node = source
    if last_map is None or last_map.op == "placeholder":
        raise UsageError(
            f"{type(traced).__name__} has no feature map (N, C, H, W) before its classifier; "
            "features can be compared only in a convolutional network"
        )
    return last_map


def _pools_globally(traced: fx.GraphModule, node: fx.Node, source: fx.Node | None) -> bool:
    if source is None or not is_feature_map(source):
        return False
    pools = (
        isinstance(module_of(traced, node), _POOLING_MODULES)
        or (node.op == "call_function" and node.target in _POOLING_FUNCTIONS)
        or (node.op == "call_method" and node.target in {"mean", "amax"})
    )
    before, after = shape(source) or (), shape(node) or ()
    return pools and after[:2] == before[:2] and all(size == 1 for size in after[2:])


def split(model: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(backbone, head): images to features (N, C, H, W) before global pooling, and features to logits.

    Both share parameters and buffers with ``model``, which must come from :func:`trace`, so that training
    one trains the other.
    """
    features = feature_node(model)
    nodes = list(model.graph.nodes)
    cut = nodes.index(features) + 1
    backbone, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes[:cut]:
        copied[node] = backbone.node_copy(node, copied.__getitem__)
    backbone.output(copied[features])

    head = fx.Graph()
    entry = head.placeholder("features")
    entry.meta.update(features.meta)
    copied = {features: entry}

    def bring(node: fx.Node) -> fx.Node:
        if node not in copied:
            copied[node] = entry if is_computed(node) else head.node_copy(_portable(node), bring)
        return copied[node]

    needed = _needed(nodes[-1], features)
    for node in nodes[cut:]:
        if node in needed and node not in copied:
            copied[node] = head.node_copy(node, bring)
    name = type(model).__name__
    return fx.GraphModule(model, backbone, f"{name}Backbone"), fx.GraphModule(model, head, f"{name}Head")


def _needed(output: fx.Node, features: fx.Node) -> set[fx.Node]:
    """What the output is computed from, the features' own past left out."""
    needed: set[fx.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop()
        if node is not features and node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed


def _portable(node: fx.Node) -> fx.Node:
    """``node`` itself if it is the same when computed from the features: a parameter, the batch size."""
    asks_size = node.op == "call_method" and node.target == "size"
    batch_size = (asks_size and node.args[1:] == (0,)) or (
        node.op == "call_function" and node.target is operator.getitem and node.args[1:] == (0,)
    )
    whole_size = (asks_size and not node.args[1:]) or (node.target is getattr and node.args[1:] == ("shape",))
    only_first = whole_size and all(
        user.target is operator.getitem and user.args[1] == 0 for user in node.users
    )
    if node.op == "get_attr" or batch_size or only_first:
        return node
    raise UsageError(f"the classifier reads {node.name} from before the features; they cannot be split there")
