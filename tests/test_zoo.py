from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import fx, nn

from optpipe import graph, zoo
from optpipe.errors import UsageError
from optpipe.zoo.cifar_resnet import PadShortcut

NETWORKS = ("resnet20_cifar", "mobilenet_v2_cifar", "densenet40_cifar", "vgg11_cifar")


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    y = PadShortcut(2, 4)(x)
    assert y.shape == (1, 4, 2, 2)
    assert y[0, 0].abs().sum() == 0
    assert y[0, 3].abs().sum() == 0
    assert y[0, 1].tolist() == [[0, 2], [8, 10]]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20_cifar", 269_722),
        ("resnet32_cifar", 464_154),
        ("resnet44_cifar", 658_586),
        ("resnet56_cifar", 853_018),
        ("mobilenet_v2_cifar", 2_236_682),
        # 16 maps, then three times 12 layers of 12 more: "1.0M" in the paper's Table 2.
        ("densenet40_cifar", 1_019_722),
        ("vgg11_cifar", 9_228_362),
        ("vgg16_cifar", 14_724_042),
    ],
)
def test_parameters_are_those_of_the_published_networks(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in zoo.build(name).parameters()) == parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_classes_and_channels_reach_the_network(name: str) -> None:
    model = zoo.build(name, classes=7, in_channels=1).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_mobilenet_halves_a_small_image_three_times() -> None:
    model = zoo.build("mobilenet_v2_cifar").eval()
    x = torch.zeros(1, 3, 32, 32)
    heights = [x.shape[-1]]
    for stage in model.get_submodule("features").children():
        x = stage(x)
        heights.append(x.shape[-1])
    assert heights == [32] * 5 + [16] * 3 + [8] * 7 + [4] * 5


def test_densenet_has_forty_layers_and_halves_an_image_twice() -> None:
    model = zoo.build("densenet40_cifar").eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 40
    traced = graph.trace(model, (3, 32, 32))
    maps = [node.meta["shape"][1:] for node in traced.graph.nodes if node.target is torch.cat]
    assert maps == [
        (first + 12 * layer, size, size)
        for first, size in ((16, 32), (160, 16), (304, 8))
        for layer in range(1, 13)
    ]


def test_vgg_gives_the_last_stage_two_pixels_a_side_and_takes_images_of_sixteen() -> None:
    model = zoo.build("vgg16_cifar").eval()
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) == 13
    assert model.get_submodule("features")(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 2, 2)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_mobilenets_blocks_and_channel_groups_are_found() -> None:
    found = graph.inspect(zoo.build("mobilenet_v2_cifar"), (3, 32, 32))
    # Of the 17 blocks those that keep size and channels: one of 24, two of 32, three of 64, two of 96 and
    # two of 160.
    assert [block.name for block in found.droppable] == [
        f"features.{number}" for number in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)
    ]
    # One group for each of the 17 expanded widths (the stem's is the first block's), the seven stages, the
    # last convolution; only the classes must stay.
    assert [group.name for group in found.groups if not group.prunable] == ["classifier.1"]
    assert len(found.groups) == 17 + 7 + 1 + 1
    assert found.macs == 87_976_448


@pytest.mark.parametrize("name", NETWORKS)
def test_a_symbolic_trace_computes_the_same(name: str) -> None:
    model = zoo.build(name).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize(
    "name", [*NETWORKS[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS[1:])]
)
def test_the_exported_network_agrees_with_torch_at_any_batch(name: str, tmp_path: Path) -> None:
    model = zoo.build(name).eval()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (x,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (x, x[:1]):
        (logits,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        np.testing.assert_allclose(logits, model(batch).detach().numpy(), rtol=1e-3, atol=1e-3)


def test_a_mistyped_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"'zoo:resnet65_cifar' is unknown; did you mean 'zoo:resnet\d\d_cifar'"
    ):
        zoo.build("resnet65_cifar")
