"""Which layers write into a residual stream: their channels are tied by the sums along it."""

from __future__ import annotations

from torch import nn

from optpipe.graph.flow import add_operands, channel_spaces
from optpipe.graph.trace import module_of, trace


def stream_layers(model: nn.Module, input_shape: tuple[int, int, int]) -> frozenset[str]:
    """The convolutions and linear layers, by path, whose outputs enter a sum of two feature maps.

    Padding between a layer and the sum hides it: such channels cannot be narrowed anyway.
    Raises UsageError for a model that cannot be traced; images are (C, H, W).
    """
    traced = trace(model, input_shape)
    spaces = channel_spaces(traced)
    streams = {spaces[node] for node in traced.graph.nodes if add_operands(node) is not None}
    return frozenset(
        str(node.target)
        for node in traced.graph.nodes
        if spaces[node] in streams and isinstance(module_of(traced, node), nn.Conv2d | nn.Linear)
    )
