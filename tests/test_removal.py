"""What the loss of a block does, against cases worked out by hand and against networks built without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe import graph, tune
from optpipe.data import ImageSet
from optpipe.types import Plan

WHOLE = Plan()
# Two images of 1 x 2 x 2: means 2 and -1, mean squares 6 and 1.5, largest magnitude 4.
PIXELS = torch.tensor([[[[4.0, 2.0], [2.0, 0.0]]], [[[-2.0, -1.0], [-1.0, 0.0]]]])
MEANS = (2.0, -1.0)
MEAN_SQUARE = 3.75


@dataclass
class Pair:
    """The two images, as they are."""

    labels: torch.Tensor | None = None
    digest: str = "d"

    def __len__(self) -> int:
        return 2

    def batch(self, indices: Sequence[int] | slice) -> torch.Tensor:
        return PIXELS[indices]


class Scaled(nn.Module):
    """x + scale * x, by a convolution."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.conv.weight, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return x + y


class Line(nn.Module):
    """Features 1.5 * 1 * 2 = 3 times the image; logits (mean of the features, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.none, self.large = Scaled(0.5), Scaled(0.0), Scaled(1.0)
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight = nn.Parameter(torch.tensor([[1.0], [0.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.large(self.none(self.small(x)))
        logits: torch.Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


NAMES = ("small", "none", "large")


def effects(effect: graph.Effect, dropped: Plan = WHOLE, names: Sequence[str] = NAMES) -> tuple[float, ...]:
    return graph.removal_effects(Line(), dropped, names, Pair(), (1, 2, 2), effect)


def divergence(whole: float, left: float) -> float:
    """The mean over the images of KL(p || q), features being ``whole`` and ``left`` times the image."""
    total = 0.0
    for mean in MEANS:
        p, q = 1 / (1 + math.exp(-whole * mean)), 1 / (1 + math.exp(-left * mean))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total / 2


def test_l2_is_the_mean_squared_difference_of_the_features() -> None:
    # Without small 2x are left of 3x, without large 1.5x.
    assert effects("features") == pytest.approx((MEAN_SQUARE, 0.0, 1.5**2 * MEAN_SQUARE))


def test_beside_dropped_blocks_the_difference_is_still_that_from_the_original() -> None:
    gone = Plan(drop_blocks=("small",))
    assert effects("features", gone, ("none", "large")) == pytest.approx((MEAN_SQUARE, 4 * MEAN_SQUARE))
    assert effects("answers", gone, ("large",)) == pytest.approx((divergence(3, 1),))


def test_curl_is_the_divergence_of_the_answers_from_the_originals() -> None:
    small, none, large = effects("answers")
    assert (small, large) == pytest.approx((divergence(3, 2), divergence(3, 1.5)))
    assert none == 0.0


def test_the_response_is_the_largest_magnitude_that_a_block_adds() -> None:
    # At the brightest place, 4: small adds 2, large 6; a block that adds nothing anywhere goes first.
    assert effects("response") == pytest.approx((2.0, 0.0, 6.0))
    assert effects("response", Plan(drop_blocks=("small",)), ("large",)) == pytest.approx((4.0,))


def test_a_network_that_overflows_without_a_block_counts_it_as_the_least_dispensable() -> None:
    network = Line()
    with torch.no_grad():
        # Without none, which takes its whole stream away, 1e30 times the image is squared.
        network.none.conv.weight.fill_(-1.0)
        network.small.conv.weight.fill_(1e30)
    small, none, large = graph.removal_effects(network, WHOLE, NAMES, Pair(), (1, 2, 2), "features")
    assert (small, large) == (0.0, 0.0)
    assert none == torch.finfo(torch.float32).max


class InPlace(nn.Module):
    """A block that adds to its stream in place, and whose activation follows the add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x.add_(self.bn(self.conv(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second, self.third = InPlace(6), InPlace(6), InPlace(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(F.relu(self.stem(x)))))
        logits: torch.Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


@pytest.fixture(scope="module")
def original() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return graph.trace(Net().eval(), (3, 8, 8))


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """More than one batch of them, the last one smaller."""
    pixels = torch.randint(0, 256, (150, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    names = tuple(str(number) for number in range(150))
    return ImageSet(pixels.byte(), None, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)


@pytest.mark.parametrize("dropped", [(), ("second",)])
def test_the_effects_are_those_of_a_network_built_without_the_block(
    original: fx.GraphModule, images: ImageSet, dropped: tuple[str, ...]
) -> None:
    names = [name for name in ("first", "second", "third") if name not in dropped]
    features, answers = (
        graph.removal_effects(original, Plan(drop_blocks=dropped), names, images, (3, 8, 8), effect)
        for effect in ("features", "answers")
    )
    log_p = F.log_softmax(tune.logits(original, images).double(), dim=1)
    for name, own, moved in zip(names, features, answers, strict=True):
        without = graph.apply(original, Plan(drop_blocks=(*dropped, name)), (3, 8, 8))
        assert own == pytest.approx(tune.distance(without, original, images), rel=1e-4)
        log_q = F.log_softmax(tune.logits(without, images).double(), dim=1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
        assert moved == pytest.approx(float(divergence), rel=1e-4, abs=1e-8)
