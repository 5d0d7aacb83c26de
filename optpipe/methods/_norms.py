"""What a filter's weights alone say of it: the scores of plain filter pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import nn

from optpipe.types import ChannelGroup

Norm = Literal["l1", "l2", "fpgm", "random"]


def of_weights(
    norm: Norm, network: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Sequence[int]], seed: int
) -> list[torch.Tensor]:
    """Scores (channels,) of each group from its filters alone, in units of the group's mean.

    "l1" is a filter's L1 norm (Li et al., ICLR 2017), "l2" its Euclidean one, "fpgm" the sum of its distances
    to the layer's other filters that are still there (He et al., CVPR 2019), "random" a number from 0 to 1.
    The layers of a group add up.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for group, channels in zip(groups, kept, strict=True):
        values = torch.zeros(group.channels)
        for path in group.layers:
            values += _of_layer(norm, network.get_submodule(path), list(channels), generator)
        found.append(values / values[list(channels)].mean().clamp_min(1e-12))
    return found


def _of_layer(norm: Norm, layer: nn.Module, kept: list[int], generator: torch.Generator) -> torch.Tensor:
    filters = cast(torch.Tensor, layer.weight).detach().cpu().flatten(1).float()
    if norm == "random":
        return torch.rand(len(filters), generator=generator)
    if norm == "l1":
        return filters.abs().sum(dim=1)
    if norm == "l2":
        return filters.square().sum(dim=1).sqrt()
    return torch.cdist(filters, filters[kept]).sum(dim=1)
