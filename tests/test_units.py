"""Units of depth of all kinds: found, taken out alone and together, and images made smaller."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torchvision.models.densenet import DenseNet

from optpipe import graph, zoo
from optpipe.errors import UsageError
from optpipe.graph.resolution import fixed_size
from optpipe.graph.units import depth_units
from optpipe.types import Block, Plan
from optpipe.zoo.cifar_densenet import CifarDenseNet

CIFAR = (3, 32, 32)
SMALL = (3, 16, 16)


def images(shape: tuple[int, int, int], count: int = 2) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(2))


def alive(model: nn.Module, shape: tuple[int, int, int] = CIFAR) -> nn.Module:
    """The model in eval mode; batch-norms have the data's statistics, random scales and offsets."""
    generator = torch.Generator().manual_seed(1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data = 0.8 + 0.4 * torch.rand(norm.weight.shape, generator=generator)
        norm.bias.data = 0.4 * torch.rand(norm.bias.shape, generator=generator) - 0.1
        norm.momentum = None
    with torch.no_grad():
        model.train()(images(shape, 4))
    return model.eval()


def units(model: nn.Module, shape: tuple[int, int, int] = CIFAR) -> list[Block]:
    return [unit.block for unit in depth_units(graph.trace(model, shape))]


def difference(a: nn.Module, b: nn.Module, shape: tuple[int, int, int]) -> float:
    """Largest difference of logits relative to the largest logit."""
    x = images(shape)
    with torch.no_grad():
        first, second = a.eval()(x), b.eval()(x)
    return float((first - second).abs().max() / second.abs().max())


def silenced(model: nn.Module, reads: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of the network in which these layers read zeros in place of these input channels."""
    masked = copy.deepcopy(model)
    for path, gone in reads.items():

        def silence(_: nn.Module, given: tuple[torch.Tensor], gone: Sequence[int] = gone) -> torch.Tensor:
            x = given[0].clone()
            x[:, list(gone)] = 0
            return x

        masked.get_submodule(path).register_forward_pre_hook(silence)
    return masked


def skipping(model: nn.Module, *paths: str) -> nn.Module:
    """A copy of the network in which these layers do nothing."""
    shorter = copy.deepcopy(model)
    for path in paths:
        shorter.set_submodule(path, nn.Identity())
    return shorter


def small_densenet() -> nn.Module:
    """torchvision's DenseNet with two dense blocks: 16 maps, 2 layers of 8, 16 maps, 3 layers of 8."""
    torch.manual_seed(0)
    return alive(DenseNet(8, (2, 3), 16, bn_size=2, num_classes=10))


def small_cifar_densenet() -> nn.Module:
    """The zoo's with blocks of 3 layers of 4: widths 16, 28, 40, 52."""
    torch.manual_seed(0)
    return alive(CifarDenseNet(3, 4, 10, 3))


def vgg() -> nn.Module:
    torch.manual_seed(0)
    return alive(zoo.build("vgg11_cifar"))


# ---------------------------------------------------------------- finding


@pytest.mark.parametrize(
    ("name", "kind", "count", "first", "last"),
    [
        pytest.param("densenet121", "dense", 58, "features.denseblock1.denselayer1",
                     "features.denseblock4.denselayer16", marks=pytest.mark.slow),
        ("resnet18", "residual", 8, "layer1.0", "layer4.1"),
        ("efficientnet_b0", "residual", 9, "features.2.1", "features.6.3"),
        ("mobilenet_v2", "residual", 10, "features.3", "features.16"),
        ("shufflenet_v2_x0_5", None, 0, None, None),
        ("squeezenet1_1", None, 0, None, None),
        pytest.param("vgg16", "plain", 9, "features.2", "features.28", marks=pytest.mark.slow),
        pytest.param("vgg16_bn", "plain", 9, "features.3", "features.40", marks=pytest.mark.slow),
        pytest.param("vgg11", "plain", 4, "features.8", "features.18", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_units_of_torchvision_models_are_of_one_kind(
    name: str, kind: str | None, count: int, first: str | None, last: str | None
) -> None:
    found = units(getattr(torchvision.models, name)(weights=None), (3, 64, 64))
    assert {block.kind for block in found} == ({kind} if kind else set())
    assert len({block.name for block in found}) == len(found) == count
    if found:
        assert (found[0].name, found[-1].name) == (first, last)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("resnet20_cifar", "residual", 9),
        ("mobilenet_v2_cifar", "residual", 10),
        ("densenet40_cifar", "dense", 36),
        ("vgg11_cifar", "plain", 4),
        ("vgg16_cifar", "plain", 9),
    ],
)
def test_the_units_of_the_zoos_networks_are_of_one_kind(name: str, kind: str, count: int) -> None:
    found = units(zoo.build(name))
    assert [block.kind for block in found] == [kind] * count


def test_a_dense_layer_reports_the_stream_before_and_after_it() -> None:
    found = units(small_densenet())
    assert [block.name for block in found] == [
        "features.denseblock1.denselayer1",
        "features.denseblock1.denselayer2",
        *(f"features.denseblock2.denselayer{i}" for i in (1, 2, 3)),
    ]
    second = found[1]
    assert (second.input_shape, second.output_shape) == ((24, 8, 8), (32, 8, 8))
    assert second.parameters == 2 * 24 + 24 * 16 + 2 * 16 + 16 * 8 * 9
    assert second.macs == (24 * 16 + 16 * 8 * 9) * 8 * 8
    assert all(block.droppable for block in found)


def test_a_plain_unit_reports_its_convolution_and_batch_norm() -> None:
    found = units(zoo.build("vgg11_cifar"))
    assert [block.name for block in found] == ["features.11", "features.18", "features.22", "features.25"]
    assert found[0].input_shape == found[0].output_shape == (256, 8, 8)
    assert found[0].parameters == 256 * 256 * 9 + 2 * 256
    assert found[0].macs == 256 * 256 * 9 * 64
    assert found[0].droppable


def test_inspect_lists_all_units_and_droppable_holds_residual_blocks_alone() -> None:
    found = graph.inspect(small_cifar_densenet(), CIFAR)
    assert [block.name for block in found.units] == [f"block{i}.{j}" for i in (1, 2, 3) for j in range(3)]
    assert found.droppable == ()


class Mixed(nn.Module):
    """Plain units, a residual block and two dense layers, one spelled new features first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.plain1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.plain2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 1)
        self.block, self.norm3 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.dense1, self.keep = nn.Conv2d(16, 4, 3, padding=1), nn.Dropout(0.5)
        self.dense2, self.norm4 = nn.Conv2d(20, 4, 3, padding=1), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        x = F.silu(self.norm1(self.plain1(x)))
        x = F.silu(self.norm2(self.plain2(x)))
        x = F.relu(self.wide(F.max_pool2d(x, 2)))
        x = F.relu(x + self.norm3(self.block(x)))
        x = torch.cat((x, self.keep(F.relu(self.dense1(x)))), dim=1)
        x = torch.concat([self.keep(F.relu(self.dense2(x))), x], -3)
        x = F.relu(self.norm4(x))
        logits: torch.Tensor = self.fc(F.adaptive_avg_pool2d(x, 2).view(x.size(0), -1))
        return logits


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return alive(Mixed(), SMALL)


def test_all_kinds_are_found_in_one_network_in_execution_order() -> None:
    assert [(b.name, b.kind, b.droppable) for b in units(mixed(), SMALL)] == [
        ("plain1", "plain", True),
        ("plain2", "plain", True),
        ("add", "residual", True),
        ("dense1", "dense", True),
        ("dense2", "dense", True),
    ]


def conv3x3(channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=groups)


class NotPlain(nn.Module):
    """Convolutions that keep the shape, and none of them a plain unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.pointwise = conv3x3(8), conv3x3(8, groups=8), nn.Conv2d(8, 8, 1)
        self.twice, self.linear, self.gate = conv3x3(8), conv3x3(8), conv3x3(8)
        self.tied, self.branch, self.last = conv3x3(8), conv3x3(8), conv3x3(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.pointwise(F.relu(self.depthwise(x))))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        x = self.linear(x)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = F.relu(self.tied(x))
        x = x + F.relu(self.branch(x))
        return F.relu(self.last(x)).mean((2, 3))


def test_stems_separable_shared_linear_gating_tied_and_last_convolutions_are_no_plain_units() -> None:
    assert [(block.name, block.kind) for block in units(NotPlain(), (8, 8, 8))] == [("branch", "residual")]


class NotDroppable(nn.Module):
    """Dense layers whose features go elsewhere, meet others, or are read group by group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.read, self.side = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 12, 1)
        self.met, self.other = nn.Conv2d(12, 4, 1), nn.Conv2d(3, 16, 1)
        self.runs, self.grouped = nn.Conv2d(16, 4, 1), nn.Conv2d(20, 10, 1, groups=5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = x
        x = self.stem(x)
        features = self.read(x)
        x = torch.cat([x, features], 1) * torch.sigmoid(self.side(features))
        x = torch.cat([x, self.met(x)], 1) - self.other(image)
        x = self.grouped(torch.cat([x, self.runs(x)], 1))
        return x.mean((2, 3))


def test_dense_layers_that_cannot_be_dropped_say_why() -> None:
    found = {block.name: block.why_not for block in units(NotDroppable(), (3, 8, 8))}
    assert found == {
        "read": "its features are read by side too",
        "met": "its features meet others in sub",
        "runs": "its features pass through grouped, where single channels are not followed",
    }
    with pytest.raises(UsageError, match="'met' cannot be dropped: its features meet others in sub"):
        graph.apply(NotDroppable(), Plan(drop_blocks=("met",)), (3, 8, 8))


# ---------------------------------------------------------------- dropping


# dropped layers, {layer: input channels that it reads no more}
DENSE = [
    (
        ["features.denseblock1.denselayer1"],
        {"features.denseblock1.denselayer2.conv1": range(16, 24), "features.transition1.conv": range(16, 24)},
    ),
    (
        ["features.denseblock2.denselayer2"],
        {"features.denseblock2.denselayer3.conv1": range(24, 32), "classifier": range(24, 32)},
    ),
    (
        [f"features.denseblock{i}.denselayer{j}" for i, j in ((1, 2), (2, 1), (2, 3))],
        {
            "features.transition1.conv": range(24, 32),
            "features.denseblock2.denselayer2.conv1": range(16, 24),
            "classifier": [*range(16, 24), *range(32, 40)],
        },
    ),
    (
        [f"features.denseblock{i}.denselayer{j}" for i, n in ((1, 2), (2, 3)) for j in range(1, n + 1)],
        {"features.transition1.conv": range(16, 32), "classifier": range(16, 40)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("names", "reads"), DENSE, ids=["first", "middle", "across", "all"])
def test_without_dense_layers_their_channels_are_gone_where_they_were_read(
    names: list[str], reads: dict[str, Sequence[int]]
) -> None:
    model = small_densenet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    candidate = graph.apply(model, Plan(drop_blocks=tuple(names)), CIFAR)
    assert difference(candidate, silenced(model, reads), CIFAR) < 1e-5
    assert difference(candidate, model, CIFAR) > 1e-3
    left = [key for key in before if not any(key.startswith(f"{name}.") for name in names)]
    assert list(candidate.state_dict()) == left
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for path, gone in reads.items():
        layer = candidate.get_submodule(path)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert layer.weight.shape[1] == before[f"{path}.weight"].shape[1] - len(gone)


def test_a_concatenation_of_one_map_is_that_map() -> None:
    model = small_cifar_densenet()
    names = tuple(f"block{i}.{j}" for i in (1, 2, 3) for j in range(3))
    candidate = graph.apply(model, Plan(drop_blocks=names), CIFAR)
    assert not [node for node in candidate.graph.nodes if node.target is torch.cat]
    reads = {"transition1.conv": range(16, 28), "transition2.conv": range(28, 40), "linear": range(40, 52)}
    assert difference(candidate, silenced(model, reads), CIFAR) < 1e-5


@pytest.mark.parametrize("names", [("features.11",), ("features.18", "features.22", "features.25")])
def test_without_plain_units_what_they_read_is_handed_on(names: tuple[str, ...]) -> None:
    model = vgg()
    candidate = graph.apply(model, Plan(drop_blocks=names), CIFAR)
    gone = [f"features.{int(name.split('.')[1]) + i}" for name in names for i in range(3)]
    assert difference(candidate, skipping(model, *gone), CIFAR) < 1e-6
    assert list(candidate.state_dict()) == [
        key for key in model.state_dict() if key.rpartition(".")[0] not in gone
    ]


def test_units_of_all_kinds_go_together() -> None:
    model = mixed()
    names = tuple(block.name for block in units(model, SMALL))
    candidate = graph.apply(model, Plan(drop_blocks=names), SMALL)
    part, x = model.get_submodule, images(SMALL)
    with torch.no_grad():
        wide = F.relu(part("wide")(F.max_pool2d(torch.tanh(part("stem")(x)), 2)))
        # The last concatenation is (dense2, stream, dense1).
        last = F.relu(part("norm4")(torch.cat([wide[:, :4], wide, wide[:, :4]], 1)))
        last[:, :4] = last[:, 20:] = 0
        expected = part("fc")(F.adaptive_avg_pool2d(last, 2).flatten(1))
        assert torch.allclose(candidate(x), expected, rtol=1e-4, atol=1e-5)
    assert not [block for block in units(candidate, SMALL) if block.droppable]


class Nested(nn.Module):
    """A dense layer in a residual block's branch; a residual block that makes a dense layer's features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(12, 8, 1)
        self.outer, self.block, self.fc = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.back(F.relu(torch.cat([x, self.inner(x)], 1)))
        y = self.outer(x)
        x = torch.cat([x, y + self.block(F.relu(y))], 1)
        logits: torch.Tensor = self.fc(F.relu(x).mean((2, 3)))
        return logits


def test_a_unit_inside_of_another_goes_with_it() -> None:
    torch.manual_seed(0)
    model = Nested().eval()
    assert [(b.name, b.kind) for b in units(model, SMALL)] == [
        ("inner", "dense"),
        ("add", "residual"),
        ("block", "residual"),
        ("add_1", "dense"),
    ]

    def without(*names: str) -> fx.GraphModule:
        return graph.apply(model, Plan(drop_blocks=names), SMALL)

    assert difference(without("inner", "add"), without("add"), SMALL) == 0
    assert difference(without("block", "add_1"), without("add_1"), SMALL) == 0
    assert difference(without("inner"), silenced(model, {"back": range(8, 12)}), SMALL) < 1e-5
    assert difference(without("add_1"), silenced(model, {"fc": range(8, 12)}), SMALL) < 1e-5
    both = without("inner", "add", "block", "add_1")
    assert [name for name, m in both.named_modules() if isinstance(m, nn.Conv2d)] == ["stem"]


def test_channels_go_with_dense_layers_and_a_dropped_layers_entry_changes_nothing() -> None:
    model = small_cifar_densenet()
    drops = ("block1.1", "block3.0")
    # Widths: block 1 is (16, 4, [4], 4), block 3 (40, [4], 4, 4).
    keep = (("block1.0.conv", (0, 2)), ("block1.1.conv", (1,)), ("block3.1.conv", (1, 2, 3)))
    candidate = graph.apply(model, Plan(drop_blocks=drops, keep_channels=keep), CIFAR)
    reads = {
        "block1.2.conv": [17, 19, *range(20, 24)],
        "transition1.conv": [17, 19, *range(20, 24)],
        "block3.1.conv": list(range(40, 44)),
        "block3.2.conv": [*range(40, 44), 44],
        "linear": [*range(40, 44), 44],
    }
    assert difference(candidate, silenced(model, reads), CIFAR) < 1e-5
    without = Plan(drop_blocks=drops, keep_channels=(keep[0], keep[2]))
    same = graph.apply(model, without, CIFAR)
    assert difference(candidate, same, CIFAR) == 0
    assert graph.structure_key(candidate, CIFAR, 1) == graph.structure_key(same, CIFAR, 1)


def test_channels_go_with_plain_units_and_a_dropped_units_entry_changes_nothing() -> None:
    model = vgg()
    half = tuple(range(0, 256, 2))
    keep = (("features.8", half), ("features.11", (0, 1)), ("features.18", tuple(range(500))))
    plan = Plan(drop_blocks=("features.11", "features.22"), keep_channels=keep)
    candidate = graph.apply(model, plan, CIFAR)
    shorter = skipping(model, *(f"features.{i}" for i in (11, 12, 13, 22, 23, 24)))
    reference = silenced(shorter, {"features.15": range(1, 256, 2), "features.25": range(500, 512)})
    assert difference(candidate, reference, CIFAR) < 1e-5
    with pytest.raises(UsageError, match=r"'features.11' has no channel 256"):
        graph.apply(
            model, Plan(drop_blocks=("features.11",), keep_channels=(("features.11", (0, 256)),)), CIFAR
        )


def test_equal_units_of_one_stage_give_one_structure() -> None:
    model = vgg()

    def key(name: str) -> str:
        return graph.structure_key(graph.apply(model, Plan(drop_blocks=(name,)), CIFAR), CIFAR, 1)

    assert key("features.22") == key("features.25") != key("features.18")


def test_a_candidate_without_dense_layers_is_traced_and_cut_again() -> None:
    model = small_densenet()
    first = graph.apply(model, Plan(drop_blocks=("features.denseblock1.denselayer1",)), CIFAR)
    assert len(units(first)) == 4
    second = graph.apply(first, Plan(drop_blocks=("features.denseblock2.denselayer2",)), CIFAR)
    both = Plan(drop_blocks=("features.denseblock1.denselayer1", "features.denseblock2.denselayer2"))
    assert difference(second, graph.apply(model, both, CIFAR), CIFAR) < 1e-6


def test_adaptors_are_for_residual_blocks_alone() -> None:
    with pytest.raises(UsageError, match="no residual block is named 'dense1'; did you mean 'add'"):
        graph.with_adaptors(mixed(), Plan(drop_blocks=("dense1",)), SMALL)
    with pytest.raises(UsageError, match=r"no unit of depth is named 'dense3'; did you mean 'dense\d'"):
        graph.apply(mixed(), Plan(drop_blocks=("dense3",)), SMALL)


# ---------------------------------------------------------------- the size of the images


def test_a_plan_makes_images_smaller() -> None:
    assert graph.image_shape(Plan(), CIFAR) == CIFAR
    assert graph.image_shape(Plan(input_hw=(24, 20)), CIFAR) == (3, 24, 20)


@pytest.mark.parametrize("size", [(0, 16), (16, 0), (33, 32), (16, 64)])
def test_a_size_below_a_pixel_or_above_the_originals_is_refused(size: tuple[int, int]) -> None:
    message = f"input_hw is {size[0]}x{size[1]}; it must lie between 1x1 and the original's 32x32"
    with pytest.raises(UsageError, match=message):
        graph.apply(zoo.build("resnet20_cifar"), Plan(input_hw=size), CIFAR)


@pytest.mark.parametrize(
    ("name", "size", "macs"),
    [
        ("resnet20_cifar", (24, 24), 0.5625),
        ("vgg11_cifar", (16, 16), 0.25),
        ("densenet40_cifar", (20, 28), 0.546875),
    ],
)
def test_a_candidate_of_smaller_images_has_the_originals_weights(
    name: str, size: tuple[int, int], macs: float
) -> None:
    model = zoo.build(name).eval()
    candidate = graph.apply(model, Plan(input_hw=size), CIFAR)
    assert difference(candidate, model, (3, *size)) < 1e-6
    parameters, before = graph.count(graph.trace(model, CIFAR), CIFAR)
    found = graph.count(candidate, (3, *size))
    assert found[0] == parameters
    assert found[1] / before == pytest.approx(macs, abs=2e-3)


def test_depth_width_and_resolution_go_together() -> None:
    model = small_cifar_densenet()
    plan = Plan(("block2.1",), (("block1.0.conv", (0, 1)),), (24, 24))
    candidate = graph.apply(model, plan, CIFAR)
    larger = graph.apply(model, Plan(plan.drop_blocks, plan.keep_channels), CIFAR)
    assert difference(candidate, larger, (3, 24, 24)) == 0


class Headed(nn.Module):
    """A convolution, four poolings' worth of stride, and a head of some kind."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head, self.conv = head, nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.pool = nn.AvgPool2d(8)
        self.fc = nn.Linear(8 * (64 if head == "flattened" else 1), 5)
        self.unshuffled = nn.Conv2d(3 * 64, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.head == "multiples":
            x = self.unshuffled(F.pixel_unshuffle(x, 8))
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]
        x = F.relu(self.conv(x))
        if self.head == "flattened":
            return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]
        if self.head == "pooled":
            return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]
        if self.head == "spread":  # a smaller image makes fewer logits, and no error
            return x.reshape(1, -1)[:, ::64]
        return self.fc(F.avg_pool2d(x, x.size()[3]).view(x.size(0), -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("flattened", r"^an image of 24x24 fails at fc: .*mat1 and mat2 shapes cannot be multiplied"),
        ("pooled", r"^an image of 24x24 fails at pool: "),
        ("spread", r"^an image of 24x24 fails at the output: it gives \(1, 5\), not \(1, 8\)$"),
    ],
)
def test_a_network_tied_to_its_size_names_the_layer(head: str, reason: str) -> None:
    found = graph.inspect(Headed(head), CIFAR)
    assert re.search(reason, found.fixed_size)
    with pytest.raises(UsageError, match=r"Headed takes no image of 24x24: at "):
        graph.apply(Headed(head), Plan(input_hw=(24, 24)), CIFAR)


def test_networks_that_pool_globally_take_smaller_images() -> None:
    assert graph.inspect(Headed("global"), CIFAR).fixed_size == ""
    for name in ("resnet20_cifar", "densenet40_cifar", "vgg11_cifar"):
        traced = graph.trace(zoo.build(name), CIFAR)
        shapes = [node.meta.get("shape") for node in traced.graph.nodes]
        assert fixed_size(traced, CIFAR) == ""
        assert [node.meta.get("shape") for node in traced.graph.nodes] == shapes


def test_a_network_that_takes_multiples_alone_takes_smaller_images_and_refuses_others_one_by_one() -> None:
    model, shape = Headed("multiples"), (3, 40, 40)
    assert graph.inspect(model, shape).fixed_size == ""
    graph.apply(model, Plan(input_hw=(32, 24)), shape)
    with pytest.raises(UsageError, match="takes no image of 30x30: at pixel_unshuffle"):
        graph.apply(model, Plan(input_hw=(30, 30)), shape)


def test_of_many_sizes_those_that_a_network_takes_are_found_one_by_one() -> None:
    heights = [(size, size) for size in range(31, 0, -1)]
    pooling = graph.sizes_taken(zoo.build("vgg11_cifar"), CIFAR, heights)  # four poolings by 2
    assert pooling == tuple((size, size) for size in range(31, 15, -1))
    stepping = graph.sizes_taken(Headed("multiples"), (3, 40, 40), [(32, 24), (30, 24), (24, 20), (8, 8)])
    assert stepping == ((32, 24), (8, 8))
    assert graph.sizes_taken(Headed("flattened"), CIFAR, heights[3:]) == ()


@pytest.mark.slow
def test_torchvisions_vgg_takes_smaller_images() -> None:
    assert graph.inspect(torchvision.models.vgg11(weights=None), (3, 64, 64)).fixed_size == ""


# ---------------------------------------------------------------- widths of the new networks


@pytest.mark.parametrize("name", ["vgg11_cifar", "densenet40_cifar"])
def test_every_convolution_of_the_new_networks_can_be_narrowed(name: str) -> None:
    model = zoo.build(name)
    widths = graph.width_map(model, CIFAR)
    convolutions = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {path for group in widths.groups for path in group.layers} == convolutions
    assert [group.why_not for group in widths.fixed] == ["its channels are the classes"]


def test_masks_and_costs_agree_with_the_cut_densenet() -> None:
    model = small_cifar_densenet()
    gated = graph.Gated(model, CIFAR, batch_norm="running")
    masks = gated.whole()
    for mask in masks[::2]:
        mask[1::2] = 0
    candidate = graph.apply(model, gated.plan(masks), CIFAR)
    x = images(CIFAR)
    with torch.no_grad():
        assert torch.allclose(gated.logits(x, masks), candidate(x), rtol=1e-4, atol=1e-5)
    costs = graph.Costs(model, CIFAR)
    assert costs.of([int(mask.sum()) for mask in masks]) == graph.count(candidate, CIFAR)


def test_a_traced_network_stays_as_it_is_where_its_units_are_found() -> None:
    traced: fx.GraphModule = graph.trace(small_densenet(), CIFAR)
    code = traced.code
    depth_units(traced)
    assert traced.code == code
