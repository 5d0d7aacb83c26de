"""Blocks, surgery, splitting and the structure key, on small networks and on torchvision's."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from optpipe import graph
from optpipe.errors import UsageError
from optpipe.types import Block, Plan

CIFAR = (3, 32, 32)
IMAGENET = (3, 224, 224)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut skips pixels and pads channels, so it has no parameters."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.pad = stride, (outside - inside) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        y += x
        return F.relu(y)


class CifarNet(nn.Module):
    """A CIFAR ResNet of 6n+2 layers with parameter-free shortcuts."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(CifarBlock(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(CifarBlock(16, 32, 2), *(CifarBlock(32, 32, 1) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(CifarBlock(32, 64, 2), *(CifarBlock(64, 64, 1) for _ in range(n - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        x = F.avg_pool2d(x, x.size()[3])
        logits: torch.Tensor = self.linear(x.view(x.size(0), -1))
        return logits


def randomised(model: nn.Module, size: int = 32) -> nn.Module:
    """The model in eval mode, its batch-norms set to data and to random scales.

    Without this, signals die out in a deep network with random weights, and no test would see an error.
    """
    norms = [m for m in model.eval().modules() if isinstance(m, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(1)
    for norm in norms:
        norm.weight.data = 0.8 + 0.4 * torch.rand(norm.weight.shape, generator=generator)
        norm.bias.data = 0.2 * torch.rand(norm.bias.shape, generator=generator)
        norm.momentum = None
        norm.train()
    if norms:
        with torch.no_grad():
            model(images((3, size, size), 8))
    return model.eval()


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    assert isinstance(model, nn.Module)
    return randomised(model, 64)


def cifar_net(n: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return randomised(CifarNet(n))


def images(shape: tuple[int, int, int], count: int = 2) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(2))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def without(*names: str) -> Plan:
    return Plan(drop_blocks=names)


def blocks(model: nn.Module, shape: tuple[int, int, int]) -> tuple[Block, ...]:
    return graph.inspect(model, shape).blocks


# (model, units of depth, droppable residual blocks, name of the first of these)
FOUND = [
    ("resnet18", 8, 5, "layer1.0"),
    ("resnet34", 16, 13, "layer1.0"),
    ("resnet50", 16, 12, "layer1.1"),
    ("mobilenet_v2", 10, 10, "features.3"),
    ("mobilenet_v3_small", 6, 6, "features.3"),
    ("mobilenet_v3_large", 10, 10, "features.1"),
    ("efficientnet_b0", 9, 9, "features.2.1"),
    ("regnet_y_400mf", 16, 12, "trunk_output.block2.block2-1"),
    ("convnext_tiny", 18, 18, "features.1.0"),
    ("vgg11", 4, 0, None),
    ("densenet121", 58, 0, None),
]


@pytest.mark.parametrize(
    ("name", "total", "droppable", "first"),
    [
        pytest.param(*row, marks=() if row[0] in {"resnet18", "mobilenet_v3_small"} else pytest.mark.slow)
        for row in FOUND
    ],
)
def test_inspect_finds_the_residual_blocks_of_torchvision_models(
    name: str, total: int, droppable: int, first: str | None
) -> None:
    model = torchvision_model(name)
    found = graph.inspect(model, IMAGENET)
    assert len(found.blocks) == total
    assert len(found.droppable) == droppable
    assert next((block.name for block in found.droppable), None) == first
    assert len({block.name for block in found.blocks}) == total
    assert found.classes == 1000
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.groups


def test_paper_counts_twelve_of_resnet34_and_layer1_0_is_the_thirteenth() -> None:
    names = [b.name for b in blocks(torchvision_model("resnet34"), IMAGENET) if b.droppable]
    sizes = {1: 3, 2: 4, 3: 6, 4: 3}
    paper = [f"layer{stage}.{i}" for stage, n in sizes.items() for i in range(1, n)]
    assert len(paper) == 12
    assert names == ["layer1.0", *paper]


@pytest.mark.parametrize(("n", "total", "droppable"), [(3, 9, 7), (9, 27, 25)])
def test_padded_shortcuts_change_the_shape_and_all_other_cifar_blocks_are_droppable(
    n: int, total: int, droppable: int
) -> None:
    found = graph.inspect(cifar_net(n), CIFAR)
    assert (len(found.blocks), len(found.droppable)) == (total, droppable)
    kept = {b.name: b.why_not for b in found.blocks if not b.droppable}
    assert kept == {
        "layer2.0": "changes the shape (16, 32, 32) -> (32, 16, 16)",
        "layer3.0": "changes the shape (32, 16, 16) -> (64, 8, 8)",
    }


def test_a_block_reports_its_shapes_parameters_and_macs() -> None:
    block = blocks(cifar_net(), CIFAR)[1]
    assert block.name == "layer1.1"
    assert block.input_shape == block.output_shape == (16, 32, 32)
    assert block.parameters == 2 * 16 * 16 * 9 + 2 * 2 * 16
    assert block.macs == 2 * 16 * 16 * 9 * 32 * 32


def test_count_gives_parameters_and_macs_of_conv_and_linear() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    traced = graph.trace(model, (3, 8, 8))
    assert graph.count(traced, (3, 8, 8)) == (3 * 8 * 9 + 8 + 8 * 16 * 5 + 5, 8 * 16 * 27 + 8 * 16 * 5)
    resnet = graph.trace(torchvision_model("resnet18"), IMAGENET)
    assert graph.count(resnet, IMAGENET) == (11689512, 1814073344)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.stem, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.add(self.a(x), self.b(x))
        x = x + self.first(x) * torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = self.second(x).add_(x)
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_projection_shortcuts_are_named_and_all_spellings_of_add_are_seen() -> None:
    first, second, third = blocks(Projected(), (3, 8, 8))
    assert not first.droppable
    assert first.why_not == "its shortcut is a projection"
    assert (second.name, second.droppable) == ("first", True)
    assert (third.name, third.droppable) == ("second", True)


class Chunked(nn.Module):
    """Branches through a tuple: one beside a projection, one of which a half goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.side = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 1)
        self.b, self.c, self.fc = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        first, second = self.a(x).chunk(2, 1)
        x = first * second + self.side(x)
        first, second = self.b(x).chunk(2, 1)
        x = x + (first * second).reshape(x.size(0), x.size(1), 8, 8)
        first, second = self.c(x).split(4, 1)
        x = torch.cat([x + first, second], 1)
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_branches_are_followed_through_tuples_and_must_end_in_the_add() -> None:
    assert [(b.name, b.why_not) for b in blocks(Chunked(), (3, 8, 8))] == [
        ("add", "its shortcut is a projection"),
        ("b", ""),
        ("c", "a part of its branch is used elsewhere too"),
    ]
    backbone, head = graph.split(graph.trace(Chunked(), (3, 8, 8)))
    assert head(backbone(images((3, 8, 8)))).shape == (2, 2)


class NoResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)
        self.gate = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y = y * (F.relu6(y + 3) / 6)
        squeezed = self.b(F.adaptive_avg_pool2d(y, 1))
        y = y + squeezed
        pooled = y.mean((2, 3))
        logits: torch.Tensor = pooled + self.gate(pooled)
        return logits


def test_adds_of_gates_constants_and_vectors_are_no_blocks() -> None:
    assert blocks(NoResidual(), (3, 8, 8)) == ()


# ---------------------------------------------------------------- dropping


def branch_at_zero(model: nn.Module, name: str) -> nn.Module:
    """A copy of a network whose named block ends in a batch-norm that gives 0."""
    silent = copy.deepcopy(model)
    block = silent.get_submodule(name)
    last = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return silent


@pytest.mark.parametrize("name", ["layer1.0", "layer1.2", "layer2.1", "layer3.2"])
def test_a_dropped_block_equals_its_branch_at_zero(name: str) -> None:
    model = cifar_net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    candidate = graph.apply(model, without(name), CIFAR)
    x = images(CIFAR)
    with torch.no_grad():
        assert difference(candidate(x), branch_at_zero(model, name)(x)) < 1e-6
        assert difference(candidate(x), model(x)) > 1e-3
    assert [k for k in before if not k.startswith(f"{name}.")] == list(candidate.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", [row[0] for row in FOUND if row[2] and row[0] != "convnext_tiny"])
def test_every_droppable_torchvision_block_equals_its_branch_at_zero(name: str) -> None:
    model, x = torchvision_model(name), images(IMAGENET)
    for block in graph.inspect(model, IMAGENET).droppable:
        candidate = graph.apply(model, without(block.name), IMAGENET)
        with torch.no_grad():
            assert difference(candidate(x), branch_at_zero(model, block.name)(x)) < 1e-5, block.name
        left = [k for k in model.state_dict() if not k.startswith(f"{block.name}.")]
        assert left == list(candidate.state_dict()), block.name


@pytest.mark.slow
def test_a_dropped_convnext_block_takes_its_layer_scale_along() -> None:
    model, x = torchvision_model("convnext_tiny"), images(IMAGENET)
    for name in ("features.1.0", "features.5.4", "features.7.2"):
        candidate = graph.apply(model, without(name), IMAGENET)
        silent = copy.deepcopy(model)
        nn.init.zeros_(silent.get_parameter(f"{name}.layer_scale"))
        with torch.no_grad():
            assert difference(candidate(x), silent(x)) < 1e-5
        assert [k for k in model.state_dict() if not k.startswith(f"{name}.")] == list(candidate.state_dict())


def relus(module: fx.GraphModule) -> int:
    return sum(
        node.target is F.relu or isinstance(module_called(module, node), nn.ReLU)
        for node in module.graph.nodes
    )


def module_called(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def test_no_relu_of_a_relu_is_left_even_past_max_pooling_and_over_several_blocks() -> None:
    model = torchvision_model("resnet18")
    whole = relus(graph.trace(model, IMAGENET))
    for names in (("layer1.0",), ("layer1.1",), ("layer1.0", "layer1.1"), ("layer2.1", "layer3.1")):
        candidate = graph.apply(model, without(*names), IMAGENET)
        assert relus(candidate) == whole - 2 * len(names)
        silent = model
        for name in names:
            silent = branch_at_zero(silent, name)
        x = images(IMAGENET, 1)
        with torch.no_grad():
            assert difference(candidate(x), silent(x)) < 1e-6


class Capped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(10 * x))
        x = F.relu6(x + self.conv(x))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_a_relu6_after_a_relu_stays() -> None:
    model = Capped()
    candidate = graph.apply(model, without("conv"), (3, 4, 4))
    assert any(node.target is F.relu6 for node in candidate.graph.nodes)


def test_all_blocks_of_a_stage_can_go_at_once() -> None:
    model = cifar_net()
    names = [b.name for b in blocks(model, CIFAR) if b.droppable]
    candidate = graph.apply(model, without(*names), CIFAR)
    silent = model
    for name in names:
        silent = branch_at_zero(silent, name)
    x = images(CIFAR)
    with torch.no_grad():
        assert difference(candidate(x), silent(x)) < 1e-6
    assert blocks(candidate, CIFAR)
    assert not [b for b in blocks(candidate, CIFAR) if b.droppable]


class InPlace(nn.Module):
    """A stream that a SiLU would overwrite once the block before it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.side = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act, self.fc = nn.SiLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = self.stem(x)
        y = self.act(stream + self.conv(stream))
        logits: torch.Tensor = self.fc((y * self.side(stream)).mean((2, 3)))
        return logits


def test_an_in_place_activation_does_not_overwrite_the_stream_of_a_dropped_block() -> None:
    model = InPlace().eval()
    candidate = graph.apply(model, without("conv"), (3, 4, 4))
    silent = copy.deepcopy(model)
    nn.init.zeros_(silent.conv.weight)
    assert silent.conv.bias is not None
    nn.init.zeros_(silent.conv.bias)
    x = images((3, 4, 4))
    with torch.no_grad():
        assert difference(candidate(x), silent(x)) < 1e-6


def test_the_empty_plan_gives_the_original() -> None:
    model, x = cifar_net(), images(CIFAR)
    candidate = graph.apply(model, Plan(), CIFAR)
    with torch.no_grad():
        assert torch.equal(candidate(x), model(x))
    assert list(candidate.state_dict()) == list(model.state_dict())


def test_stochastic_depth_and_functional_dropout_stay_silent_in_train_mode() -> None:
    candidate = graph.trace(torchvision_model("efficientnet_b0"), (3, 64, 64))
    assert not [node for node in candidate.graph.nodes if "stochastic" in node.name]
    x = images((3, 64, 64))
    for module in candidate.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(candidate)(x), copy.deepcopy(candidate)(x))


# ---------------------------------------------------------------- splitting


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("resnet18", (512, 2, 2)),
        ("mobilenet_v2", (1280, 2, 2)),
        ("mobilenet_v3_small", (576, 2, 2)),
        ("regnet_y_400mf", (440, 2, 2)),
        ("convnext_tiny", (768, 2, 2)),
        ("vgg11", (512, 7, 7)),
        ("densenet121", (1024, 2, 2)),
    ],
)
def test_backbone_then_head_is_the_model(name: str, features: tuple[int, ...]) -> None:
    shape = (3, 64, 64)
    traced = graph.trace(torchvision_model(name), shape)
    backbone, head = graph.split(traced)
    x = images(shape)
    with torch.no_grad():
        middle = backbone(x)
        assert middle.shape == (2, *features)
        assert torch.equal(head(middle), traced(x))
    ours = {id(p) for p in (*backbone.parameters(), *head.parameters())}
    assert ours == {id(p) for p in traced.parameters()}


def test_training_the_backbone_trains_the_model() -> None:
    candidate = graph.apply(cifar_net(), without("layer1.1"), CIFAR)
    backbone, head = graph.split(candidate)
    x = images(CIFAR)
    before = candidate(x).detach()
    backbone(x).square().mean().backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    assert not torch.equal(candidate(x), before)
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]
    assert not any(name.startswith("linear") for name, _ in backbone.named_parameters())


def test_a_network_without_feature_map_is_refused() -> None:
    traced = graph.trace(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), (3, 4, 4))
    with pytest.raises(UsageError, match="no feature map"):
        graph.split(traced)


# ---------------------------------------------------------------- the structure key


def key(model: nn.Module, *names: str, batch: int = 16) -> str:
    return graph.structure_key(graph.apply(model, without(*names), CIFAR), CIFAR, batch)


def test_blocks_of_one_stage_give_one_structure_and_stages_differ() -> None:
    model = cifar_net(4)
    names = [b.name for b in blocks(model, CIFAR) if b.droppable]
    keys = {name: key(model, name) for name in names}
    stages = {name: name.split(".")[0] for name in names}
    for a in names:
        for b in names:
            assert (keys[a] == keys[b]) == (stages[a] == stages[b]), (a, b)
    assert key(model) not in keys.values()
    assert key(model, "layer1.1", "layer2.2") == key(model, "layer1.3", "layer2.1")


def test_weights_and_names_do_not_matter_and_batch_and_resolution_do() -> None:
    one, other = cifar_net(), CifarNet(3)
    assert key(one) == key(other)
    assert key(one) != key(one, batch=1)
    traced = graph.trace(one, CIFAR)
    assert graph.structure_key(traced, CIFAR, 1) != graph.structure_key(traced, (3, 64, 64), 1)
    assert re.fullmatch(r"[0-9a-f]{64}", key(one))


class Chain(nn.Module):
    def __init__(self, wiring: str, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.wiring = wiring
        self.one, self.two = (
            nn.Conv2d(4, 4, 3, stride, 1, groups=groups),
            nn.Conv2d(4, 4, 3, stride, 1, groups=groups),
        )
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.one(x), self.two(x)
        pairs = {"ab": (a, b), "aa": (a, a), "a(b)": (a, self.two(a)), "silent": (self.drop(a), b)}
        first, second = pairs[self.wiring]
        logits: torch.Tensor = (first + second).mean((2, 3))
        return logits


def test_wiring_stride_and_groups_change_the_structure_and_dropout_does_not() -> None:
    def of(model: nn.Module) -> str:
        return graph.structure_key(graph.trace(model, (4, 8, 8)), (4, 8, 8), 1)

    variants = [Chain("ab"), Chain("aa"), Chain("a(b)"), Chain("ab", stride=2), Chain("ab", groups=2)]
    variants.append(Chain("ab").double())
    assert len({of(variant) for variant in variants}) == len(variants)
    assert of(Chain("silent")) == of(Chain("ab"))


# ---------------------------------------------------------------- what cannot be traced or asked


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Branching())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        assert isinstance(out, torch.Tensor)
        return out


def test_what_cannot_be_traced_is_one_line_that_names_the_place() -> None:
    with pytest.raises(
        UsageError, match=r"cannot trace Outer in inner\.0 \(Branching\).*torch\.fx\.wrap"
    ) as caught:
        graph.inspect(Outer(), (3, 4, 4))
    assert "\n" not in str(caught.value)


def test_a_wrong_input_shape_is_one_line_that_names_the_layer() -> None:
    with pytest.raises(
        UsageError, match=r"does not take an image of shape \(1, 32, 32\): at conv1:"
    ) as caught:
        graph.trace(cifar_net(), (1, 32, 32))
    assert "\n" not in str(caught.value)


def test_an_unknown_block_names_the_nearest_and_a_kept_one_says_why() -> None:
    model = cifar_net()
    with pytest.raises(UsageError, match=r"'layer1\.9'; did you mean 'layer1\.\d'"):
        graph.apply(model, without("layer1.9"), CIFAR)
    with pytest.raises(UsageError, match=r"'layer2\.0' cannot be dropped: changes the shape"):
        graph.apply(model, without("layer2.0"), CIFAR)


def test_a_candidate_can_be_copied_traced_again_and_exported() -> None:
    candidate = graph.apply(cifar_net(), without("layer1.0", "layer2.1"), CIFAR)
    x = images(CIFAR)
    with torch.no_grad():
        expected = candidate(x)
        assert torch.equal(copy.deepcopy(candidate)(x), expected)
        assert torch.equal(graph.trace(candidate, CIFAR)(x), expected)
        exported = torch.export.export(candidate, (x,)).module()
        assert difference(exported(x), expected) < 1e-6


# ---------------------------------------------------------------- channel groups


def test_channel_groups_tie_what_an_add_ties_and_keep_the_classes() -> None:
    groups = {group.name: group for group in graph.inspect(torchvision_model("resnet18"), IMAGENET).groups}
    assert groups["conv1"].layers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert groups["conv1"].channels == 64
    assert groups["conv1"].shape == (64, 3, 7, 7)
    assert groups["layer2.0.conv1"].layers == ("layer2.0.conv1",)
    assert groups["layer2.0.conv1"].macs == 64 * 128 * 9 * 28 * 28
    assert not groups["fc"].prunable
    assert groups["fc"].why_not == "its channels are the classes"


def test_channels_that_a_shortcut_pads_are_not_prunable_and_say_why() -> None:
    model = cifar_net()
    groups = {group.name: group for group in graph.inspect(model, CIFAR).groups}
    assert not groups["conv1"].prunable
    assert "layers of 16 and 32 and 64 channels" in groups["conv1"].why_not
    assert groups["layer1.0.conv1"].prunable
    named = {path for group in groups.values() for path in group.layers}
    layers = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert named == layers
