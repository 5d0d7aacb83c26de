"""Kernels that lost inputs get their norms back, and the network computes what it did."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from optpipe import graph
from optpipe.types import Plan
from optpipe.zoo.cifar_resnet import resnet20

Shape = tuple[int, int, int]


def images(shape: Shape) -> torch.Tensor:
    return torch.randn(8, *shape, generator=torch.Generator().manual_seed(2))


def made(name: str) -> tuple[nn.Module, Shape, Plan]:
    """A network with statistics of images, and a plan that keeps two of three channels of every group."""
    torch.manual_seed(0)
    shape = (3, 32, 32)
    if name == "resnet20":
        model: nn.Module = resnet20()
    elif name == "densenet":
        model = torchvision.models.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=5)
    else:
        model = getattr(torchvision.models, name)(weights=None, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images(shape))
    groups = graph.width_map(model, shape).groups
    keep = tuple((g.name, tuple(c for c in range(g.channels) if c % 3 != 1)) for g in groups)
    return model.eval(), shape, Plan(keep_channels=keep)


def norms(network: nn.Module, path: str) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(network.get_parameter(path).detach().flatten(1), dim=1)
    return found


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def by_batch(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model = copy.deepcopy(model)
    for module in model.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    with torch.no_grad():
        logits: torch.Tensor = model(x)
    return logits


# By batch statistics the eps of the batch-norms is left; it tells where an untrained network hardly varies.
@pytest.mark.parametrize(
    ("name", "by_batch_limit"), [("resnet20", 1e-4), ("densenet", 1e-4), ("mobilenet_v2", 1e-3)]
)
def test_the_network_computes_what_it_did(name: str, by_batch_limit: float) -> None:
    model, shape, plan = made(name)
    candidate = graph.apply(model, plan, shape)
    before = copy.deepcopy(candidate.state_dict())
    scaled = graph.rescale(model, plan, shape, candidate)
    x = images(shape)
    with torch.no_grad():
        assert difference(scaled(x), candidate(x)) < 1e-5
    assert difference(by_batch(scaled, x), by_batch(candidate, x)) < by_batch_limit
    assert all(torch.equal(before[key], value) for key, value in candidate.state_dict().items())
    changed = [key for key, value in scaled.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.endswith("weight") for key in changed)


def test_each_kernel_that_lost_inputs_has_its_norm_back() -> None:
    model, shape, plan = made("resnet20")
    candidate = graph.apply(model, plan, shape)
    scaled = graph.rescale(model, plan, shape, candidate)
    for stage in (1, 2, 3):
        for block in range(3):
            path = f"layer{stage}.{block}.conv2.weight"
            wanted = norms(model, path)
            assert difference(norms(scaled, path), wanted) < 1e-6
            assert difference(norms(candidate, path), wanted) > 1e-2
            # These lost outputs alone.
            path = f"layer{stage}.{block}.conv1.weight"
            assert torch.equal(scaled.get_parameter(path), candidate.get_parameter(path))


class Hand(nn.Module):
    """A convolution with a bias and a batch-norm, one without, and one whose output a second layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.normed, self.norm = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.bare, self.shared, self.shared_norm = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        both = self.shared(x)
        y = self.norm(self.normed(x)) * self.bare(x) + self.shared_norm(both) * both
        logits: torch.Tensor = self.fc(y.mean((2, 3)))
        return logits


def test_bias_and_statistics_follow_the_kernel_and_other_convolutions_stay() -> None:
    torch.manual_seed(0)
    model = Hand().eval()
    model.normed.weight.data = torch.tensor([[3.0, 4.0], [5.0, 12.0]]).view(2, 2, 1, 1)
    model.normed.bias = nn.Parameter(torch.tensor([1.0, 2.0]))
    model.norm.eps = 0.0
    model.norm.running_mean = torch.tensor([1.0, 1.0])
    model.norm.running_var = torch.tensor([4.0, 9.0])
    shape, plan = (1, 2, 2), Plan(keep_channels=(("first", (0,)),))
    scaled = graph.rescale(model, plan, shape, graph.apply(model, plan, shape))
    factors = torch.tensor([5 / 3, 13 / 5])
    torch.testing.assert_close(scaled.get_parameter("normed.weight").flatten(), torch.tensor([5.0, 13.0]))
    torch.testing.assert_close(
        scaled.get_parameter("normed.bias").detach(), factors * torch.tensor([1.0, 2.0])
    )
    torch.testing.assert_close(scaled.get_buffer("norm.running_mean"), factors)
    torch.testing.assert_close(scaled.get_buffer("norm.running_var"), factors**2 * torch.tensor([4.0, 9.0]))
    for path in ("bare", "shared"):
        weight = model.get_submodule(path).get_parameter("weight")[:, :1]
        assert torch.equal(scaled.get_parameter(f"{path}.weight"), weight)


def test_a_kernel_of_zeros_stays_one() -> None:
    torch.manual_seed(0)
    model = Hand().eval()
    model.normed.weight.data[1, 0] = 0
    plan = Plan(keep_channels=(("first", (0,)),))
    scaled = graph.rescale(model, plan, (1, 2, 2), graph.apply(model, plan, (1, 2, 2)))
    assert scaled.get_parameter("normed.weight")[1].abs().max() == 0
    assert all(bool(value.isfinite().all()) for value in scaled.state_dict().values())


def test_a_plan_without_channels_changes_nothing() -> None:
    model, shape, _ = made("resnet20")
    plan = Plan(drop_blocks=("layer1.1",))
    candidate = graph.apply(model, plan, shape)
    scaled = graph.rescale(model, plan, shape, candidate).state_dict()
    assert scaled.keys() == candidate.state_dict().keys()
    assert all(torch.equal(scaled[key], value) for key, value in candidate.state_dict().items())


def test_blocks_and_channels_gone_together_are_found_in_what_is_left() -> None:
    model, shape, narrow = made("resnet20")
    plan = Plan(("layer2.1",), narrow.keep_channels)
    candidate = graph.apply(model, plan, shape)
    scaled = graph.rescale(model, plan, shape, candidate)
    path = "layer3.1.conv2.weight"
    wanted = norms(model, path)
    assert difference(norms(scaled, path), wanted) < 1e-6
    with torch.no_grad():
        assert difference(scaled(images(shape)), candidate(images(shape))) < 1e-4
