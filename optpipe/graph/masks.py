"""Which weights of a network the units of a mask switch: filters, single weights, or two of each four.

A mask is a factor for each unit, between 0 and 1. The masked network is the network with other weights, so
that it trains like any other; with a mask of zeros and ones filters can be cut out, and single weights are
zeros in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import fx, nn

from optpipe.errors import UsageError
from optpipe.graph.gates import input_gates, weighted
from optpipe.graph.scales import keep_largest
from optpipe.graph.trace import module_of
from optpipe.graph.width_map import WidthMap
from optpipe.types import Plan

Granularity = Literal["filter", "weight", "2:4"]


class Masks:
    """The units of a network at one granularity, in sets: groups of channels, or layers.

    "filter": a unit is a channel of a group of ``widths``, its weights those of the filters that make it; the
    mask acts where the channel is read, behind normalisation and activation, so that a channel of factor 0 is
    one that is not there. "weight": each weight of a convolution or a linear layer but the last, the
    classifier. "2:4": the same units where a layer's inputs come in fours; of each four along the input
    channels a mask leaves two. A network of the same structure may take its place in every call.
    ``blind`` says of each set whether batch-norm follows its filters, so that their length says nothing.
    Raises UsageError where the network has no such unit.
    """

    def __init__(self, network: fx.GraphModule, widths: WidthMap, granularity: Granularity) -> None:
        self.granularity: Granularity = granularity
        self.widths = widths
        if granularity == "filter":
            self._gates = input_gates(network, widths)
            self.names = tuple(group.name for group in widths.groups)
            self.shapes = tuple(torch.Size((group.channels,)) for group in widths.groups)
            self._made = [_makers(network, widths, index) for index in range(len(widths.groups))]
            self.blind = tuple(all(_normed(network, path) for path in paths) for paths in self._made)
        else:
            layers = _weighty(network, fours=granularity == "2:4")
            self.names = tuple(layers)
            self.shapes = tuple(layer.weight.shape for layer in layers.values())
            self.blind = (False,) * len(layers)
        if not self.names:
            raise UsageError(
                f'[method] granularity = "{granularity}": the network has no weights of that kind'
            )

    def weights(self, network: fx.GraphModule, masks: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights that differ in the masked network, by name, differentiable in weights and masks."""
        if self.granularity != "filter":
            return {
                f"{name}.weight": _weight(network, name) * mask.to(_weight(network, name).dtype)
                for name, mask in zip(self.names, masks, strict=True)
            }
        factors = torch.cat([*masks, torch.ones_like(masks[0][:1])])
        return {
            f"{path}.weight": weighted(network.get_submodule(path), factors[index.to(factors.device)])
            for path, index in self._gates.items()
        }

    def squares(self, network: fx.GraphModule) -> list[torch.Tensor]:
        """The sum of the squared weights of each unit, in each set's shape; differentiable in the weights."""
        if self.granularity != "filter":
            return [_weight(network, name).square() for name in self.names]
        return [
            torch.stack([_weight(network, path).flatten(1).square().sum(1) for path in paths]).sum(0)
            for paths in self._made
        ]

    def unit_weights(self, network: fx.GraphModule) -> list[torch.Tensor]:
        """The weights of each unit, detached: (units, weights of one), of single weights each set's shape."""
        if self.granularity != "filter":
            return [_weight(network, name).detach() for name in self.names]
        return [
            torch.cat([_weight(network, path).detach().flatten(1) for path in paths], dim=1)
            for paths in self._made
        ]

    def counts(self, network: fx.GraphModule) -> list[int]:
        """How many weights a unit of each set has."""
        if self.granularity != "filter":
            return [1] * len(self.names)
        return [sum(_weight(network, path)[0].numel() for path in paths) for paths in self._made]

    def magnitudes(self, network: fx.GraphModule) -> list[torch.Tensor]:
        """The mean absolute weight of each unit over the set's mean: what magnitude pruning goes by."""
        if self.granularity != "filter":
            found = [_weight(network, name).detach().abs() for name in self.names]
        else:
            found = [
                torch.stack(
                    [_weight(network, path).detach().abs().flatten(1).mean(1) for path in paths]
                ).mean(0)
                for paths in self._made
            ]
        return [values / values.mean().clamp(min=1e-12) for values in found]

    def plan(self, kept: Sequence[torch.Tensor]) -> Plan:
        """The plan that cuts every channel whose mask is false; filters only."""
        keep = [
            (name, tuple(mask.nonzero().flatten().tolist()))
            for name, mask in zip(self.names, kept, strict=True)
            if not bool(mask.all())
        ]
        return Plan(keep_channels=tuple(keep))

    def above(self, probabilities: Sequence[torch.Tensor], threshold: float) -> list[torch.Tensor]:
        """Which units stay: those above the threshold, but as many as each set needs to be a network.

        A group of channels keeps one at least, or as many of each of its runs. Of a layer's weights the
        largest stays.
        """
        return self.highest(probabilities, [int((values > threshold).sum()) for values in probabilities])

    def highest(self, probabilities: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
        """So many units of each set, those of the highest probability, rounded down to what runs share."""
        blocks = self.widths.blocks if self.granularity == "filter" else (1,) * len(self.names)
        kept = []
        for values, count, runs in zip(probabilities, counts, blocks, strict=True):
            wanted = max(runs, count - count % runs)
            if self.granularity == "filter":
                mask = torch.zeros(values.shape, dtype=torch.bool)
                mask[list(keep_largest(values.flatten().tolist(), wanted, runs))] = True
            else:
                ranks = values.flatten().cpu().argsort(descending=True, stable=True)[:wanted]
                mask = torch.zeros(values.numel(), dtype=torch.bool).index_fill_(0, ranks, True)
                mask = mask.view(values.shape)
            kept.append(mask)
        return kept


def fours(values: torch.Tensor) -> torch.Tensor:
    """Values of a layer's weights (outputs, inputs, ...) as (..., 4): each four along the input channels."""
    return values.movedim(1, -1).reshape(len(values), *values.shape[2:], -1, 4)


def from_fours(values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What :func:`fours` made of weights of this shape, back in their order."""
    return values.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def with_weights(network: fx.GraphModule, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole state of a network with some weights replaced, detached copies."""
    return {name: weights.get(name, value).detach().clone() for name, value in network.state_dict().items()}


def weight_count(network: nn.Module) -> int:
    """How many weights its convolutions and linear layers have, biases left out."""
    return sum(
        layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    )


def sparsity(network: nn.Module) -> float:
    """The share of these weights that are zero."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    return zeros / max(1, weight_count(network))


def _makers(network: fx.GraphModule, widths: WidthMap, group: int) -> list[str]:
    """The layers that make a group's channels, one filter for each."""
    found = []
    for part in widths.parts[group]:
        layer = network.get_submodule(part.layer)
        if part.outputs and part.layer in widths.groups[group].layers and _has_weights(layer):
            found.append(part.layer)
    return found


def _weighty(network: fx.GraphModule, *, fours: bool) -> dict[str, nn.Conv2d | nn.Linear]:
    """The layers whose single weights can go, by path in the order of execution; not the last linear one."""
    called = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
    layers = {path: network.get_submodule(path) for path in dict.fromkeys(called)}
    found = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Conv2d | nn.Linear)}
    last = next((path for path in reversed(found) if isinstance(found[path], nn.Linear)), None)
    return {
        path: layer
        for path, layer in found.items()
        if path != last and not (fours and layer.weight.shape[1] % 4)
    }


def _normed(network: fx.GraphModule, path: str) -> bool:
    """Whether batch-norms alone read what a layer makes."""
    calls = [node for node in network.graph.nodes if node.op == "call_module" and node.target == path]
    users = [module_of(network, user) for node in calls for user in node.users]
    return bool(users) and all(isinstance(user, nn.modules.batchnorm._BatchNorm) for user in users)


def _has_weights(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d | nn.Linear)


def _weight(network: fx.GraphModule, path: str) -> torch.Tensor:
    return cast("torch.Tensor", network.get_submodule(path).weight)
