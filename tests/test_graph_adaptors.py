"""Adaptor sites and their exact folding."""

from __future__ import annotations

import pytest
import torch
from test_graph import CIFAR, IMAGENET, cifar_net, difference, images, randomised, torchvision_model, without
from torch import fx, nn

from optpipe import graph


def sites(module: fx.GraphModule) -> set[str]:
    return {path.removeprefix("optpipe_adaptors.") for path in graph.adaptors(module)}


def shaken(module: fx.GraphModule) -> fx.GraphModule:
    """The candidate with adaptors far from the identity."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adaptor in graph.adaptors(module).values():
            weight = adaptor.get_parameter("weight")
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3 / weight.shape[0] ** 0.5)
    return module


def assert_folds(model: nn.Module, shape: tuple[int, int, int], *names: str) -> None:
    plain = graph.apply(model, without(*names), shape)
    adapted = graph.with_adaptors(model, without(*names), shape)
    x = images(shape)
    with torch.no_grad():
        assert difference(adapted(x), plain(x)) < 1e-5, names
        shaken(adapted)
        folded = graph.fold(adapted)
        assert difference(folded(x), adapted(x)) < 1e-4, names
        assert difference(adapted(x), plain(x)) > 1e-3, names
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert graph.structure_key(folded, shape, 1) == graph.structure_key(plain, shape, 1)
    assert not graph.adaptors(folded)


def test_adaptors_follow_the_writers_before_and_precede_the_readers_after() -> None:
    model = torchvision_model("resnet34")
    adapted = graph.with_adaptors(model, without("layer2.2"), IMAGENET)
    assert sites(adapted) == {
        "after.layer2.0.conv2",
        "after.layer2.0.downsample.0",
        "after.layer2.1.conv2",
        "before.layer2.3.conv1",
        "before.layer3.0.conv1",
        "before.layer3.0.downsample.0",
    }
    for adaptor in graph.adaptors(adapted).values():
        assert isinstance(adaptor, nn.Conv2d)
        assert adaptor.bias is None
        assert adaptor.kernel_size == (1, 1)
        assert torch.equal(adaptor.weight[:, :, 0, 0], torch.eye(128))


def test_the_stem_writes_the_first_stage_through_max_pooling() -> None:
    adapted = graph.with_adaptors(torchvision_model("resnet34"), without("layer1.0"), IMAGENET)
    assert "after.conv1" in sites(adapted)


def test_padded_shortcuts_end_a_stream() -> None:
    adapted = graph.with_adaptors(cifar_net(), without("layer2.1"), CIFAR)
    assert sites(adapted) == {"after.layer2.0.conv2", "before.layer2.2.conv1", "before.layer3.0.conv1"}


def test_the_last_block_has_writers_only() -> None:
    adapted = graph.with_adaptors(cifar_net(), without("layer3.2"), CIFAR)
    assert sites(adapted) == {"after.layer3.0.conv2", "after.layer3.1.conv2"}


def test_mobilenet_adapts_projections_expansions_and_the_head() -> None:
    model = torchvision_model("mobilenet_v2")
    assert sites(graph.with_adaptors(model, without("features.9"), IMAGENET)) == {
        "after.features.7.conv.2",
        "after.features.8.conv.2",
        "before.features.10.conv.0.0",
        "before.features.11.conv.0.0",
    }
    small = torchvision_model("mobilenet_v3_small")
    assert "before.features.12.0" in sites(graph.with_adaptors(small, without("features.10"), IMAGENET))


def test_several_dropped_blocks_share_their_sites() -> None:
    adapted = graph.with_adaptors(cifar_net(), without("layer1.1", "layer2.1"), CIFAR)
    assert sites(adapted) == {
        "after.conv1",
        "after.layer1.0.conv2",
        "before.layer1.2.conv1",
        "before.layer2.0.conv1",
        "after.layer2.0.conv2",
        "before.layer2.2.conv1",
        "before.layer3.0.conv1",
    }
    assert len(graph.adaptors(adapted)) == 7


def test_linear_layers_in_channels_last_code_get_linear_adaptors() -> None:
    model = torchvision_model("convnext_tiny")
    adapted = graph.with_adaptors(model, without("features.3.1"), (3, 64, 64))
    kinds = {path.split(".", 1)[1]: type(m) for path, m in graph.adaptors(adapted).items()}
    assert kinds == {
        "after.features.2.1": nn.Conv2d,
        "after.features.3.0.block.5": nn.Linear,
        "before.features.4.1": nn.Conv2d,
    }


class Depthwise(nn.Module):
    """A stream that only depthwise layers write and read."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, padding=1, groups=3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        x = x + self.two(x)
        x = x + self.three(x)
        return x.mean((2, 3))


def test_a_block_without_foldable_neighbours_gets_no_adaptor() -> None:
    adapted = graph.with_adaptors(Depthwise(), without("two"), (3, 8, 8))
    assert graph.adaptors(adapted) == {}
    x = images((3, 8, 8))
    assert torch.equal(graph.fold(adapted)(x), adapted(x))


class Direct(nn.Module):
    """Layers with biases and odd paddings that read one another directly; one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.twice = nn.Conv2d(6, 6, 1)
        self.last = nn.Conv2d(6, 8, 3, stride=2)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        x = x + self.twice(self.twice(x))
        logits: torch.Tensor = self.fc(self.last(x).mean((2, 3)))
        return logits


def test_bias_padding_and_layers_read_directly_fold_exactly_and_shared_layers_are_left_alone() -> None:
    torch.manual_seed(0)
    model = randomised(Direct())
    assert sites(graph.with_adaptors(model, without("first"), (3, 16, 16))) == {
        "after.stem",
        "before.second",
        "before.last",
    }
    for names in (("first",), ("second",), ("first", "second")):
        assert_folds(model, (3, 16, 16), *names)


@pytest.mark.parametrize("names", [("layer1.0",), ("layer2.2",), ("layer3.1", "layer3.2", "layer1.1")])
def test_folding_cifar_candidates_keeps_their_output(names: tuple[str, ...]) -> None:
    assert_folds(cifar_net(), CIFAR, *names)


@pytest.mark.parametrize(
    ("model", "block"),
    [
        ("resnet34", "layer1.0"),
        ("resnet34", "layer4.2"),
        ("mobilenet_v2", "features.3"),
        ("mobilenet_v2", "features.16"),
    ],
)
def test_folding_at_224_keeps_the_output(model: str, block: str) -> None:
    assert_folds(torchvision_model(model), IMAGENET, block)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet34", "mobilenet_v2"])
def test_dropping_each_block_and_folding_its_adaptors_keeps_the_output(name: str) -> None:
    model = torchvision_model(name)
    droppable = graph.inspect(model, IMAGENET).droppable
    assert len(droppable) == {"resnet34": 13, "mobilenet_v2": 10}[name]
    for block in droppable:
        assert_folds(model, IMAGENET, block.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet50", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny"]
)
def test_folding_keeps_the_output_of_other_architectures(name: str) -> None:
    model = torchvision_model(name)
    for block in graph.inspect(model, IMAGENET).droppable[::3]:
        assert_folds(model, IMAGENET, block.name)


def test_inserting_and_folding_leave_their_arguments_and_the_random_state_alone() -> None:
    model, x = cifar_net(), images(CIFAR)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.no_grad():
        before = model(x)
        adapted = shaken(graph.with_adaptors(model, without("layer1.1"), CIFAR))
        output = adapted(x)
        graph.fold(adapted)
        assert torch.equal(adapted(x), output)
        assert torch.equal(model(x), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(graph.adaptors(adapted)) == 4


def test_an_adapted_candidate_splits_and_its_adaptors_train() -> None:
    adapted = graph.with_adaptors(cifar_net(), without("layer2.1"), CIFAR)
    backbone, _ = graph.split(adapted)
    backbone(images(CIFAR)).square().mean().backward()
    assert all(m.get_parameter("weight").grad is not None for m in graph.adaptors(adapted).values())
    folded_backbone, _ = graph.split(graph.fold(adapted))
    assert folded_backbone(images(CIFAR)).shape == (2, 64, 8, 8)
