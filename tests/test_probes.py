"""Discrimination of depth units: known where a block's use is known, and equal to least squares by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optpipe.errors import UsageError
from optpipe.graph import apply, inspect, trace
from optpipe.graph.probes import UnitScore, unit_discrimination
from optpipe.types import Plan
from optpipe.zoo.cifar_densenet import densenet40
from optpipe.zoo.cifar_resnet import resnet20
from optpipe.zoo.cifar_vgg import vgg11

SHAPE = (2, 4, 4)
FIT, SCORE = range(160), range(160, 240)


@dataclass(slots=True)
class Held:
    """Images in memory that remember which of them were asked for."""

    pixels: torch.Tensor
    labels: torch.Tensor | None
    digest: str = ""
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Sequence[int] | slice) -> torch.Tensor:
        chosen = list(range(len(self))[indices]) if isinstance(indices, slice) else list(indices)
        self.asked += chosen
        return self.pixels[chosen]


class Branch(nn.Module):
    """x + B relu(A x) of each pixel; B is zero at first, so that the block does nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, 4, 1, bias=False)
        self.outer = nn.Conv2d(4, channels, 1, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.outer(F.relu(self.inner(x)))
        return x + y


class Net(nn.Module):
    """Images (a, b) behind a stem of four channels (a, b, 0, 0) and three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1, bias=False)
        self.first, self.second, self.third = Branch(4), Branch(4), Branch(4)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(4)[:, :2, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(self.stem(x))))
        logits: torch.Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


@torch.no_grad()
def add_magnitudes(block: Branch) -> None:
    """Let a block write |a + b| to the third channel and |a - b| to the fourth."""
    sums = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
    block.inner.weight.copy_(F.pad(sums, (0, 2))[:, :, None, None])
    block.outer.weight[2, :2] = block.outer.weight[3, 2:] = 1


@pytest.fixture
def crossed() -> Held:
    """The class is whether a and b differ in sign: no linear function of them tells it."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(240, 2, generator=generator)
    pixels = pairs[:, :, None, None] + 0.01 * torch.randn(240, *SHAPE, generator=generator)
    return Held(pixels, (pairs.prod(1) < 0).long())


def scores(net: nn.Module, images: Held) -> dict[str, UnitScore]:
    found = unit_discrimination(net, images, FIT, SCORE, SHAPE)
    return {unit.name: unit for unit in found}


def test_a_block_that_does_nothing_adds_nothing(crossed: Held) -> None:
    for unit in scores(Net(), crossed).values():
        assert unit.importance == unit.gain == 0


@pytest.mark.parametrize("useful", ["first", "second", "third"])
def test_the_block_that_makes_classes_separable_is_the_most_important(crossed: Held, useful: str) -> None:
    net = Net()
    add_magnitudes(net.get_submodule(useful))  # type: ignore[arg-type]
    found = scores(net, crossed)
    assert list(found) == ["first", "second", "third"]
    one = found.pop(useful)
    assert one.before < 0.65 and one.after > 0.85
    assert one.importance == pytest.approx(one.after - one.before)
    assert one.gain > 0.3
    for other in found.values():
        assert other.importance == 0


def test_what_a_block_destroys_counts_against_it(crossed: Held) -> None:
    net = Net()
    add_magnitudes(net.first)
    add_magnitudes(net.second)
    with torch.no_grad():
        net.second.outer.weight.neg_()
    found = scores(net, crossed)
    assert found["second"].importance == -found["first"].importance < 0
    assert found["second"].gain == pytest.approx(-found["first"].gain)


def test_every_image_goes_through_the_network_once(crossed: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optpipe.graph.probes.BATCH_IMAGES", 32)
    seen: list[int] = []

    class Counted(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            seen.append(len(input))
            return super().forward(input)

    net = Net()
    weight, net.stem = net.stem.weight, Counted(2, 4, 1, bias=False)
    net.stem.weight = weight
    scores(net, crossed)
    assert crossed.asked == [*FIT, *SCORE]
    while seen[0] == 1:  # the trace runs one black image
        seen.pop(0)
    assert seen == [32] * 5 + [32, 32, 16]


def test_the_size_of_batches_changes_nothing(crossed: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    add_magnitudes(net.second)
    whole = scores(net, crossed)
    monkeypatch.setattr("optpipe.graph.probes.BATCH_IMAGES", 7)
    for name, unit in scores(net, crossed).items():
        assert unit.after == whole[name].after
        assert unit.skill_after == pytest.approx(whole[name].skill_after, abs=1e-6)


def by_hand(
    fitted: np.ndarray, fit_labels: np.ndarray, scored: np.ndarray, labels: np.ndarray, ridge: float
) -> tuple[float, float]:
    """(accuracy, skill) of a ridge regression, written as least squares with a row for each coefficient."""
    hot = np.eye(int(max(fit_labels.max(), labels.max())) + 1)
    mean, deviation = fitted.mean(0), fitted.std(0)
    base = hot[fit_labels].mean(0)
    inputs, more = (fitted - mean) / deviation, (scored - mean) / deviation
    rows = np.concatenate([inputs, np.sqrt(ridge * len(inputs)) * np.eye(inputs.shape[1])])
    wanted = np.concatenate([hot[fit_labels] - base, np.zeros((inputs.shape[1], hot.shape[1]))])
    answers = more @ np.linalg.lstsq(rows, wanted, rcond=None)[0] + base
    spread = ((hot[labels] - base) ** 2).sum()
    return (
        float((answers.argmax(1) == labels).mean()),
        float(1 - ((answers - hot[labels]) ** 2).sum() / spread),
    )


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet20().eval()


@pytest.fixture
def colours() -> Held:
    """Images whose class is their strongest colour, behind noise."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (144,), generator=generator)
    pixels = torch.randn(144, 3, 16, 16, generator=generator) + F.one_hot(labels)[:, :, None, None]
    return Held(pixels, labels)


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_a_probe_is_the_ridge_regression_that_least_squares_gives(
    resnet: nn.Module, colours: Held, ridge: float
) -> None:
    fit, score = range(96), range(96, 144)
    found = unit_discrimination(resnet, colours, fit, score, (3, 16, 16), ridge=ridge)
    assert colours.labels is not None
    labels, reached = colours.labels.numpy(), dict[str, np.ndarray]()
    handles = [
        resnet.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: reached.update(
                {f"{name} before": inputs[0].mean((2, 3)), f"{name} after": output.mean((2, 3))}
            )
        )
        for name in (unit.name for unit in found)
    ]
    with torch.no_grad():
        resnet(colours.pixels)
    for handle in handles:
        handle.remove()
    assert len(found) == 7
    for unit in found:
        for end, accuracy, skill in (
            ("before", unit.before, unit.skill_before),
            ("after", unit.after, unit.skill_after),
        ):
            features = np.asarray(reached[f"{unit.name} {end}"], np.float64)
            wanted = by_hand(features[fit], labels[fit], features[score], labels[score], ridge)
            assert (accuracy, skill) == pytest.approx(wanted, abs=1e-5), f"{unit.name} {end}"


def test_a_zeroed_branch_before_a_relu_adds_nothing(resnet: nn.Module, colours: Held) -> None:
    zeroed = trace(resnet, (3, 16, 16))
    with torch.no_grad():
        zeroed.get_submodule("layer2.1.bn2").weight.zero_()  # type: ignore[operator]
    found = unit_discrimination(zeroed, colours, range(96), range(96, 144), (3, 16, 16))
    for unit in found:
        assert (unit.gain == 0) == (unit.name == "layer2.1")


def test_plain_units_are_scored(colours: Held) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = vgg11().eval()
    shape = (3, 32, 32)
    images = Held(F.interpolate(colours.pixels[:24], shape[1:]), colours.labels)
    found = unit_discrimination(network, images, range(16), range(16, 24), shape)
    assert [unit.name for unit in found] == [block.name for block in inspect(network, shape).units]
    assert found and all(unit.gain != 0 for unit in found)


def test_of_the_dense_layers_one_whose_features_are_constant_adds_nothing(colours: Held) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = densenet40().eval()
    with torch.no_grad():
        network.get_submodule("block2.3.conv").weight.zero_()  # type: ignore[operator]
    images = Held(colours.pixels[:48, :, :8, :8], colours.labels)
    found = unit_discrimination(network, images, range(32), range(32, 48), (3, 8, 8))
    assert len(found) == 36
    for unit in found:
        assert (unit.gain == pytest.approx(0, abs=1e-9)) == (unit.name == "block2.3"), unit


def test_the_units_of_a_candidate_keep_their_names(resnet: nn.Module, colours: Held) -> None:
    shape = (3, 16, 16)
    arguments = (colours, range(96), range(96, 144), shape)
    gone = ("layer1.1", "layer3.2")
    left = unit_discrimination(apply(resnet, Plan(drop_blocks=gone), shape), *arguments)
    whole = unit_discrimination(resnet, *arguments)
    assert [unit.name for unit in left] == [unit.name for unit in whole if unit.name not in gone]
    assert left[0] == whole[0]  # what comes before the first that is gone is as it was


def test_images_may_have_another_size_than_the_network_was_traced_at(
    resnet: nn.Module, colours: Held
) -> None:
    large = trace(resnet, (3, 32, 32))
    arguments = (colours, range(96), range(96, 144), (3, 16, 16))
    assert unit_discrimination(large, *arguments) == unit_discrimination(resnet, *arguments)
    assert next(n for n in large.graph.nodes if n.op == "placeholder").meta["shape"] == (1, 3, 32, 32)


def test_features_may_be_computed_in_bfloat16(resnet: nn.Module, colours: Held) -> None:
    arguments = (resnet, colours, range(96), range(96, 144), (3, 16, 16))
    for half, whole in zip(
        unit_discrimination(*arguments, autocast=True), unit_discrimination(*arguments), strict=True
    ):
        assert half.skill_after == pytest.approx(whole.skill_after, abs=0.05)
        assert half.skill_after != whole.skill_after


def test_a_network_without_units_has_no_scores(crossed: Held) -> None:
    plain = nn.Sequential(nn.Conv2d(2, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert inspect(plain, SHAPE).units == ()
    assert unit_discrimination(plain, crossed, FIT, SCORE, SHAPE) == ()


@pytest.mark.parametrize(
    ("fit", "score", "message"),
    [
        (range(0), range(4), "no images to fit probes with"),
        (range(4), range(0), "no images to score probes with"),
        (range(4), range(3, 8), "image 3 is to be scored by probes that are fitted to it"),
        (range(4), range(4, 8), "all 4 images that probes are to be fitted to are of class 1"),
    ],
)
def test_images_that_cannot_serve_are_refused(fit: range, score: range, message: str) -> None:
    images = Held(torch.zeros(8, *SHAPE), torch.ones(8, dtype=torch.int64))
    with pytest.raises(UsageError, match=message):
        unit_discrimination(Net(), images, fit, score, SHAPE)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(UsageError, match="these images have no labels"):
        unit_discrimination(Net(), Held(torch.zeros(8, *SHAPE), None), range(4), range(4, 8), SHAPE)
