"""Masks on channels: the masked network is the cut one, and a mask's gradient scores every channel."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from optpipe import graph
from optpipe.graph.gates import Gated
from optpipe.types import Plan
from optpipe.zoo.cifar_mobilenet import mobilenet_v2
from optpipe.zoo.cifar_resnet import resnet20

CIFAR = (3, 32, 32)
SMALL = (3, 8, 8)
Shape = tuple[int, int, int]


class Joined(nn.Module):
    """Concatenation, a grouped convolution, a PReLU, a flattening by view, and a sum with a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1, bias=False)
        self.norm, self.conv = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, padding=1, bias=False)
        self.mix = nn.Conv2d(18, 8, 1)
        self.grouped, self.slope = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2), nn.PReLU(12)
        self.last, self.last_norm = nn.Conv2d(12, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
        self.hidden, self.fc = nn.Linear(20, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.stem(x))
        both = torch.cat([first, self.side(x)], 1)
        third = self.conv(torch.relu(self.norm(both))) + first
        x = torch.relu(self.mix(torch.cat([both, third], 1)))
        x = torch.relu(self.last_norm(self.last(self.slope(self.grouped(x)))))
        logits: torch.Tensor = self.fc(torch.relu(self.hidden(x.view(x.size(0), -1))))
        return logits


def images(shape: Shape, count: int = 4) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(2))


def alive(model: nn.Module, shape: Shape) -> nn.Module:
    """The model in eval mode, its batch-norms with statistics of images and random scales and offsets."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data = 0.8 + 0.4 * torch.rand(norm.weight.shape, generator=generator)
            norm.bias.data = 0.4 * torch.rand(norm.bias.shape, generator=generator) - 0.1
            norm.momentum = None
            norm.train()
    with torch.no_grad():
        model(images(shape))
    return model.eval()


def made(name: str) -> tuple[nn.Module, Shape]:
    torch.manual_seed(0)
    shape = {"resnet20": CIFAR, "joined": SMALL, "densenet": (3, 32, 32)}.get(name, (3, 48, 48))
    if name == "joined":
        model: nn.Module = Joined()
    elif name == "resnet20":
        model = resnet20()
    elif name == "densenet":
        model = torchvision.models.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=5)
    elif name == "vgg":
        features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 12, "M", 8], batch_norm=True)
        classifier = (nn.Linear(8 * 7 * 7, 24), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(24, 5))
        model = nn.Sequential(features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *classifier)
    else:
        model = getattr(torchvision.models, name)(weights=None, num_classes=5)
    return alive(model, shape), shape


def random_masks(gated: Gated, share: float = 0.3, seed: int = 3) -> list[torch.Tensor]:
    """Masks with about that share of each group at zero, and equally many in each run of a grouped layer."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for group, runs in zip(gated.groups, gated.widths.blocks, strict=True):
        mask = torch.ones(runs, group.channels // runs)
        for run in mask:
            gone = max(1, int(share * len(run)))
            run[torch.randperm(len(run), generator=generator)[:gone]] = 0
        masks.append(mask.flatten())
    return masks


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def in_batch_mode(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return model


NETWORKS = ["resnet20", "joined", "densenet", "vgg", "mobilenet_v2", "resnet18"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_masked_network_is_the_cut_one(name: str) -> None:
    model, shape = made(name)
    gated = Gated(model, shape, batch_norm="running")
    masks, x = random_masks(gated), images(shape)
    plan = gated.plan(masks)
    cut = graph.apply(model, plan, shape)
    assert len(plan.keep_channels) == len(gated.groups) > 3
    with torch.no_grad():
        assert difference(gated.logits(x, gated.whole()), model(x)) < 1e-5
        assert difference(gated.logits(x, masks), cut(x)) < 1e-5
        assert difference(gated.logits(x, masks), model(x)) > 1e-3
    # Masks that ask for gradients act on the inputs, the others on the weights.
    wanted = [mask.requires_grad_() for mask in random_masks(gated)]
    assert difference(gated.logits(x, wanted).detach(), gated.logits(x, masks)) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_the_masked_network_is_the_cut_one_by_batch_statistics(name: str) -> None:
    # Two layouts in memory of one MobileNetV2 differ by 2e-5 here in single precision: statistics of few
    # pixels. So the comparison is in double precision, and all the sharper.
    model, shape = made(name)
    model = model.double()
    gated = Gated(model, shape)
    masks, x = random_masks(gated), images(shape).double()
    cut = in_batch_mode(graph.apply(model, gated.plan(masks), shape))
    with torch.no_grad():
        assert difference(gated.logits(x, masks), cut(x)) < 1e-6
        assert difference(gated.logits(x, gated.whole()), in_batch_mode(model)(x)) < 1e-6


@pytest.mark.parametrize("name", ["resnet20", "joined", "densenet", "mobilenet_v2"])
def test_candidates_are_what_each_changed_mask_gives_alone(name: str) -> None:
    model, shape = made(name)
    gated = Gated(model, shape)
    base, other = random_masks(gated, 0.2), random_masks(gated, 0.5, seed=4)
    order = [*range(len(gated.groups))][::-1]  # the answers come in the order of the questions
    changes = [(group, other[group]) for group in [*order, order[0]]]
    x = images(shape)
    found = gated.candidates(x, base, changes)
    assert found.shape == (len(changes), len(x), gated.logits(x, base).shape[1])
    assert found.dtype == torch.float32
    for logits, (group, mask) in zip(found, changes, strict=True):
        alone = gated.logits(x, [*base[:group], mask, *base[group + 1 :]])
        assert difference(logits, alone) < 1e-6
    assert gated.candidates(x, base, []).shape == (0, *found.shape[1:])


class InPlace(nn.Module):
    """What candidates share is changed behind the layer that tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.right(self.left(x))
        x.mul_(2).sigmoid_()
        logits: torch.Tensor = self.fc((x + y).mean((2, 3)))
        return logits


def test_candidates_do_not_disturb_each_other_where_the_network_works_in_place() -> None:
    torch.manual_seed(0)
    gated = Gated(InPlace().eval(), SMALL)
    left = [group.name for group in gated.groups].index("left")
    masks, mask = gated.whole(), torch.tensor([1.0, 0, 1, 0])
    x = images(SMALL)
    twice = gated.candidates(x, masks, [(left, mask), (left, mask)])
    assert torch.equal(twice[0], twice[1])
    masks[left] = mask
    assert difference(twice[0], gated.logits(x, masks)) < 1e-6


def test_the_gradient_of_a_mask_is_gradient_times_feature_map_summed_over_batch_and_space() -> None:
    model, shape = made("resnet20")
    gated = Gated(model, shape, batch_norm="running")
    masks = [mask.requires_grad_() for mask in gated.whole()]
    x = images(shape)
    torch.autograd.backward(gated.logits(x, masks).square().mean())
    for index, group in enumerate(gated.groups):
        (reader,) = gated.widths.readers(index)
        read: list[torch.Tensor] = []

        def keep(_: nn.Module, given: tuple[torch.Tensor], read: list[torch.Tensor] = read) -> None:
            given[0].retain_grad()
            read.append(given[0])

        hook = model.get_submodule(reader).register_forward_pre_hook(keep)
        torch.autograd.backward(model(x).square().mean())
        hook.remove()
        assert read[0].grad is not None
        expected = (read[0].grad * read[0].detach()).sum((0, 2, 3))
        grad = masks[index].grad
        assert grad is not None and grad.shape == (group.channels,)
        assert difference(grad, expected) < 1e-4


class Line(nn.Module):
    """Three layers small enough to follow by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 1, bias=False)
        self.first.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
        self.norm.bias.data = torch.tensor([1.0, 1.0])
        self.norm.eps = 0.0
        self.fc.weight.data = torch.tensor([[2.0, 3.0]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(torch.relu(self.norm(self.first(x))).mean((2, 3)))
        return logits


def test_at_their_own_place_masks_act_behind_the_batch_norm_and_before_the_activation() -> None:
    x = torch.tensor([3.0, -4.0]).view(2, 1, 1, 1)
    own = Gated(Line().eval(), (1, 1, 1), at="own", batch_norm="running")
    # norm(first(x)) = [[4, -2], [-3, 5]]; through ReLU and the weights 2 and 3: [8, 15].
    (mask,) = masks = [mask.requires_grad_() for mask in own.whole()]
    torch.autograd.backward(own.logits(x, masks).sum())
    assert mask.grad is not None and mask.grad.tolist() == [8.0, 15.0]
    # A negative factor swaps what the ReLU lets through; at the reader it only changes the sign.
    negative = [torch.tensor([-1.0, 1.0])]
    assert own.logits(x, negative).flatten().tolist() == [0.0, 6.0 + 15.0]
    at_readers = Gated(Line().eval(), (1, 1, 1), batch_norm="running")
    assert at_readers.logits(x, negative).flatten().tolist() == [-8.0, 15.0]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "joined"])
def test_at_their_own_place_every_channel_of_every_group_has_a_score(name: str) -> None:
    model, shape = made(name)
    own = Gated(model, shape, at="own")
    with torch.no_grad():
        expected = in_batch_mode(copy.deepcopy(model))(images(shape))
    masks = [mask.requires_grad_() for mask in own.whole()]
    logits = own.logits(images(shape), masks)
    assert difference(logits.detach(), expected) < 1e-4
    torch.autograd.backward(logits.square().sum())
    assert all(mask.grad is not None and mask.grad.abs().max() > 0 for mask in masks)


def test_evaluations_leave_statistics_and_the_given_model_as_they_are() -> None:
    model, shape = made("resnet20")
    before = copy.deepcopy(model.state_dict())
    gated = Gated(model, shape)
    first = gated.logits(images(shape), gated.whole())
    gated.candidates(images(shape), gated.whole(), [(0, torch.zeros(16))])
    gated.logits(5 * images(shape), gated.whole())
    assert torch.equal(gated.logits(images(shape), gated.whole()), first)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_plan_names_only_the_groups_that_lost_a_channel() -> None:
    gated = Gated(made("resnet20")[0], CIFAR)
    masks = gated.whole()
    assert gated.plan(masks) == Plan()
    masks[1][[0, 5]] = 0
    kept = tuple(index for index in range(16) if index not in {0, 5})
    assert gated.plan(masks) == Plan(keep_channels=((gated.groups[1].name, kept),))


def test_masks_that_do_not_fit_are_refused() -> None:
    gated = Gated(made("joined")[0], SMALL)
    with pytest.raises(ValueError, match=r"masks of shapes .*\(6,\).* are needed, one for each group"):
        gated.logits(images(SMALL), gated.whole()[:-1])


def test_bfloat16_answers_in_float32_and_nearly_alike() -> None:
    model, shape = made("resnet20")
    gated, half = Gated(model, shape), Gated(model, shape, autocast=True)
    masks, x = random_masks(gated), images(shape, 8)
    exact, rounded = gated.logits(x, masks), half.logits(x, masks)
    assert rounded.dtype == torch.float32
    assert 0 < difference(rounded, exact) < 0.1
    wanted = [mask.requires_grad_() for mask in masks]
    torch.autograd.backward(half.logits(x, wanted).square().mean())
    assert all(mask.grad is not None and bool(mask.grad.isfinite().all()) for mask in wanted)


# ---------------------------------------------------------------- the map that the masks stand on


def test_the_map_says_where_each_channel_is_read_and_why_groups_are_fixed() -> None:
    widths = graph.width_map(made("joined")[0], SMALL)
    names = [group.name for group in widths.groups]
    assert names == ["stem", "side", "mix", "grouped", "last", "hidden"]
    parts = {(name, part.layer): part for name, own in zip(names, widths.parts, strict=True) for part in own}
    assert parts["side", "mix"].positions == tuple(range(6, 12))
    assert parts["stem", "mix"].positions == (*range(6), *range(12, 18))
    assert parts["stem", "mix"].channels == (*range(6), *range(6))
    assert parts["last", "hidden"].channels == tuple(pixel // 4 for pixel in range(20))
    assert (parts["stem", "mix"].multiplicity, parts["last", "hidden"].multiplicity) == (2, 4)
    assert widths.blocks == (1, 1, 2, 2, 1, 1)
    assert widths.readers(0) == ("conv", "mix")
    assert [(group.name, group.why_not) for group in widths.fixed] == [("fc", "its channels are the classes")]


class GroupedStream(nn.Module):
    """A residual sum of two grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.enter = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
        self.inside, self.leave = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.enter(torch.relu(self.stem(x))))
        logits: torch.Tensor = self.head((x + self.leave(torch.relu(self.inside(x)))).mean((2, 3)))
        return logits


def test_layers_are_tied_that_each_lose_a_filter_with_a_channel() -> None:
    torch.manual_seed(0)
    mobile = graph.width_map(mobilenet_v2().eval(), CIFAR)
    tied = {
        group.name: (len(group.layers), own) for group, own in zip(mobile.groups, mobile.tied, strict=True)
    }
    # A depthwise convolution has no filters of its own to lose; a residual stream has one in each block.
    assert tied["features.0.0"] == tied["features.5.conv.0.0"] == (2, 1)
    assert tied["features.4.conv.2"] == (3, 3)
    assert tied["features.17.conv.2"] == (1, 1)
    grouped = graph.width_map(GroupedStream().eval(), SMALL)
    assert [group.layers for group in grouped.groups] == [("stem",), ("enter", "leave"), ("inside",)]
    assert (grouped.tied, grouped.blocks) == ((1, 2, 1), (2, 2, 2))


def test_a_group_that_a_convolution_reads_one_by_one_is_fixed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 8, 1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    widths = graph.width_map(model, SMALL)
    reasons = {group.name: group.why_not for group in widths.fixed}
    assert reasons["0"] == "grouped convolutions divide it into 4 runs, of which none can lose a channel"
    assert [group.name for group in widths.groups] == ["1"]
