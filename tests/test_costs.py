"""Parameters and MACs by arithmetic: exactly those of the network that is cut."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from optpipe import graph
from optpipe.graph.costs import Costs
from optpipe.types import Plan
from optpipe.zoo.cifar_resnet import resnet20

Shape = tuple[int, int, int]


class Branches(nn.Module):
    """A concatenation, a layer called twice, grouped and depthwise ones, slopes, a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(12, affine=False)
        self.again, self.depth = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.mix, self.one, self.many = nn.Conv2d(12, 8, 1), nn.PReLU(), nn.PReLU(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.last, self.fc = nn.Linear(12 * 16, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.again(torch.relu(self.norm(torch.cat([x, x], 1))))
        y = self.depth(x)
        x = self.many(self.one(self.mix(torch.cat([x, self.depth(y)], 1))))
        logits: torch.Tensor = self.fc(torch.relu(self.last(self.grouped(x).flatten(1))))
        return logits


def made(name: str) -> tuple[nn.Module, Shape]:
    torch.manual_seed(0)
    if name == "branches":
        return Branches().eval(), (3, 8, 8)
    if name == "resnet20":
        return resnet20().eval(), (3, 32, 32)
    if name == "densenet":
        return torchvision.models.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=5).eval(), (3, 32, 32)
    if name == "vgg":
        features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 12, "M", 8], batch_norm=True)
        classifier = (nn.Linear(8 * 4 * 4, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5))
        return nn.Sequential(features, nn.Flatten(), *classifier).eval(), (3, 32, 32)
    model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=5)
    return model.eval(), (3, 48, 48)


@pytest.mark.parametrize("name", ["resnet20", "branches", "densenet", "vgg", "mobilenet_v2", "resnet18"])
def test_costs_are_those_of_the_cut_network(name: str) -> None:
    model, shape = made(name)
    costs = Costs(model, shape)
    groups, runs = costs.widths.groups, costs.widths.blocks
    assert costs.of([group.channels for group in groups]) == graph.count(graph.trace(model, shape), shape)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        keep = []
        for group, run in zip(groups, runs, strict=True):
            size = group.channels // run
            each = int(torch.randint(1, size + 1, (1,), generator=generator))
            keep.append(tuple(first + i for first in range(0, group.channels, size) for i in range(each)))
        plan = Plan(keep_channels=tuple((group.name, kept) for group, kept in zip(groups, keep, strict=True)))
        assert costs.of([len(kept) for kept in keep]) == graph.count(graph.apply(model, plan, shape), shape)


def test_costs_of_one_network_by_hand() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    costs = Costs(nn.Sequential(*layers, nn.Linear(16, 2)).eval(), (3, 8, 8))
    # 27 weights and a bias, scale and offset for each channel; 4 pixels of it for each of 2 classes.
    assert costs.of([3]) == (3 * (27 + 3) + 2 * 3 * 4 + 2, 64 * 27 * 3 + 2 * 3 * 4)


def test_a_map_made_before_serves_the_costs_too() -> None:
    model, shape = made("resnet20")
    gated = graph.Gated(model, shape)
    kept = [group.channels - 1 for group in gated.groups]
    assert Costs(model, shape, gated.widths).of(kept) == Costs(model, shape).of(kept)


@pytest.mark.parametrize("kept", [[], [0], [5], [2, 2]])
def test_counts_that_do_not_fit_are_refused(kept: list[int]) -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    with pytest.raises(ValueError, match=r"keeps one channel at least, at most \[4\]; got"):
        Costs(nn.Sequential(*layers), (3, 8, 8)).of(kept)


@pytest.mark.parametrize("name", ["resnet20", "branches", "densenet", "mobilenet_v2"])
def test_expected_costs_are_the_costs_at_whole_numbers_and_have_their_slope(name: str) -> None:
    model, shape = made(name)
    costs = Costs(model, shape)
    generator = torch.Generator().manual_seed(1)
    whole = [group.channels for group in costs.widths.groups]
    runs = torch.tensor(costs.widths.blocks, dtype=torch.float64)
    share = 0.3 + 0.6 * torch.rand(len(whole), dtype=torch.float64, generator=generator)
    kept = (share * torch.tensor(whole) / runs).floor().clamp(min=1) * runs
    found = costs.expected(kept)
    assert [round(float(one)) for one in found] == list(costs.of([int(count) for count in kept.tolist()]))
    assert [float(one) for one in found] == pytest.approx([round(float(one)) for one in found], rel=1e-12)
    between = (kept + 0.25).requires_grad_()
    for number in range(2):
        (slope,) = torch.autograd.grad(costs.expected(between)[number], between)
        assert float(slope.min()) >= 0 and float(slope.max()) > 0
        for group in range(len(whole)):
            step = torch.zeros_like(between)
            step[group] = 0.5
            with torch.no_grad():
                # The cost is at most quadratic in a group's channels: central differences are exact.
                up, down = costs.expected(between + step)[number], costs.expected(between - step)[number]
            assert float(slope[group]) == pytest.approx(float(up - down), rel=1e-6, abs=1e-3)
