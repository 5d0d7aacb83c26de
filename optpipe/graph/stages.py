"""The outputs of a network's stages, where a candidate can be compared with its original on the way."""

from __future__ import annotations

from torch import fx

from optpipe.graph.blocks import residuals
from optpipe.graph.features import feature_node
from optpipe.graph.flow import channel_spaces
from optpipe.graph.surgery import discard_unused
from optpipe.graph.trace import module_of, tensor_inputs


def stage_readers(original: fx.GraphModule) -> tuple[str, ...]:
    """The first layer after each residual stream: its input is the stage's output.

    Such a layer lies in no droppable block, so every candidate has it, whichever blocks are gone.
    """
    spaces = channel_spaces(original)
    droppable = [residual for residual in residuals(original) if residual.block.droppable]
    streams = {spaces[residual.add] for residual in droppable}
    inside = frozenset[fx.Node]().union(*(residual.region for residual in droppable))
    readers: dict[fx.Node, str] = {}
    for node in original.graph.nodes:
        if node in inside or not hasattr(module_of(original, node), "weight"):
            continue
        stream = spaces[tensor_inputs(node)[0]]
        if stream in streams and spaces[node] is not stream:
            readers.setdefault(stream, str(node.target))
    return tuple(readers.values())


def observe(module: fx.GraphModule, readers: tuple[str, ...] = ()) -> fx.GraphModule:
    """A network of images that returns (features, what each reader reads ...).

    Features are (N, C, H, W) before global pooling. Parameters are shared with ``module``.
    """
    calls = {str(node.target): node for node in module.graph.nodes if node.op == "call_module"}
    wanted = (feature_node(module), *(tensor_inputs(calls[reader])[0] for reader in readers))
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copied)
    graph.output(tuple(copied[node] for node in wanted))
    observed = fx.GraphModule(module, graph)
    for node in reversed(list(observed.graph.nodes)):
        if not node.users and node.op not in {"placeholder", "output"}:
            observed.graph.erase_node(node)
    discard_unused(observed)
    return observed
