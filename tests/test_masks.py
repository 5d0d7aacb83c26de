"""The units that masks switch: the masked network is the one that is cut, or has zeros where it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import fx, nn
from torch.func import functional_call

from optpipe import graph, onnx_export
from optpipe.errors import UsageError
from optpipe.graph import Granularity, Masks
from optpipe.zoo import build

Shape = tuple[int, int, int]
CIFAR = (3, 32, 32)
SMALL = (3, 6, 6)


class Grouped(nn.Module):
    """A convolution in two groups, so that what it reads and makes must lose equally many of each half."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.hidden, self.head = nn.Linear(12 * 36, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.grouped(torch.relu(self.norm(self.stem(x)))))
        logits: torch.Tensor = self.head(torch.relu(self.hidden(x.flatten(1))))
        return logits


class Two(nn.Module):
    """Two layers whose weights can be written down: two filters of 1x1 over two channels, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.wide, self.head = nn.Conv2d(2, 4, 1, bias=False), nn.Linear(4, 2)
        self.conv.weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.0]]).view(2, 2, 1, 1)
        self.wide.weight.data = torch.tensor([[1.0, 1], [2, -2], [0, 0], [0, 3]]).view(4, 2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.wide(torch.relu(self.norm(self.conv(x)))))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def images(shape: Shape, count: int = 3) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(2))


def made(name: str) -> tuple[fx.GraphModule, Shape]:
    """A network in eval mode, its batch-norms with scales, offsets and statistics of their own."""
    shape = {"grouped": SMALL, "two": (2, 3, 3)}.get(name, CIFAR)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Grouped() if name == "grouped" else Two() if name == "two" else build(f"{name}_cifar")
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data = 0.8 + 0.4 * torch.rand(norm.weight.shape, generator=generator)
            norm.bias.data = 0.4 * torch.rand(norm.bias.shape, generator=generator) - 0.1
            norm.momentum = None
            norm.train()
    with torch.no_grad():
        model(images(shape, 4))
    return graph.trace(model.eval(), shape), shape


def masks_of(name: str, granularity: Granularity) -> tuple[fx.GraphModule, Masks]:
    network, shape = made(name)
    return network, Masks(network, graph.width_map(network, shape), granularity)


def drawn(masks: Masks, seed: int = 3) -> list[torch.Tensor]:
    """A number between 0 and 1 for every unit."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) for shape in masks.shapes]


def floats(kept: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [mask.float() for mask in kept]


def masked(
    network: fx.GraphModule, masks: Masks, kept: Sequence[torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    logits: torch.Tensor = functional_call(network, masks.weights(network, kept), (x,))
    return logits


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "mobilenet_v2", "densenet40", "grouped"])
def test_a_network_masked_by_zeros_and_ones_is_the_one_that_is_cut(name: str) -> None:
    network, masks = masks_of(name, "filter")
    shape = made(name)[1]
    kept = masks.above(drawn(masks), 0.4)
    plan, x = masks.plan(kept), images(shape)
    assert len(plan.keep_channels) == len(masks.names) > 1
    with torch.no_grad():
        found, whole = masked(network, masks, floats(kept), x), network(x)
        torch.testing.assert_close(found, graph.apply(network, plan, shape)(x), atol=1e-5, rtol=1e-5)
        assert (found - whole).abs().max() > 1e-2 * whole.abs().max()
        ones = [torch.ones(one) for one in masks.shapes]
        torch.testing.assert_close(masked(network, masks, ones, x), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "grouped"])
@pytest.mark.parametrize("granularity", ["filter", "weight", "2:4"])
def test_gradients_reach_every_mask_and_every_weight(name: str, granularity: Granularity) -> None:
    network, masks = masks_of(name, granularity)
    network.requires_grad_(True)
    soft = [(0.2 + 0.6 * values).requires_grad_() for values in drawn(masks)]
    torch.autograd.backward(masked(network, masks, soft, images(made(name)[1])).square().sum())
    assert all(mask.grad is not None and mask.grad.abs().max() > 0 for mask in soft)
    weights = [one for path, one in network.named_parameters() if path.endswith("weight")]
    assert len(weights) > 3 and all(one.grad is not None and one.grad.abs().max() > 0 for one in weights)


def test_the_gradient_of_a_channels_mask_is_the_slope_of_the_logits() -> None:
    network, masks = masks_of("grouped", "filter")
    network, x = network.double(), images(SMALL).double()
    soft = [(0.2 + 0.6 * values).double().requires_grad_() for values in drawn(masks)]
    masked(network, masks, soft, x).square().sum().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for number, channel in ((0, 5), (1, 11), (2, 0)):
            values = []
            for step in (1e-6, -1e-6):
                moved = [mask.clone() for mask in soft]
                moved[number][channel] += step
                values.append(float(masked(network, masks, moved, x).square().sum()))
            gradient = soft[number].grad
            assert gradient is not None
            assert float(gradient[channel]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_another_network_of_the_same_structure_takes_the_place_of_the_first() -> None:
    _, masks = masks_of("grouped", "filter")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        other = graph.trace(Grouped().eval(), SMALL)
    kept = masks.above(drawn(masks), 0.5)
    with torch.no_grad():
        cut = graph.apply(other, masks.plan(kept), SMALL)
        torch.testing.assert_close(masked(other, masks, floats(kept), images(SMALL)), cut(images(SMALL)))


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_thresholds_give_nested_networks_that_keep_something_everywhere(granularity: Granularity) -> None:
    _, masks = masks_of("grouped", granularity)
    values = drawn(masks)
    before = masks.above(values, -1.0)
    assert all(bool(mask.all()) for mask in before)
    for threshold in (0.2, 0.5, 0.8, 0.97, 2.0):
        kept = masks.above(values, threshold)
        assert [mask.shape for mask in kept] == list(masks.shapes)
        assert all(bool((mask <= wider).all()) for mask, wider in zip(kept, before, strict=True))
        before = kept
    runs = {"filter": [2, 2, 1], "weight": [1, 1, 1]}[granularity]
    assert [int(mask.sum()) for mask in before] == runs


def test_a_grouped_convolution_keeps_equally_many_of_each_half() -> None:
    _, masks = masks_of("grouped", "filter")
    assert masks.names == ("stem", "grouped", "hidden")
    rising = [torch.arange(float(shape.numel())) for shape in masks.shapes]
    # All of the largest lie in the second half; 5 is rounded down to what two halves share, 1 up.
    kept = masks.highest(rising, [5, 1, 3])
    assert [mask.nonzero().flatten().tolist() for mask in kept] == [[2, 3, 6, 7], [5, 11], [5, 6, 7]]
    assert masks.plan(kept).keep_channels == (
        ("stem", (2, 3, 6, 7)),
        ("grouped", (5, 11)),
        ("hidden", (5, 6, 7)),
    )


def test_of_equal_probabilities_the_first_stay() -> None:
    network, masks = masks_of("two", "weight")
    kept = masks.highest([torch.ones(shape) for shape in masks.shapes], [3, 2])
    assert [mask.flatten().tolist() for mask in kept] == [[1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert graph.weight_count(network) == 4 + 8 + 8


# ---------------------------------------------------------------- what a unit's weights come to


def test_a_filters_weights_by_hand() -> None:
    network, masks = masks_of("two", "filter")
    assert masks.names == ("conv", "wide")
    assert masks.counts(network) == [2, 2]
    assert [one.tolist() for one in masks.squares(network)] == [[5, 9], [2, 8, 0, 9]]
    assert [one.tolist() for one in masks.unit_weights(network)] == [
        [[1, -2], [3, 0]],
        [[1, 1], [2, -2], [0, 0], [0, 3]],
    ]
    # Means of 1.5 and 1.5; 1, 2, 0 and 1.5 over their mean of 9/8.
    first, second = (one.tolist() for one in masks.magnitudes(network))
    assert first == [1, 1]
    assert second == pytest.approx([8 / 9, 16 / 9, 0, 12 / 9])


def test_single_weights_by_hand() -> None:
    network, masks = masks_of("two", "weight")
    assert masks.names == ("conv", "wide")
    assert masks.counts(network) == [1, 1]
    assert masks.squares(network)[0].flatten().tolist() == [1, 4, 9, 0]
    assert masks.unit_weights(network)[1].flatten().tolist() == [1, 1, 2, -2, 0, 0, 0, 3]
    assert masks.magnitudes(network)[0].flatten().tolist() == pytest.approx([2 / 3, 4 / 3, 2, 0])


def test_a_units_squares_follow_its_weights() -> None:
    network, masks = masks_of("two", "filter")
    network.requires_grad_(True)
    torch.stack([one.sum() for one in masks.squares(network)]).sum().backward()  # type: ignore[no-untyped-call]
    for path in ("conv", "wide"):
        weight = network.get_submodule(path).weight
        assert isinstance(weight, nn.Parameter) and weight.grad is not None
        assert torch.equal(weight.grad, 2 * weight.detach())


def test_filters_that_a_depthwise_layer_carries_on_have_its_weights_too() -> None:
    network, masks = masks_of("mobilenet_v2", "filter")
    number = masks.names.index("features.2.conv.0.0")
    assert masks.widths.groups[number].layers == ("features.2.conv.0.0", "features.2.conv.1.0")
    assert masks.counts(network)[number] == 16 + 9
    assert masks.unit_weights(network)[number].shape == (96, 25)


def test_filters_are_blind_to_their_length_where_batch_norm_alone_follows() -> None:
    assert masks_of("two", "filter")[1].blind == (True, False)
    assert masks_of("two", "weight")[1].blind == (False, False)
    assert masks_of("grouped", "filter")[1].blind == (True, False, False)
    assert set(masks_of("mobilenet_v2", "filter")[1].blind) == {True}


# ---------------------------------------------------------------- single weights


def test_single_weights_are_zero_where_they_are_masked_and_the_classifier_stays() -> None:
    network, masks = masks_of("grouped", "weight")
    assert masks.names == ("stem", "grouped", "hidden")
    kept = masks.above(drawn(masks), 0.6)
    state = graph.with_weights(network, masks.weights(network, floats(kept)))
    for name, mask in zip(masks.names, kept, strict=True):
        before = network.state_dict()[f"{name}.weight"]
        assert torch.equal(state[f"{name}.weight"], torch.where(mask, before, 0.0))
    touched = {f"{name}.weight" for name in masks.names}
    rest = {name: value for name, value in network.state_dict().items() if name not in touched}
    assert set(state) == set(network.state_dict())
    assert all(torch.equal(state[name], value) for name, value in rest.items())
    # Copies: the network is not to follow what is done to them.
    state["head.weight"].zero_()
    assert bool(network.state_dict()["head.weight"].any())


def test_sparsity_by_hand() -> None:
    network, _ = masks_of("two", "weight")
    assert graph.weight_count(network) == 20
    head = network.get_submodule("head").weight
    assert isinstance(head, nn.Parameter)
    head.data = torch.tensor([[0.0, 1, 1, 1], [1, 1, 1, 1]])
    # One of four, three of eight, one of eight; biases and batch-norms do not count.
    assert graph.sparsity(network) == 5 / 20
    assert graph.sparsity(nn.ReLU()) == 0


def test_a_network_without_such_weights_is_refused_in_one_line() -> None:
    network = graph.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), (3, 2, 2))
    for granularity in ("filter", "weight", "2:4"):
        with pytest.raises(UsageError) as error:
            Masks(network, graph.width_map(network, (3, 2, 2)), granularity)
        assert str(error.value) == (
            f'[method] granularity = "{granularity}": the network has no weights of that kind'
        )


# ---------------------------------------------------------------- two of four


def test_fours_run_along_the_input_channels_and_back() -> None:
    kernel = torch.arange(2 * 8 * 3 * 2).view(2, 8, 3, 2)
    fours = graph.fours(kernel)
    assert fours.shape == (2, 3, 2, 2, 4)
    assert torch.equal(fours[1, 2, 0, 1], kernel[1, 4:8, 2, 0])
    assert torch.equal(graph.from_fours(fours, kernel.shape), kernel)
    linear = torch.arange(24).view(3, 8)
    assert torch.equal(graph.fours(linear)[2, 1], linear[2, 4:])
    assert torch.equal(graph.from_fours(graph.fours(linear), linear.shape), linear)


def test_layers_whose_inputs_do_not_come_in_fours_stay_whole() -> None:
    _, masks = masks_of("grouped", "2:4")
    # The stem reads 3 channels, each filter of the grouped layer 4, the hidden layer 432.
    assert masks.names == ("grouped", "hidden")
    names = masks_of("mobilenet_v2", "2:4")[1].names
    assert "features.2.conv.0.0" in names
    assert "features.2.conv.1.0" not in names  # depthwise: one input for each filter


def two_of_each_four(network: fx.GraphModule, masks: Masks) -> dict[str, torch.Tensor]:
    """The state of the network with the two smaller weights of each four gone."""
    kept = []
    for weight in masks.unit_weights(network):
        fours = graph.fours(weight.abs())
        ranks = fours.argsort(dim=-1, descending=True)[..., :2]
        kept.append(graph.from_fours(torch.zeros_like(fours).scatter_(-1, ranks, 1.0), weight.shape))
    return graph.with_weights(network, masks.weights(network, kept))


def test_two_of_each_four_survive_the_export_to_onnx(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)]
        model = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 2))
    shape = (4, 6, 6)
    network = graph.trace(model.eval(), shape)
    masks = Masks(network, graph.width_map(network, shape), "2:4")
    network.load_state_dict(two_of_each_four(network, masks))
    onnx_export.export(network, shape, 2, tmp_path / "model.onnx")
    weights = [
        torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
        if len(tensor.dims) > 1
    ]
    # Both convolutions, whatever was folded into them, and the hidden layer; the classifier is last.
    sparse = [weight for weight in weights if tuple(weight.shape) in [tuple(one) for one in masks.shapes]]
    assert len(sparse) == len(masks.names) == 3 == len(weights) - 1
    for weight in sparse:
        assert int((graph.fours(weight) == 0).sum(-1).min()) == 2
