"""How much each channel of a group counts, read from its batch-norms.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming": where a batch-norm scales
a channel by little, little of the channel goes on. Comprehensive pruning ("Accelerate CNNs from Three
Dimensions", section 3.3) compares these scales within a layer only, so that all layers keep one share of
their channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from optpipe.graph.width_map import Part, WidthMap

Source = Literal["batch_norm", "filters"]


@torch.no_grad()
def channel_scales(network: nn.Module, widths: WidthMap) -> tuple[tuple[float, ...], ...]:
    """For each group of ``widths`` the importance of each of its channels; larger stays longer.

    It is the absolute scale |gamma| of the batch-norm that normalises the channel. A group may have several
    batch-norms: tied layers have one each, a dense layer's channels meet one in every layer that reads them.
    They count alike, as each is divided by its mean over the group before they are averaged; times the mean
    of those means, one batch-norm alone gives its own |gamma|. One that is 0 everywhere has no say.
    A group without batch-norm has the L1 norms of its filters in their place: see :func:`scale_sources`.
    Scores of different groups are not made to be compared.
    """
    return tuple(
        _average([_spread(part, values, group.channels) for part, values in _found(network, parts)[1]])
        for group, parts in zip(widths.groups, widths.parts, strict=True)
    )


def scale_sources(network: nn.Module, widths: WidthMap) -> tuple[Source, ...]:
    """What the scores of each group are read from; "filters" where it has no batch-norm with a scale."""
    return tuple(_found(network, parts)[0] for parts in widths.parts)


def keep_largest(scores: Sequence[float], count: int, blocks: int = 1) -> tuple[int, ...]:
    """The ``count`` channels of the largest scores, ascending; equally many of each of ``blocks`` equal runs.

    Of equal scores the first stay. Raises ValueError for a count that the runs cannot share.
    """
    if blocks < 1 or len(scores) % blocks or count % blocks or not blocks <= count <= len(scores):
        raise ValueError(f"{count} of {len(scores)} channels cannot be kept in {blocks} equal runs")
    size, share = len(scores) // blocks, count // blocks
    kept: list[int] = []
    for first in range(0, len(scores), size):
        ranked = sorted(range(first, first + size), key=lambda index: -scores[index])
        kept.extend(sorted(ranked[:share]))
    return tuple(kept)


def _found(network: nn.Module, parts: Sequence[Part]) -> tuple[Source, list[tuple[Part, torch.Tensor]]]:
    """Where a group's scores come from, and each part with one value for each channel of its layer."""
    normed: list[tuple[Part, torch.Tensor]] = []
    filters: list[tuple[Part, torch.Tensor]] = []
    for part in parts:
        layer = network.get_submodule(part.layer)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if layer.affine:
                normed.append((part, layer.weight.detach().abs()))
        elif part.outputs and isinstance(layer, nn.Conv2d | nn.Linear):
            filters.append((part, layer.weight.detach().abs().flatten(1).sum(1)))
    return ("batch_norm", normed) if normed else ("filters", filters)


def _spread(part: Part, values: torch.Tensor, channels: int) -> torch.Tensor:
    """The values of a layer's channels for the group's own, double; the mean where one lies at several."""
    at = values.double().cpu()[list(part.positions)]
    sums = torch.zeros(channels, dtype=torch.float64)
    return sums.index_add_(0, torch.tensor(part.channels), at) / part.multiplicity


def _average(layers: Sequence[torch.Tensor]) -> tuple[float, ...]:
    means = torch.stack([layer.mean() for layer in layers])
    alive = [layer / mean for layer, mean in zip(layers, means, strict=True) if mean > 0]
    if not alive:
        return (0.0,) * len(layers[0])
    average = torch.stack(alive).mean(0) * means[means > 0].mean()
    return tuple(average.tolist())
