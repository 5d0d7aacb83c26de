"""Adaptors: 1x1 layers around dropped blocks that can be trained alone and then fold away.

PRACTISE (Wang and Wu) puts one after every convolution that writes into the dropped block's stream before
it, and one before every convolution that reads the stream after it.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from optpipe.graph.blocks import Residual, residuals
from optpipe.graph.flow import channel_spaces
from optpipe.graph.surgery import chosen, discard_unused, drop
from optpipe.graph.trace import module_of, propagate, shape, tensor_inputs, trace
from optpipe.types import Plan

_HOME = "optpipe_adaptors"


@dataclass(frozen=True, slots=True)
class _Site:
    """A layer whose output ("after") or input ("before") an adaptor mixes."""

    side: Literal["after", "before"]
    node: fx.Node


def with_adaptors(model: nn.Module, plan: Plan, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The candidate of ``plan`` with bias-free identity adaptors at every site around the dropped blocks.

    Raises UsageError as :func:`apply` does. A candidate without any site has no adaptor.
    """
    traced = trace(model, input_shape)
    dropped = chosen(residuals(traced), plan)
    sites = _sites(traced, dropped)
    drop(traced, dropped)
    for site in sites:
        _insert(traced, site)
    traced.graph.lint()
    traced.recompile()
    propagate(traced, input_shape)
    return traced


def adaptors(module: fx.GraphModule) -> dict[str, nn.Module]:
    """The adaptors of a candidate in execution order, by path (``after.<layer>``, ``before.<layer>``)."""
    return {str(node.target): module.get_submodule(str(node.target)) for node in _adaptor_nodes(module)}


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a candidate with its adaptors multiplied into their layers, in double precision.

    After a layer, A(Wx + b) = (AW)x + Ab; before it, W(Ax) + b = (WA)x + b, zero padding included, since
    an adaptor without bias keeps zeros.
    """
    folded = copy.deepcopy(module)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for node in _adaptor_nodes(folded):
        _, side, path = str(node.target).split(".", 2)
        adaptor = folded.get_submodule(str(node.target))
        layers.setdefault(path, {})[side] = _weight(adaptor).detach().double().flatten(1)
        node.replace_all_uses_with(node.all_input_nodes[0])
        folded.graph.erase_node(node)
    with torch.no_grad():
        for path, sides in layers.items():
            _multiply(folded.get_submodule(path), sides.get("after"), sides.get("before"))
    discard_unused(folded)
    return folded


def _adaptor_nodes(module: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in module.graph.nodes
        if node.op == "call_module" and str(node.target).startswith(f"{_HOME}.")
    ]


def _sites(traced: fx.GraphModule, dropped: list[Residual]) -> list[_Site]:
    """All sites of all dropped blocks, each once, in execution order."""
    spaces = channel_spaces(traced)
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    gone = frozenset[fx.Node]().union(*(residual.region for residual in dropped))
    sites: list[_Site] = []
    for node in _foldable(traced):
        if node in gone:
            continue
        read = tensor_inputs(node)[0]
        if any(spaces[read] is spaces[r.stream] and order[node] > order[r.add] for r in dropped):
            sites.append(_Site("before", node))
        if any(spaces[node] is spaces[r.stream] and order[node] <= order[r.stream] for r in dropped):
            sites.append(_Site("after", node))
    return sites


def _foldable(traced: fx.GraphModule) -> list[fx.Node]:
    """Nodes that call a dense layer of their own; a subclass may do more than multiply by its weight."""
    calls = [
        (node, module)
        for node in traced.graph.nodes
        if type(module := module_of(traced, node)) in {nn.Conv2d, nn.Linear}
    ]
    often = Counter(id(_weight(module)) for _, module in calls if module is not None)
    return [
        node
        for node, module in calls
        if module is not None and often[id(_weight(module))] == 1 and getattr(module, "groups", 1) == 1
    ]


def _insert(traced: fx.GraphModule, site: _Site) -> None:
    layer = module_of(traced, site.node)
    if layer is None:
        raise TypeError(f"{site.node.name} calls no module")
    source = site.node if site.side == "after" else tensor_inputs(site.node)[0]
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    channels = (shape(source) or ())[axis]
    path = f"{_HOME}.{site.side}.{site.node.target}"
    traced.add_submodule(path, _identity(layer, channels))
    readers = list(site.node.users) if site.side == "after" else [site.node]
    with traced.graph.inserting_after(source):
        adaptor = traced.graph.call_module(path, (source,))
    adaptor.meta.update(shape=shape(source), computed=True)
    for reader in readers:
        reader.replace_input_with(source, adaptor)


def _identity(layer: nn.Module, channels: int) -> nn.Module:
    """A layer of the same kind that maps ``channels`` onto themselves."""
    weight = _weight(layer)
    eye = torch.eye(channels, device=weight.device, dtype=weight.dtype)
    # On meta, where initialising draws nothing: the caller's random state stays where it is.
    if isinstance(layer, nn.Linear):
        made: nn.Module = nn.Linear(channels, channels, bias=False, device="meta")
    else:
        made = nn.Conv2d(channels, channels, 1, bias=False, device="meta")
        eye = eye[:, :, None, None]
    made.weight = nn.Parameter(eye)
    return made.eval()


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight")
    return weight


def _multiply(layer: nn.Module, after: torch.Tensor | None, before: torch.Tensor | None) -> None:
    weight = _weight(layer)
    product = weight.double()
    if before is not None:
        product = torch.einsum("oj...,ji->oi...", product, before)
    if after is not None:
        product = torch.einsum("po,oi...->pi...", after, product)
        if isinstance(layer.bias, torch.Tensor):
            layer.bias.copy_(after @ layer.bias.double())
    weight.copy_(product)
