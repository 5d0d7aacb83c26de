"""What a network costs where its groups keep so many channels each, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import fx, nn

from optpipe.graph.trace import module_of, node_macs, total, trace
from optpipe.graph.width_map import WidthMap, width_map_of
from optpipe.graph.widths import is_depthwise


class Costs:
    """Parameters and MACs of a network whose prunable groups keep any number of channels.

    Each layer costs so much for each pair of an output and an input and so much for each output, and both
    widths are linear in the numbers of channels kept. The groups are those of ``widths``, in its order; it
    is found where it is not given, and holds for all networks of one structure.
    Raises UsageError for a model that cannot be traced.
    """

    def __init__(
        self, model: nn.Module, input_shape: tuple[int, int, int], widths: WidthMap | None = None
    ) -> None:
        traced = trace(model, input_shape)
        self.widths = width_map_of(traced, input_shape) if widths is None else widths
        paths, layers, sizes = _sized(traced, self.widths)
        made, read = [size[0] for size in sizes], [size[1] for size in sizes]
        self._made = _Widths(self.widths, paths, made, outputs=True)
        self._read = _Widths(self.widths, paths, read, outputs=False)
        weights = [_weights(layer) for layer in layers]
        others = [sum(p.numel() for p in layer.parameters(recurse=False)) for layer in layers]
        others = [every - weight for every, weight in zip(others, weights, strict=True)]
        macs = _macs(traced, layers)
        pairs = [outputs * inputs for outputs, inputs in sizes]
        self._pair_parameters, self._pair_macs = _Rates(weights, pairs), _Rates(macs, pairs)
        self._output_parameters = _Rates(others, made)
        parameters, all_macs = total(traced)
        self._fixed = parameters - sum(weights) - sum(others), all_macs - sum(macs)

    def of(self, kept: Sequence[int]) -> tuple[int, int]:
        """(parameters, MACs of one image) where group i keeps ``kept[i]`` channels, as ``count`` has them.

        Groups that a grouped convolution divides must keep a multiple of ``widths.blocks``.
        """
        groups = self.widths.groups
        if len(kept) != len(groups) or any(
            not 1 <= count <= group.channels for count, group in zip(kept, groups, strict=True)
        ):
            widest = [group.channels for group in groups]
            raise ValueError(f"each group keeps one channel at least, at most {widest}; got {list(kept)}")
        counts = torch.tensor(kept, dtype=torch.int64)
        made = self._made.where(counts)
        pairs = made * self._read.where(counts)
        parameters = self._pair_parameters.cost(pairs) + self._output_parameters.cost(made)
        return self._fixed[0] + parameters, self._fixed[1] + self._pair_macs.cost(pairs)

    def expected(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(parameters, MACs) for numbers of channels that need not be whole, differentiable in ``kept``.

        ``kept`` is (groups,), of a floating type. At whole numbers it is :meth:`of`, to rounding.
        """
        made, read = self._made.between(kept), self._read.between(kept)
        pairs = made * read
        parameters = self._pair_parameters.rate(kept) @ pairs + self._output_parameters.rate(kept) @ made
        return self._fixed[0] + parameters, self._fixed[1] + self._pair_macs.rate(kept) @ pairs


class _Widths:
    """The widths of some layers at one side, as a linear function of the channels that the groups keep."""

    def __init__(self, widths: WidthMap, paths: list[str], whole: list[int], *, outputs: bool) -> None:
        row = {path: index for index, path in enumerate(paths)}
        self._slopes = torch.zeros(len(paths), len(widths.groups), dtype=torch.int64)
        for group, parts in enumerate(widths.parts):
            for part in parts:
                if part.outputs == outputs and part.layer in row:
                    self._slopes[row[part.layer], group] += part.multiplicity
        channels = torch.tensor([group.channels for group in widths.groups], dtype=torch.int64)
        self._rest = torch.tensor(whole, dtype=torch.int64) - self._slopes @ channels

    def where(self, kept: torch.Tensor) -> torch.Tensor:
        """The width of each layer where the groups keep so many channels."""
        return self._slopes @ kept + self._rest

    def between(self, kept: torch.Tensor) -> torch.Tensor:
        """The same for numbers that need not be whole."""
        return self._slopes.to(kept) @ kept + self._rest.to(kept)


class _Rates:
    """What one unit of each layer costs; a fraction where a grouped convolution joins only some pairs."""

    def __init__(self, costs: list[int], units: list[int]) -> None:
        rates = [Fraction(cost, unit) for cost, unit in zip(costs, units, strict=True)]
        self._numerators = torch.tensor([rate.numerator for rate in rates], dtype=torch.int64)
        self._denominators = torch.tensor([rate.denominator for rate in rates], dtype=torch.int64)

    def cost(self, units: torch.Tensor) -> int:
        """The cost of all layers that have so many units each."""
        return int((units * self._numerators // self._denominators).sum())

    def rate(self, like: torch.Tensor) -> torch.Tensor:
        """What one unit of each layer costs, in the type and on the device of ``like``."""
        return self._numerators.to(like) / self._denominators.to(like)


def _sized(
    traced: fx.GraphModule, widths: WidthMap
) -> tuple[list[str], list[nn.Module], list[tuple[int, int]]]:
    """The layers that lose something with the groups' channels, by path, and the size of each."""
    reached = {part.layer for parts in widths.parts for part in parts}
    found = [(path, layer, _size(layer)) for path, layer in traced.named_modules() if path in reached]
    sized = [(path, layer, size) for path, layer, size in found if size is not None]
    return [path for path, _, _ in sized], [layer for _, layer, _ in sized], [size for _, _, size in sized]


def _size(layer: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs for each: 1 where it reads its own alone) of a layer; None where it has no width."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, 1 if is_depthwise(layer) else layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return layer.num_features, 1
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        return layer.num_parameters, 1
    return None


def _weights(layer: nn.Module) -> int:
    weight = getattr(layer, "weight", None)
    return weight.numel() if isinstance(weight, nn.Parameter) else 0


def _macs(traced: fx.GraphModule, layers: Sequence[nn.Module]) -> list[int]:
    """The MACs of each layer, of all its calls together."""
    of = {id(layer): 0 for layer in layers}
    for node in traced.graph.nodes:
        layer = module_of(traced, node)
        if id(layer) in of:
            of[id(layer)] += node_macs(traced, node)
    return [of[id(layer)] for layer in layers]
