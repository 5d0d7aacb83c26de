"""Cutting channels: the narrow network is the original with those channels at zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import optpipe
from optpipe import deploy, graph, models, store
from optpipe.backends import onnxruntime
from optpipe.data import Preprocess
from optpipe.errors import UsageError
from optpipe.models import ModelSpec
from optpipe.onnx_export import export
from optpipe.types import Fingerprint, Plan, Target
from optpipe.zoo.cifar_resnet import resnet20

CIFAR = (3, 32, 32)
SMALL = (3, 8, 8)


def alive(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """The model in eval mode with batch-norms set to data, random scales and offsets."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data = 0.8 + 0.4 * torch.rand(norm.weight.shape, generator=generator)
        norm.bias.data = 0.4 * torch.rand(norm.bias.shape, generator=generator) - 0.1
        norm.momentum = None
    model.train(bool(norms))
    with torch.no_grad():
        model(images(shape, 4))
    return model.eval()


def images(shape: tuple[int, int, int], count: int = 2) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(2))


def made(name: str, shape: tuple[int, int, int]) -> nn.Module:
    torch.manual_seed(0)
    model = resnet20() if name == "resnet20" else getattr(torchvision.models, name)(weights=None)
    assert isinstance(model, nn.Module)
    return alive(model, shape)


def every_third_gone(width: int) -> tuple[int, ...]:
    return tuple(index for index in range(width) if index % 3 != 1)


def silenced(
    model: nn.Module, reads: Mapping[str, Sequence[int]], shape: tuple[int, int, int]
) -> torch.Tensor:
    """The original's logits where each of these layers reads zeros in place of these input channels."""
    masked = copy.deepcopy(model)
    for path, gone in reads.items():

        def silence(_: nn.Module, given: tuple[torch.Tensor], gone: Sequence[int] = gone) -> torch.Tensor:
            x = given[0].clone()
            x[:, list(gone)] = 0
            return x

        masked.get_submodule(path).register_forward_pre_hook(silence)
    with torch.no_grad():
        logits: torch.Tensor = masked(images(shape))
    return logits


def logits(model: nn.Module, shape: tuple[int, int, int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(images(shape))
    return found


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# network, image, {group: (its width, the layers that read it)}
READERS = [
    (
        "resnet20",
        CIFAR,
        {
            "layer1.0.conv1": (16, ["layer1.0.conv2"]),
            "layer2.0.conv1": (32, ["layer2.0.conv2"]),
            "layer3.2.conv1": (64, ["layer3.2.conv2"]),
        },
    ),
    (
        "resnet18",
        (3, 64, 64),
        {
            "conv1": (
                64,
                ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"],
            ),
            "layer2.1.conv1": (128, ["layer2.1.conv2"]),
            "layer4.0.conv2": (512, ["layer4.1.conv1", "fc"]),
        },
    ),
    (
        "mobilenet_v2",
        (3, 64, 64),
        {
            "features.2.conv.0.0": (96, ["features.2.conv.2"]),
            "features.2.conv.2": (24, ["features.3.conv.0.0", "features.4.conv.0.0"]),
            "features.18.0": (1280, ["classifier.1"]),
        },
    ),
]


@pytest.mark.parametrize(("name", "shape", "groups"), READERS, ids=[row[0] for row in READERS])
def test_the_cut_network_is_the_original_with_those_channels_at_zero(
    name: str, shape: tuple[int, int, int], groups: dict[str, tuple[int, list[str]]]
) -> None:
    model = made(name, shape)
    before = copy.deepcopy(model.state_dict())
    plan = Plan(keep_channels=tuple((group, every_third_gone(width)) for group, (width, _) in groups.items()))
    cut = graph.apply(model, plan, shape)
    reads = {
        path: sorted(set(range(width)).difference(every_third_gone(width)))
        for width, readers in groups.values()
        for path in readers
    }
    expected = silenced(model, reads, shape)
    assert difference(logits(cut, shape), expected) < 1e-5
    assert difference(logits(model, shape), expected) > 1e-3
    for group, (width, readers) in groups.items():
        kept = len(every_third_gone(width))
        assert cut.get_parameter(f"{group}.weight").shape[0] == kept
        assert all(cut.get_parameter(f"{reader}.weight").shape[1] in {1, kept} for reader in readers)
    assert list(cut.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    original = graph.count(graph.trace(model, shape), shape)
    narrowed = graph.count(cut, shape)
    assert narrowed[0] == sum(parameter.numel() for parameter in cut.parameters())
    assert all(after < whole for after, whole in zip(narrowed, original, strict=True))
    again = graph.apply(model, plan, shape)
    assert graph.structure_key(again, shape, 4) == graph.structure_key(cut, shape, 4)
    assert torch.equal(logits(again, shape), logits(cut, shape))


@pytest.mark.slow
def test_the_channels_of_a_map_that_is_flattened_go_with_all_their_pixels() -> None:
    model, shape = made("vgg11", (3, 64, 64)), (3, 64, 64)
    kept = every_third_gone(512)
    plan = Plan(keep_channels=(("features.18", kept), ("classifier.0", tuple(range(0, 4096, 2)))))
    cut = graph.apply(model, plan, shape)
    gone = sorted(set(range(512)).difference(kept))
    pixels = [channel * 49 + pixel for channel in gone for pixel in range(49)]
    expected = silenced(model, {"classifier.0": pixels, "classifier.3": range(1, 4096, 2)}, shape)
    assert difference(logits(cut, shape), expected) < 1e-5
    assert cut.get_parameter("classifier.0.weight").shape == (2048, len(kept) * 49)


class Dense(nn.Module):
    """Two layers, each of which reads all that was made before; a grouped one; a map that is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1, bias=False)
        self.norm3, self.mix = nn.BatchNorm2d(14), nn.Conv2d(14, 8, 1)
        self.grouped, self.slope = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2), nn.PReLU(12)
        self.last = nn.Conv2d(12, 5, 3, stride=2, padding=1)
        self.fc = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.stem(x)
        second = self.conv1(torch.relu(self.norm1(first)))
        both = torch.cat([first, second], 1)
        third = self.conv2(torch.relu(self.norm2(both)))
        x = torch.relu(self.mix(torch.relu(self.norm3(torch.cat([both, third], 1)))))
        x = torch.relu(self.last(self.slope(self.grouped(x))))
        out: torch.Tensor = self.fc(torch.flatten(x, 1))
        return out


def dense() -> nn.Module:
    torch.manual_seed(0)
    return alive(Dense(), SMALL)


def test_concatenated_grouped_and_flattened_channels_are_cut_where_they_end_up() -> None:
    model = dense()
    plan = Plan(
        keep_channels=(
            ("stem", (0, 2, 3, 5)),
            ("conv1", (1, 2, 3)),
            ("conv2", (0, 3)),
            ("mix", (0, 2, 5, 6)),
            ("grouped", (0, 1, 4, 6, 7, 9)),
            ("last", (0, 2, 4)),
        )
    )
    cut = graph.apply(model, plan, SMALL)
    reads = {
        "conv1": (1, 4),
        "conv2": (1, 4, 6),
        "mix": (1, 4, 6, 11, 12),
        "grouped": (1, 3, 4, 7),
        "last": (2, 3, 5, 8, 10, 11),
        "fc": [channel * 4 + pixel for channel in (1, 3) for pixel in range(4)],
    }
    assert difference(logits(cut, SMALL), silenced(model, reads, SMALL)) < 1e-5
    assert {name: tuple(p.shape) for name, p in cut.named_parameters() if name.endswith("weight")} == {
        "stem.weight": (4, 3, 3, 3),
        "norm1.weight": (4,),
        "conv1.weight": (3, 4, 3, 3),
        "norm2.weight": (7,),
        "conv2.weight": (2, 7, 3, 3),
        "norm3.weight": (9,),
        "mix.weight": (4, 9, 1, 1),
        "grouped.weight": (6, 2, 3, 3),
        "slope.weight": (6,),
        "last.weight": (3, 6, 3, 3),
        "fc.weight": (3, 12),
    }
    grouped = cut.get_submodule("grouped")
    assert isinstance(grouped, nn.Conv2d)
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 4, 6)
    assert cut.get_buffer("norm2.running_mean").shape == (7,)


def test_blocks_go_first_and_then_the_channels_of_what_is_left() -> None:
    shape = (3, 64, 64)
    model = made("resnet18", shape)
    # conv1's group has a layer in each block of layer1; all of layer2.1.conv1's group goes with its block.
    plan = Plan(
        drop_blocks=("layer1.0", "layer2.1"),
        keep_channels=(("conv1", every_third_gone(64)), ("layer2.1.conv1", (0,))),
    )
    cut = graph.apply(model, plan, shape)
    gone = range(1, 64, 3)
    dropped = graph.apply(model, Plan(drop_blocks=plan.drop_blocks), shape)
    readers = ("layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0")
    expected = silenced(dropped, dict.fromkeys(readers, gone), shape)
    assert difference(logits(cut, shape), expected) < 1e-5
    assert list(cut.state_dict()) == list(dropped.state_dict())
    assert tuple(cut.get_parameter("layer1.1.conv2.weight").shape) == (43, 64, 3, 3)
    same = graph.apply(model, Plan(plan.drop_blocks, plan.keep_channels[:1]), shape)
    assert graph.structure_key(same, shape, 1) == graph.structure_key(cut, shape, 1)


def test_a_plan_that_keeps_every_channel_changes_nothing() -> None:
    model = dense()
    cut = graph.apply(model, Plan(keep_channels=(("stem", tuple(range(6))),)), SMALL)
    assert torch.equal(logits(cut, SMALL), logits(model, SMALL))


def test_frozen_parameters_stay_frozen_and_the_others_train() -> None:
    model = dense()
    model.get_parameter("stem.weight").requires_grad_(False)
    cut = graph.apply(model, Plan(keep_channels=(("stem", (0, 1)),)), SMALL)
    assert [name for name, p in cut.named_parameters() if not p.requires_grad] == ["stem.weight"]
    cut(images(SMALL)).sum().backward()
    assert cut.get_parameter("conv1.weight").grad is not None
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ((("layer1.0.conv9", (0,)),), r"no channel group is named 'layer1\.0\.conv9'; did you mean 'layer1"),
        ((("layer1.0.conv2", (0,)),), r"'layer1\.0\.conv2'; that layer belongs to the group 'conv1'"),
        ((("conv1", (0,)),), r"'conv1' cannot be narrowed: torch-pruning ties layers of 16 and 32 and 64"),
        ((("linear", (0,)),), r"'linear' cannot be narrowed: its channels are the classes"),
        ((("layer1.0.conv1", ()),), r"would keep no channel; keep at least one of its 16"),
        ((("layer1.0.conv1", (0, 16)),), r"has no channel 16; its channels are 0 to 15"),
        ((("layer1.0.conv1", (-1, 2)),), r"has no channel -1"),
        ((("layer1.0.conv1", (3, 2)),), r"keeps 3 before 2; list each kept channel once, ascending"),
        ((("layer1.0.conv1", (2, 2)),), r"keeps 2 before 2"),
        ((("layer1.0.conv1", (2,)), ("layer1.0.conv1", (3,))), r"'layer1\.0\.conv1' is named twice"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(
    keep: tuple[tuple[str, tuple[int, ...]], ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        graph.apply(resnet20(), Plan(keep_channels=keep), CIFAR)
    assert "\n" not in str(caught.value)


def test_groups_of_a_convolution_must_keep_equally_many_channels() -> None:
    message = r"^grouped works in 2 groups, which must keep equally many channels; they would keep 3, 2"
    with pytest.raises(UsageError, match=message):
        graph.apply(dense(), Plan(keep_channels=(("mix", (0, 1, 2, 4, 5)),)), SMALL)


class Mixed(nn.Module):
    """Channels that are no layer's own: normalised together, scaled by a parameter, shared out by softmax."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.fc = kind, nn.Conv2d(3, 8, 1), nn.Linear(8, 2)
        if kind == "norm":
            self.norm = nn.GroupNorm(2, 8)
        if kind == "scale":
            self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.kind == "norm":
            x = self.norm(x)
        if self.kind == "scale":
            x = x * self.scale
        if self.kind == "softmax":
            x = x.softmax(1)
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("kind", "why_not"),
    [
        ("norm", "its channels pass through norm, and no GroupNorm is narrowed"),
        ("scale", "its channels meet a parameter of shape (8, 1, 1) that belongs to no layer"),
    ],
)
def test_a_group_whose_channels_are_not_cut_alike_says_so_before_it_is_asked(kind: str, why_not: str) -> None:
    torch.manual_seed(0)
    (group, _) = graph.inspect(Mixed(kind), SMALL).groups
    assert (group.prunable, group.why_not) == (False, why_not)


def test_channels_that_share_a_sum_are_found_out_by_running_the_cut_network() -> None:
    torch.manual_seed(0)
    with pytest.raises(UsageError, match="narrowed in conv, fc does not compute what the original does"):
        graph.apply(Mixed("softmax"), Plan(keep_channels=(("conv", (0, 1, 2)),)), SMALL)


# ---------------------------------------------------------------- what comes after


def test_a_cut_network_runs_in_onnx_runtime_at_another_batch(tmp_path: Path) -> None:
    model = made("resnet20", CIFAR)
    keep = tuple((f"layer{s}.{b}.conv1", (0, 3, 4, 7, 9)) for s in (1, 2, 3) for b in (0, 2))
    cut = graph.apply(model, Plan(("layer1.1",), keep), CIFAR)
    export(cut, CIFAR, 4, tmp_path / "model.onnx")
    target = Target("onnxruntime", 3, CIFAR, threads=1)
    session = onnxruntime.load(onnxruntime.build(tmp_path / "model.onnx", target, tmp_path), target)
    x = images(CIFAR, 3)
    with torch.no_grad():
        expected = cut(x)
    found = torch.from_numpy(session.run(x.numpy()))
    session.close()
    assert difference(found, expected) < 1e-5


def test_a_narrow_network_comes_back_from_its_bundle(tmp_path: Path) -> None:
    spec = ModelSpec("zoo:resnet20_cifar")
    plan = Plan(("layer2.1",), (("layer1.0.conv1", (1, 5)), ("layer3.0.conv1", every_third_gone(64))))
    assert store.from_json(Plan, store.to_json(plan)) == plan
    cut = alive(graph.apply(models.load_model(spec), plan, CIFAR), CIFAR)
    machine = Fingerprint("a processor", "Linux 6", (), 1)
    target = Target("onnxruntime", 4, CIFAR, threads=1)
    saved = deploy.Saved(spec, str(tmp_path), plan, CIFAR, Preprocess((0.5,) * 3, (0.5,) * 3))
    folder = tmp_path / "deploy"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"nobody opens it")
    engine = deploy.BundledEngine("fp32", "onnxruntime", "model.onnx", "model.onnx", 0.0)
    deploy.write_bundle(folder, cut, saved, target, deploy.Origin(machine, "c" * 64, 0, ()), [engine])
    assert torch.equal(logits(optpipe.load(folder), CIFAR), logits(cut, CIFAR))
