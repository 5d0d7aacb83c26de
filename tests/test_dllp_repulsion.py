"""Stein's push at work: with beta particles end further apart, and differ more in what they say."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from optpipe import graph, tune, uncertainty
from optpipe.data import ImageSet
from optpipe.methods.dllp import stein
from optpipe.methods.dllp.objective import Settings, Stein
from optpipe.methods.dllp.particles import Particles, begin, logits
from optpipe.methods.dllp.stein import Kernel, Particle
from optpipe.types import Tune

SHAPE = (1, 8, 8)
CLASSES = 4
STEPS = 50
BETA = 0.01
"""Of 96 images it weighs the posterior against the task as 0.5 does of 4800."""


class Net(nn.Module):
    """Three convolutions with batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, 2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.norm3 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        logits: Tensor = self.head(F.relu(self.norm3(self.conv3(x))).mean((2, 3)))
        return logits


@functools.cache
def pictures(count: int, seed: int) -> ImageSet:
    """A picture for each class, in noise that lets a network be right about three times of four."""
    plain = torch.rand(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    pixels = ((plain[labels] + 0.55 * noise).clamp(-1, 2) + 1) / 3 * 255
    return ImageSet(pixels.byte(), labels, tuple(map(str, range(count))), (0.5,), (0.25,), digest="d")


def tuning(steps: int) -> Tune:
    return Tune(
        steps=steps,
        batch=32,
        lr=0.05,
        weight_decay=0.0,
        schedule="cosine",
        loss="labels",
        trainable="all",
        augment="none",
    )


@functools.cache
def trained(seed: int) -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = graph.trace(Net().eval(), SHAPE)
    tune.train(network, None, pictures(96, 1), tuning(60), seed=seed)
    return network


@dataclass(frozen=True)
class Ended:
    """How far two particles' weights are apart, how much they say of a prediction, and how right they are."""

    distance: float
    information: float
    accuracy: float


@functools.cache
def ended(seed: int, beta: float, kernel: Kernel) -> Ended:
    network, images = trained(seed), pictures(96, 1)
    masks = graph.Masks(network, graph.width_map(network, SHAPE), "filter")
    of = begin(network, masks, 2, start="pretrained", keep=0.95, jitter=0.01, seed=seed, unit_costs=[1.0] * 3)
    settings = Settings(
        steps=STEPS,
        seed=seed,
        images=len(images),
        beta=beta,
        kernel=kernel,
        spike=1e3,
        temperature=(1.0, 0.1),
        aim=1.0,
        gate_rate=2 * 20 / STEPS * 0.1 / 0.05,  # gates could come 20 far, as in a search
        scale_rate=2 * 3 / STEPS * 0.1 / 0.05,
        sharpen=1.0,
    )
    assert images.labels is not None
    tune.fit(of, Stein(of, masks, images.labels, settings), images, tuning(STEPS), seed=seed)
    return measured(of, masks)


@torch.no_grad()
def measured(of: Particles, masks: graph.Masks) -> Ended:
    images = pictures(200, 2)
    said, places = [], []
    for index in range(2):
        kept = [mask.float() for mask in masks.above(of.probabilities(index, "filter"), 0.5)]
        said.append(torch.softmax(logits(of.network(index), masks, kept, images.batch(slice(None))), 1))
        places.append(torch.cat([one.flatten() for one in of.network(index).parameters()]))
    found = uncertainty.decompose(torch.stack(said).numpy())
    assert images.labels is not None
    right = torch.from_numpy(found.mean).argmax(1).eq(images.labels)
    return Ended(
        float((places[0] - places[1]).norm()),
        float(found.epistemic.mean()),
        float(right.float().mean()),
    )


SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", [pytest.param("median", marks=pytest.mark.slow), "each"])
def test_with_beta_particles_are_further_apart_and_say_more_of_their_doubt(seed: int, kernel: Kernel) -> None:
    without, pushed = ended(seed, 0.0, "median"), ended(seed, BETA, kernel)
    assert pushed.distance > 1.1 * without.distance
    assert pushed.information > 1.2 * without.information
    # It is no noise that has made the networks useless; chance is a quarter.
    assert pushed.accuracy > without.accuracy - 0.1 > 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_the_push_that_parts_them_under_a_kernel_for_each_number(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks and scores part particles too; a kernel over whole tensors adds next to nothing to that."""
    pushed = ended(seed, BETA, "each")
    directions = stein.directions

    def pulled(places: Sequence[Particle], scores: Sequence[Particle], kernel: Kernel) -> list[Particle]:
        """Eq. 14 without its second sum."""
        every, pushes = directions(places, scores, kernel), stein.repulsions(places, kernel)
        return [
            {name: one[name] - push[name] for name in one} for one, push in zip(every, pushes, strict=True)
        ]

    monkeypatch.setattr(stein, "directions", pulled)
    assert pushed.distance > 2 * ended.__wrapped__(seed, BETA, "each").distance


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["median", "each"])
def test_more_beta_is_more_distance(kernel: Kernel) -> None:
    distances = [ended(0, beta, kernel).distance for beta in (0.0, BETA / 10, BETA)]
    assert distances == sorted(distances)
