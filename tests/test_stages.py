"""Where a network can be compared with its original on the way, and what is then seen there."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import fx, nn

from optpipe import graph, zoo
from optpipe.types import Plan

IMAGE = (3, 64, 64)
# (network, the first layer after each stage, the block at the end of the first stage)
STAGES = [
    ("resnet20_cifar", ("layer2.0.conv1", "layer3.0.conv1"), "layer1.2"),
    ("resnet18", ("layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"), "layer1.1"),
    (
        "mobilenet_v2",
        tuple(f"features.{number}.conv.0.0" for number in (4, 7, 11, 14, 17)),
        "features.3",
    ),
]


@pytest.fixture(scope="module")
def networks() -> dict[str, fx.GraphModule]:
    """Each traced, with running statistics that are not all zeros and ones."""

    def make(name: str) -> nn.Module:
        if name.endswith("cifar"):
            return zoo.build(name)
        network: nn.Module = torchvision.models.get_model(name, weights=None)
        return network

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {name: make(name) for name, *_ in STAGES}
        for network in made.values():
            with torch.no_grad():
                network.train()(torch.randn(4, *IMAGE))
    return {name: graph.trace(network.eval(), IMAGE) for name, network in made.items()}


def images() -> torch.Tensor:
    return torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(1))


def entering(network: nn.Module, layer: str) -> torch.Tensor:
    """What a layer reads when the network sees the images."""
    seen: list[torch.Tensor] = []
    handle = network.get_submodule(layer).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].clone())
    )
    with torch.no_grad():
        network(images())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "readers", "last"), STAGES)
def test_the_reader_of_a_stage_is_the_first_layer_after_its_stream(
    networks: dict[str, fx.GraphModule], name: str, readers: tuple[str, ...], last: str
) -> None:
    assert graph.stage_readers(networks[name]) == readers
    droppable = graph.inspect(networks[name], IMAGE).droppable
    assert not any(reader.startswith(f"{block.name}.") for reader in readers for block in droppable)


@pytest.mark.parametrize(("name", "readers", "last"), STAGES)
def test_observing_gives_the_features_and_what_each_reader_reads(
    networks: dict[str, fx.GraphModule], name: str, readers: tuple[str, ...], last: str
) -> None:
    network = networks[name]
    with torch.no_grad():
        features, *stages = graph.observe(network, readers)(images())
        expected = graph.split(network)[0](images())
    assert torch.equal(features, expected)
    for stage, reader in zip(stages, readers, strict=True):
        assert torch.equal(stage, entering(network, reader))


@pytest.mark.parametrize(("name", "readers", "last"), STAGES)
def test_a_stage_whose_last_block_is_dropped_ends_with_the_block_before(
    networks: dict[str, fx.GraphModule], name: str, readers: tuple[str, ...], last: str
) -> None:
    candidate = graph.apply(networks[name], Plan(drop_blocks=(last,)), IMAGE)
    assert not any(key.startswith(f"{last}.") for key in candidate.state_dict())
    with torch.no_grad():
        _, *stages = graph.observe(candidate, readers)(images())
        _, *originals = graph.observe(networks[name], readers)(images())
    assert [stage.shape for stage in stages] == [stage.shape for stage in originals]
    # The dropped block read exactly what the stage now ends with.
    first_layer = next(key for key in networks[name].state_dict() if key.startswith(f"{last}."))
    into_dropped = entering(networks[name], first_layer.removesuffix(".weight"))
    assert torch.equal(stages[0], into_dropped)
    assert not torch.equal(stages[0], originals[0])


def test_an_observed_network_shares_its_parameters(networks: dict[str, fx.GraphModule]) -> None:
    network = networks["resnet20_cifar"]
    own = dict(network.named_parameters())
    observed = dict(graph.observe(network, ("layer2.0.conv1",)).named_parameters())
    assert all(parameter is own[name] for name, parameter in observed.items())
    assert set(own) - set(observed) == {"linear.weight", "linear.bias"}


def test_observing_changes_nothing_of_its_argument(networks: dict[str, fx.GraphModule]) -> None:
    network = networks["resnet20_cifar"]
    before, code = list(network.state_dict()), network.code
    graph.observe(network, ("layer2.0.conv1",))
    assert (list(network.state_dict()), network.code) == (before, code)


def test_a_network_without_droppable_blocks_has_no_stage() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    assert graph.stage_readers(graph.trace(plain.eval(), (3, 8, 8))) == ()
