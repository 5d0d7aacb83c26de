"""The units of depth of a traced graph: residual blocks, dense layers, and plain units."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import fx, nn

from optpipe.graph.blocks import Unit, parameters_of, residuals
from optpipe.graph.dense import concatenated, dense_units, is_activation
from optpipe.graph.flow import channel_spaces, is_feature_map
from optpipe.graph.trace import module_of, node_macs, shape, tensor_inputs
from optpipe.types import Block

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def depth_units(traced: fx.GraphModule) -> list[Unit]:
    """Every unit of depth, of all kinds, in execution order; no two have the same name.

    Residual blocks and dense layers are listed whether they can be dropped or not. Plain units are those
    outside of both, and are listed only where they can be dropped: most convolutions of a network are no
    units of depth, and a reason for each would say little.
    """
    found = [Unit(block.block, block.stream, block.add, block.region) for block in residuals(traced)]
    found += dense_units(traced)
    inside = frozenset[fx.Node]().union(*(unit.region for unit in found))
    found += _plain_units(traced, inside)
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    return sorted(_named_apart(found), key=lambda unit: order[unit.end])


def _named_apart(units: list[Unit]) -> list[Unit]:
    """The units; those whose name another has too, or one before them, are called by a node of theirs."""
    often = Counter(unit.block.name for unit in units)
    taken = {unit.block.name for unit in units if unit.block.kind == "residual"}
    apart = []
    for unit in units:
        name = unit.block.name
        if unit.block.kind != "residual" and (often[name] > 1 or name in taken):
            name = (unit.features or unit.end).name
        apart.append(replace(unit, block=replace(unit.block, name=name)))
    return apart


def _plain_units(traced: fx.GraphModule, inside: frozenset[fx.Node]) -> list[Unit]:
    """The units of a convolution, perhaps a normalisation, and an activation that keep the shape.

    The convolution has one group and sees more than one pixel: depthwise and pointwise ones are the halves
    of separable convolutions, and neither does without the other. No channel of the unit's output meets
    those of another node in a sum or a product, which would tie the unit's channels to theirs. The first
    layer, which reads the image, and the last, whose channels are the classes, are none.
    """
    spaces = channel_spaces(traced)
    tied = {
        spaces[source]
        for node in traced.graph.nodes
        if len(tensor_inputs(node)) > 1 and concatenated(node) is None
        for source in tensor_inputs(node)
    }
    calls = Counter(id(module_of(traced, node)) for node in traced.graph.nodes)
    layers = [n for n in traced.graph.nodes if isinstance(module_of(traced, n), nn.Conv2d | nn.Linear)]
    units = []
    for node in layers[:-1]:
        chain = _chain(traced, node)
        if not chain or inside.intersection(chain) or spaces[chain[-1]] in tied:
            continue
        if any(calls[id(module_of(traced, part))] > 1 for part in chain if part is not chain[-1]):
            continue
        units.append(_plain(traced, chain))
    return units


def _chain(traced: fx.GraphModule, conv: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes of a plain unit from its convolution to its activation; none if this begins no such unit."""
    layer = module_of(traced, conv)
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.kernel_size == (1, 1):
        return ()
    stream, chain = tensor_inputs(conv)[0], [conv]
    after = _only_reader(conv)
    if after is not None and isinstance(module_of(traced, after), _NORMS):
        chain.append(after)
        after = _only_reader(after)
    if after is None or not is_activation(traced, after) or stream.op == "placeholder":
        return ()
    kept = is_feature_map(stream) and shape(stream) == shape(after)
    return (*chain, after) if kept else ()


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _plain(traced: fx.GraphModule, chain: tuple[fx.Node, ...]) -> Unit:
    first, region = chain[0], frozenset(chain)
    stream = tensor_inputs(first)[0]
    block = Block(
        name=str(first.target),
        input_shape=(shape(stream) or ())[1:],
        output_shape=(shape(chain[-1]) or ())[1:],
        parameters=parameters_of(traced, region),
        macs=sum(node_macs(traced, node) for node in region),
        droppable=True,
        kind="plain",
    )
    return Unit(block, stream, chain[-1], region)
