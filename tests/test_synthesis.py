"""Images from a network alone: each term of what is minimised, and the batches that come of it."""

from __future__ import annotations

import copy
import dataclasses
import math
from itertools import chain, islice

import numpy as np
import pytest
import torch
from torch import nn

from optpipe import synthesis
from optpipe.data.preparing import normalised
from optpipe.errors import RunError, UsageError
from optpipe.types import Jitter, Synthesis

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
FEW = Synthesis(steps=6, lr=0.1, batch=4, jitter="roll")


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    """A small network whose batch-norms have seen 64 images of coarse colours."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(64, 3, 2, 2, generator=generator)
    with torch.no_grad():
        for _ in range(30):
            made.train()(nn.functional.interpolate(coarse, scale_factor=4.0))
    return made.eval()


def wanted(count: int = 8, size: int = 8, *, seed: int = 0, halved: bool = True) -> synthesis.Wanted:
    labels = synthesis.even_labels(count, 4, seed)
    return synthesis.Wanted(labels, (3, size, size), MEAN, STD, seed, halved)


# ---------------------------------------------------------------- terms


def test_the_statistics_distance_is_that_of_means_and_of_variances() -> None:
    # Channel 0 is 1, 3 (mean 2, variance 1); channel 1 is 0, 4 (mean 2, variance 4).
    features = torch.tensor([[[[1.0]], [[0.0]]], [[[3.0]], [[4.0]]]])
    far = synthesis.statistics_distance(features, torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 1.0]))
    assert far.item() == pytest.approx(5 + 3)
    flat = synthesis.statistics_distance(
        features.flatten(1), torch.tensor([2.0, 2.0]), torch.tensor([1.0, 4])
    )
    assert flat.item() == 0


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5)])
def test_the_statistics_distance_has_the_gradient_of_its_definition(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = (3 + torch.randn(shape, generator=generator)).requires_grad_()
    mean, variance = torch.randn(5, generator=generator), torch.rand(5, generator=generator)
    places = [0, *range(2, len(shape))]
    own_variance, own_mean = torch.var_mean(features, places, correction=0)
    expected = (own_mean - mean).norm() + (own_variance - variance).norm()
    found = synthesis.statistics_distance(features, mean, variance)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, features), torch.autograd.grad(expected, features), rtol=1e-4, atol=1e-6
    )
    # In bfloat16 the statistics are float32, and the gradient is as fine as the features are.
    coarse = features.detach().bfloat16().requires_grad_()
    half = synthesis.statistics_distance(coarse, mean, variance)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.01, atol=0)
    assert torch.autograd.grad(half, coarse)[0].dtype == torch.bfloat16


def test_total_variation_sums_the_norms_of_four_directions() -> None:
    image = torch.tensor([[[[0.0, 3.0], [4.0, 1.0]]]])
    # Down: 4, -2. Right: 3, -3. Diagonals: 1 and 4 - 3.
    expected = math.sqrt(20) + math.sqrt(18) + 1 + 1
    assert synthesis.total_variation(image).item() == pytest.approx(expected)
    both = torch.cat([image, torch.full_like(image, 7)])
    assert synthesis.total_variation(both).item() == pytest.approx(expected / 2)


def test_l2_is_the_mean_of_the_images_norms() -> None:
    images = torch.zeros(2, 1, 2, 2)
    images[0, 0, 0] = torch.tensor([3.0, 4.0])
    assert synthesis.l2(images).item() == 2.5


def test_competition_is_1_where_networks_agree_and_least_where_each_is_sure_of_another_class() -> None:
    agreeing = torch.tensor([[2.0, 0.0, -1.0]])
    assert synthesis.competition(agreeing, agreeing + 5).item() == pytest.approx(1)
    opposed = synthesis.competition(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]))
    assert opposed.item() == pytest.approx(1 - math.log(2))
    # p = (3/4, 1/4), q = (1/2, 1/2), m = (5/8, 3/8).
    p, q, m = (0.75, 0.25), (0.5, 0.5), (0.625, 0.375)
    js = sum(a * math.log(a / c) + b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True)) / 2
    some = synthesis.competition(torch.tensor([p]).log(), torch.tensor([q]).log())
    assert some.item() == pytest.approx(1 - js)


def test_the_objective_adds_the_weighted_terms(network: nn.Sequential) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3])
    student = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))

    def loss(**weights: float) -> float:
        none = {"tv": 0.0, "l2": 0.0, "statistics": 0.0}
        settings = Synthesis(**{**none, **weights})  # type: ignore[arg-type]
        return synthesis.objective(network, images, labels, settings, student).item()

    logits = network(images)
    entropy = nn.functional.cross_entropy(logits, labels).item()
    entering = network[0](images)
    kept = network.state_dict()
    first = synthesis.statistics_distance(entering, kept["1.running_mean"], kept["1.running_var"])
    after = network[:4](images)
    second = synthesis.statistics_distance(after, kept["4.running_mean"], kept["4.running_var"])
    assert loss() == pytest.approx(entropy)
    assert loss(statistics=2.0) == pytest.approx(entropy + 2 * (first + second).item(), rel=1e-5)
    assert loss(tv=3.0) == pytest.approx(entropy + 3 * synthesis.total_variation(images).item(), rel=1e-5)
    assert loss(l2=0.5) == pytest.approx(entropy + 0.5 * synthesis.l2(images).item(), rel=1e-5)
    rivalry = synthesis.competition(logits, student(images)).item()
    assert loss(competition=4.0) == pytest.approx(entropy + 4 * rivalry, rel=1e-5)


def test_networks_see_the_view_and_priors_the_images(network: nn.Sequential) -> None:
    images, view = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).unbind()
    labels, settings = torch.tensor([0, 1, 2, 3]), Synthesis(tv=3.0, l2=0.5)
    found = synthesis.objective(network, images, labels, settings, view=view)
    none = Synthesis(tv=0.0, l2=0.0)
    of_images = 3 * synthesis.total_variation(images) + 0.5 * synthesis.l2(images)
    torch.testing.assert_close(found, synthesis.objective(network, view, labels, none) + of_images)
    half = synthesis.objective(network, images, labels, settings, view=view, half=True)
    assert half.dtype == torch.float32 and half != found
    torch.testing.assert_close(half, found, rtol=0.02, atol=0)


# ---------------------------------------------------------------- images


def test_noise_to_begin_with_has_amplitudes_that_fall_as_one_over_frequency() -> None:
    noise = synthesis.natural_noise((64, 3, 32, 48), torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(1, abs=1e-4)
    amplitude = torch.fft.rfft2(noise).abs().square().mean((0, 1)).sqrt()
    # Down at 2/32 and 8/32 of a cycle a pixel, across at 3/48 and 12/48.
    assert (amplitude[2, 0] / amplitude[8, 0]).item() == pytest.approx(4, rel=0.15)
    assert (amplitude[0, 3] / amplitude[0, 12]).item() == pytest.approx(4, rel=0.15)
    assert (amplitude[2, 0] / amplitude[0, 3]).item() == pytest.approx(1, rel=0.15)


def test_views_are_crops_of_their_own_out_of_a_black_border() -> None:
    black = torch.tensor([-1.0, -2.0, -3.0]).view(3, 1, 1)
    images = torch.rand(40, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    views = synthesis.jittered("pad", images, black, torch.Generator().manual_seed(1))
    assert views.shape == images.shape
    border = (views == black).all(1)
    assert torch.equal(border, (views < 0).any(1))
    # Two pixels of 16 down and one of 8 across, in any number of the images up to all of them.
    missing = {(int(one.all(1).sum()), int(one.all(0).sum())) for one in border}
    assert missing == {(down, across) for down in range(3) for across in range(2)}
    for number in (number for number, one in enumerate(border) if not one.any()):
        same = [
            torch.allclose(views[number], one, atol=1e-6) for one in (images[number], images[number].flip(2))
        ]
        assert any(same)
    with pytest.raises(ValueError, match="no jitter is named 'shake'"):
        synthesis.jittered("shake", images, black, torch.Generator())  # type: ignore[arg-type]


def test_views_that_are_rolled_hold_the_same_pixels() -> None:
    images = torch.rand(5, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    views = synthesis.jittered("roll", images, torch.zeros(3, 1, 1), torch.Generator().manual_seed(2))
    assert not torch.equal(views, images)
    assert torch.equal(views.flatten(2).sort(2).values, images.flatten(2).sort(2).values)


@pytest.mark.parametrize("seen", ["roll", "pad"])
def test_the_jitter_is_that_of_the_images_whose_statistics_the_network_has(
    seen: Jitter,
) -> None:
    # The more layers there are, the less can images of one kind have the statistics of the other.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        convolutions = [
            (nn.Conv2d(inputs, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()) for inputs in (3, *[12] * 5)
        ]
        trained = nn.Sequential(
            *chain.from_iterable(convolutions), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
        )
    generator = torch.Generator().manual_seed(0)
    images = 0.5 + nn.functional.interpolate(torch.randn(64, 3, 4, 4, generator=generator), scale_factor=4.0)
    black = -(torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1, 1)
    with torch.no_grad():
        for _ in range(40):
            trained.train()(synthesis.jittered(seen, images, black, generator))
    asked = wanted(32, 16)
    settings = Synthesis(batch=32, steps=200)
    settled = synthesis.settled(trained.eval(), asked, settings)
    assert settled == dataclasses.replace(settings, jitter=seen)
    assert synthesis.settled(trained, asked, settled) is settled


def test_labels_are_even_over_the_classes() -> None:
    labels = synthesis.even_labels(11, 4, seed=5)
    assert sorted(np.bincount(labels, minlength=4)) == [2, 3, 3, 3]
    assert np.array_equal(labels, synthesis.even_labels(11, 4, seed=5))
    assert len(set(synthesis.even_labels(50, 1000, seed=5).tolist())) == 50


def test_batches_are_of_nearly_one_size() -> None:
    assert [part.stop - part.start for part in synthesis.split(10, 4)] == [3, 3, 4]
    assert synthesis.split(8, 8) == (slice(0, 8),)
    assert [part.start for part in synthesis.split(500, 125)] == [0, 125, 250, 375]


def test_pixels_come_back_from_what_a_network_takes() -> None:
    pixels = torch.randint(
        0, 256, (2, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    again = synthesis.to_pixels(normalised(pixels, MEAN, STD), MEAN, STD)
    assert np.array_equal(again, pixels.permute(0, 2, 3, 1).numpy())
    assert synthesis.to_pixels(torch.full((1, 3, 1, 1), 99.0), MEAN, STD).tolist() == [[[[255, 255, 255]]]]
    assert synthesis.to_pixels(torch.full((1, 3, 1, 1), -99.0), MEAN, STD).tolist() == [[[[0, 0, 0]]]]


def test_statistics_come_nearer_and_classes_are_met(network: nn.Sequential) -> None:
    def judged(steps: int) -> tuple[float, float]:
        asked = wanted(16)
        settings = Synthesis(steps=steps, lr=0.1, batch=16)
        pixels = torch.from_numpy(next(synthesis.synthesize(network, asked, settings))).permute(0, 3, 1, 2)
        with synthesis.watched(network) as distances, torch.no_grad():
            logits = network(normalised(pixels, MEAN, STD))
        entropy = nn.functional.cross_entropy(logits, torch.from_numpy(asked.labels))
        return sum(float(distance) for distance in distances), float(entropy)

    early, late = judged(1), judged(40)
    assert late[0] < 0.7 * early[0]
    assert late[1] < early[1]


def test_a_batch_hangs_on_the_seed_and_its_number_alone(network: nn.Sequential) -> None:
    whole = list(synthesis.synthesize(network, wanted(), FEW))
    assert [batch.shape for batch in whole] == [(4, 8, 8, 3), (4, 8, 8, 3)]
    (later,) = synthesis.synthesize(network, wanted(), FEW, first=1)
    assert np.array_equal(later, whole[1])
    assert not np.array_equal(whole[0], whole[1])
    (other,) = islice(synthesis.synthesize(network, wanted(seed=1), FEW), 1)
    assert not np.array_equal(other, whole[0])


def test_the_network_stays_as_it_was(network: nn.Sequential) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    list(synthesis.synthesize(network, wanted(4), FEW))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in network.parameters())
    assert not any(layer._forward_pre_hooks for layer in network.modules())


def test_steps_are_told_over_all_batches(network: nn.Sequential) -> None:
    told: list[int] = []
    settings = Synthesis(steps=60, batch=1, jitter="roll")
    list(synthesis.synthesize(network, wanted(2), settings, told=lambda done, loss: told.append(done)))
    assert told == [50, 60, 110, 120]


@pytest.mark.parametrize(("halved", "sizes"), [(True, [16, 16, 32]), (False, [32, 32, 32])])
def test_large_images_are_begun_at_half_their_size(
    network: nn.Sequential, monkeypatch: pytest.MonkeyPatch, halved: bool, sizes: list[int]
) -> None:
    monkeypatch.setattr(synthesis, "HALVED_FROM", 32)
    seen: list[int] = []

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.shape[2])
            answer: torch.Tensor = self.whole(images)
            return answer

    (batch,) = synthesis.synthesize(
        Seeing(), wanted(2, 32, halved=halved), Synthesis(steps=3, batch=2, jitter="roll")
    )
    assert (seen, batch.shape) == (sizes, (2, 32, 32, 3))


def test_a_network_without_batch_norm_is_refused() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    with pytest.raises(
        UsageError, match=r"cannot be made from this network: it has no batch-norm that keeps"
    ):
        next(synthesis.synthesize(plain, wanted(), FEW))


def test_a_loss_that_is_not_finite_ends_it(network: nn.Sequential) -> None:
    broken = copy.deepcopy(network)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(RunError, match=r"the loss of the images is nan: the network's answers are not"):
        list(synthesis.synthesize(broken, wanted(4), FEW))
