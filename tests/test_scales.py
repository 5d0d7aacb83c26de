"""Channels ranked by the scale of their batch-norms, against scales that were set by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optpipe.graph import apply, width_map
from optpipe.graph.scales import channel_scales, keep_largest, scale_sources
from optpipe.graph.width_map import WidthMap
from optpipe.types import Plan
from optpipe.zoo.cifar_resnet import resnet20

SHAPE = (3, 8, 8)


@torch.no_grad()
def set_scale(network: nn.Module, path: str, values: Sequence[float]) -> None:
    norm = cast("nn.BatchNorm2d", network.get_submodule(path))
    norm.weight.copy_(torch.tensor(values))


def of(network: nn.Module, name: str, widths: WidthMap) -> tuple[float, ...]:
    """The scores of one group."""
    names = [group.name for group in widths.groups]
    return channel_scales(network, widths)[names.index(name)]


class Plain(nn.Sequential):
    """Two convolutions, the first with a batch-norm, and a head."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 2),
        )


def test_one_batch_norm_gives_its_own_absolute_scales() -> None:
    network, widths = Plain(), width_map(Plain(), SHAPE)
    set_scale(network, "1", [0.5, -2.0, 0.0, 1.0])
    assert of(network, "0", widths) == pytest.approx((0.5, 2.0, 0.0, 1.0))


def test_without_batch_norm_the_filters_norms_stand_in_and_that_is_said() -> None:
    network, widths = Plain(), width_map(Plain(), SHAPE)
    weight = cast("nn.Conv2d", network[3]).weight
    with torch.no_grad():
        weight[2] = 0
        weight[4] = 0
        weight[4, 0, 0, :2] = torch.tensor([3.0, -4.0])
    found = of(network, "3", widths)
    assert found == pytest.approx(weight.abs().sum((1, 2, 3)).tolist())
    assert (found[2], found[4]) == pytest.approx((0.0, 7.0))
    assert scale_sources(network, widths) == ("batch_norm", "filters")


def test_a_batch_norm_without_a_scale_is_none() -> None:
    network = Plain()
    network[1] = nn.BatchNorm2d(4, affine=False)
    assert scale_sources(network, width_map(network, SHAPE)) == ("filters", "filters")


class Tied(nn.Module):
    """Two layers that write into one stream, each behind a batch-norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.left_norm, self.right_norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.left_norm(self.left(x)) + self.right_norm(self.right(x)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def test_tied_batch_norms_count_alike_whatever_their_size() -> None:
    network = Tied()
    widths = width_map(network, SHAPE)
    set_scale(network, "left_norm", [1.0, 2.0, 3.0])  # mean 2
    set_scale(network, "right_norm", [60.0, 30.0, 0.0])  # mean 30
    # (1/2 + 60/30) / 2 times the mean of 2 and 30, and so on.
    assert of(network, "left", widths) == pytest.approx((1.25 * 16, 1.0 * 16, 0.75 * 16))


def test_a_batch_norm_that_is_zero_everywhere_has_no_say() -> None:
    network = Tied()
    widths = width_map(network, SHAPE)
    set_scale(network, "left_norm", [0.0, 0.0, 0.0])
    set_scale(network, "right_norm", [3.0, 1.0, 2.0])
    assert of(network, "left", widths) == pytest.approx((3.0, 1.0, 2.0))
    set_scale(network, "right_norm", [0.0, 0.0, 0.0])
    assert of(network, "left", widths) == (0.0, 0.0, 0.0)


class Dense(nn.Module):
    """Two layers whose features are concatenated to those before; each reads through a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        self.norm1, self.conv1 = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)
        self.norm3, self.head = nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        logits: torch.Tensor = self.head(F.relu(self.norm3(x)).mean((2, 3)))
        return logits


def test_features_that_several_batch_norms_read_have_the_average_of_their_scales() -> None:
    network = Dense()
    widths = width_map(network, SHAPE)
    set_scale(network, "norm1", [1.0, 3.0])
    set_scale(network, "norm2", [2.0, 2.0, 1.0, 2.0, 3.0])
    set_scale(network, "norm3", [9.0, 3.0, 4.0, 8.0, 0.0, 7.0, 6.0, 5.0])
    # Each scale is divided by the mean over the group's own channels: 2, 2 and 6 for the stem's.
    stem = ((0.5 + 1.0 + 1.5) / 3, (1.5 + 1.0 + 0.5) / 3)
    assert of(network, "stem", widths) == pytest.approx([score * 10 / 3 for score in stem])
    first = ((0.5 + 1.0) / 2, (1.0 + 2.0) / 2, (1.5 + 0.0) / 2)
    assert of(network, "conv1", widths) == pytest.approx([score * 3 for score in first])
    assert of(network, "conv2", widths) == pytest.approx((7.0, 6.0, 5.0))


class Flattened(nn.Module):
    """A batch-norm behind the flattening, where each channel lies at four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.flatten(F.adaptive_avg_pool2d(self.conv(x), 2), 1)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def test_a_channel_at_several_positions_has_their_mean() -> None:
    network = Flattened()
    set_scale(network, "norm", [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 2.0])
    assert of(network, "conv", width_map(network, SHAPE)) == pytest.approx((2.5, 0.5))


def test_a_real_network_keeps_the_channels_of_the_largest_scales() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = resnet20().eval()
    widths = width_map(network, (3, 32, 32))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.num_features, generator=generator))
    assert set(scale_sources(network, widths)) == {"batch_norm"}
    scores = channel_scales(network, widths)
    assert [len(one) for one in scores] == [group.channels for group in widths.groups]
    inner = [group.name for group in widths.groups].index("layer1.0.conv1")
    weight = cast("nn.BatchNorm2d", network.get_submodule("layer1.0.bn1")).weight
    kept = keep_largest(scores[inner], 8)
    assert kept == tuple(sorted(weight.topk(8).indices.tolist()))
    keep = tuple(
        (group.name, keep_largest(one, group.channels // 2, runs))
        for group, one, runs in zip(widths.groups, scores, widths.blocks, strict=True)
    )
    narrow = apply(network, Plan(keep_channels=keep), (3, 32, 32))
    assert cast("nn.Conv2d", narrow.get_submodule("layer1.0.conv1")).out_channels == 8


def test_the_largest_are_kept_in_ascending_order_and_of_equals_the_first() -> None:
    assert keep_largest([0.1, 3.0, 2.0, 2.0, 2.0], 3) == (1, 2, 3)


def test_runs_keep_equally_many_each() -> None:
    assert keep_largest([9.0, 8.0, 7.0, 1.0, 3.0, 2.0], 4, 2) == (0, 1, 4, 5)


@pytest.mark.parametrize(("count", "blocks"), [(3, 2), (0, 1), (0, 2), (7, 1), (4, 4), (2, 0)])
def test_a_count_that_the_runs_cannot_share_is_refused(count: int, blocks: int) -> None:
    with pytest.raises(ValueError, match=f"{count} of 6 channels cannot be kept in {blocks} equal runs"):
        keep_largest([1.0] * 6, count, blocks)
