"""Lines between networks, convexity and loss leakage, against quadratic losses that are known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from optpipe import graph, landscape
from optpipe.errors import UsageError
from optpipe.types import Plan
from optpipe.zoo.cifar_resnet import resnet20


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def original() -> fx.GraphModule:
    """A residual network with statistics and weights of no special value."""
    network = resnet20(classes=4)
    generator = seeded(3)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return graph.trace(network.eval(), (3, 16, 16))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=seeded(5))


# ---------------------------------------------------------------- lines


def test_a_line_holds_both_ends_and_their_mean_half_way() -> None:
    start = {"weight": torch.tensor([1.0, 2.0]), "running_var": torch.tensor([4.0])}
    end = {"weight": torch.tensor([3.0, -2.0]), "running_var": torch.tensor([1.0])}
    for share, weight, variance in ((0.0, [1.0, 2.0], 4.0), (0.5, [2.0, 0.0], 2.5), (1.0, [3.0, -2.0], 1.0)):
        mixed = landscape.between(start, end, share)
        assert mixed["weight"].tolist() == weight
        assert mixed["running_var"].tolist() == [variance]


def test_beyond_its_ends_a_line_goes_on_straight_but_no_variance_falls_to_zero() -> None:
    start = {"weight": torch.tensor([1.0]), "bn.running_var": torch.tensor([10.0])}
    end = {"weight": torch.tensor([3.0]), "bn.running_var": torch.tensor([0.5])}
    mixed = landscape.between(start, end, 1.5)
    assert mixed["weight"].tolist() == [4.0]
    assert mixed["bn.running_var"].tolist() == pytest.approx([0.05])


def test_counters_are_the_first_networks() -> None:
    start, end = {"batches": torch.tensor(7)}, {"batches": torch.tensor(9)}
    assert landscape.between(start, end, 0.5)["batches"] == 7


def test_a_linear_network_changes_linearly_along_a_line_and_is_left_as_it_was() -> None:
    network = nn.Linear(1, 1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ends = (
        {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)},
        {"weight": torch.ones(1, 1), "bias": torch.ones(1)},
    )
    x = torch.tensor([[3.0]])
    with torch.no_grad():
        values = landscape.along(network, ends, (0.0, 0.25, 1.0), lambda moving: float(moving(x)))
    assert values == (0.0, 1.0, 4.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_ends_of_another_structure_are_refused() -> None:
    with pytest.raises(UsageError, match="own names and shapes"):
        landscape.along(nn.Linear(2, 1), ({"weight": torch.zeros(1, 2)}, {}), (0.0, 1.0), lambda _: 0)


# ---------------------------------------------------------------- the original's structure


@pytest.mark.parametrize(
    "plan",
    [
        Plan(drop_blocks=("layer1.1", "layer3.2")),
        Plan(keep_channels=(("layer1.0.conv1", (0, 3, 7)), ("layer2.1.conv1", tuple(range(5, 20))))),
        Plan(drop_blocks=("layer2.1",), keep_channels=(("layer3.1.conv1", tuple(range(0, 64, 2))),)),
    ],
    ids=["blocks", "filters", "both"],
)
def test_a_pruned_network_computes_the_same_inside_the_originals_structure(
    original: fx.GraphModule, plan: Plan
) -> None:
    pruned = graph.apply(original, plan, (3, 16, 16))
    with torch.no_grad():  # it need not be the original's any more
        for parameter in pruned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(9)) * 0.01)
    state = landscape.embed(original, plan, (3, 16, 16), pruned.state_dict())
    inside = graph.trace(resnet20(classes=4).eval(), (3, 16, 16))
    inside.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(inside(images()), pruned(images()), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(original(images()), pruned(images()), rtol=1e-2)


def test_dropped_blocks_are_zero_there_and_the_original_keeps_its_weights(original: fx.GraphModule) -> None:
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    plan = Plan(drop_blocks=("layer1.1",))
    pruned = graph.apply(original, plan, (3, 16, 16))
    state = landscape.embed(original, plan, (3, 16, 16), pruned.state_dict())
    inside = {name for name, _ in original.named_parameters() if name.startswith("layer1.1.")}
    assert len(inside) == 6
    assert all(not state[name].any() for name in inside)
    assert all(torch.equal(state[name], before[name]) for name in before if name not in inside)
    assert all(torch.equal(before[name], tensor) for name, tensor in original.state_dict().items())


# ---------------------------------------------------------------- convexity

FIFTHS = (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)


def test_a_parabola_lies_below_its_chord_and_leaks_a_quarter_of_its_curvature() -> None:
    found = landscape.convexity((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.0625, 0.25, 0.5625, 1.0))
    assert (found.below, found.excess, found.leakage, found.at) == (1.0, 0.0, 0.25, 0.5)


def test_a_straight_line_is_convex_and_leaks_nothing() -> None:
    found = landscape.convexity(FIFTHS, [3 - share for share in FIFTHS])
    assert (found.below, found.excess, found.leakage, found.at) == (1.0, 0.0, 0.0, 0.0)


def test_a_barrier_is_seen_by_its_height_and_its_share() -> None:
    found = landscape.convexity((0.0, 0.25, 0.5, 0.75, 1.0), (1.0, 1.5, 1.2, 0.4, 1.0))
    assert found.below == pytest.approx(1 / 3)
    assert found.excess == pytest.approx(0.5)
    assert found.leakage == pytest.approx(0.6)
    assert found.at == 0.75


def test_what_lies_beyond_the_ends_does_not_count() -> None:
    inside = landscape.convexity((0.0, 0.5, 1.0), (1.0, 0.5, 1.0))
    assert landscape.convexity((-0.5, 0.0, 0.5, 1.0, 1.5), (99.0, 1.0, 0.5, 1.0, -99.0)) == inside


@pytest.mark.parametrize("shares", [(0.0, 1.0), (0.1, 0.5, 1.0), (0.0, 0.5, 0.9)])
def test_a_chord_needs_both_ends_and_a_point_between(shares: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="between the shares 0 and 1"):
        landscape.convexity(shares, [1.0] * len(shares))


# ---------------------------------------------------------------- what more images would do


def regression(count: int, features: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Inputs, and targets that are their sum with noise of variance 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, features))
    return x, x.sum(axis=1) + rng.normal(size=count)


def fitted(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.linalg.lstsq(x, y, rcond=None)[0].astype(np.float64)
    return weights


def squares(
    weights: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    return (x @ weights - y) ** 2


def test_the_gap_of_a_regression_tells_what_twice_the_images_save() -> None:
    """20 weights from 200 points: errors of about 1 + 20/200 unseen, 1 + 20/400 with twice as many."""
    savings, predicted = [], []
    for seed in range(20):
        (x, y), unseen = regression(400, 20, seed=seed), regression(1000, 20, seed=1000 + seed)
        weights = fitted(x[:200], y[:200])
        nothing = np.zeros(20)
        found = landscape.gap(
            (squares(nothing, x[:200], y[:200]), squares(weights, x[:200], y[:200])),
            (squares(nothing, *unseen), squares(weights, *unseen)),
            np.random.default_rng(0),
        )
        assert found.ratio.ci95[0] < found.ratio.value < found.ratio.ci95[1]
        predicted.append((1 - 1 / found.ratio.value) / 4)
        savings.append(1 - squares(fitted(x, y), *unseen).mean() / squares(weights, *unseen).mean())
    assert np.mean(savings) == pytest.approx(0.05, abs=0.01)
    assert np.mean(predicted) == pytest.approx(np.mean(savings), abs=0.012)


def test_the_gap_of_known_errors() -> None:
    """Seen 4 -> 1, unseen 6 -> 3: 3 times after and 1.5 times before, so 2 times by recovery."""
    found = landscape.gap(
        (np.full(5, 4.0), np.full(5, 1.0)), (np.full(9, 6.0), np.full(9, 3.0)), np.random.default_rng(0)
    )
    assert (found.seen, found.unseen) == (1.0, 3.0)
    assert found.ratio.value == pytest.approx(3)
    assert found.control.value == pytest.approx(1.5)
    assert found.growth.value == pytest.approx(2)
    assert found.doubling.value == pytest.approx(0.125)
    assert found.doubling.ci95 == pytest.approx((0.125, 0.125))


@pytest.mark.parametrize("seen", [np.zeros(3), np.array([1.0, np.inf, 1.0]), np.zeros(0)])
def test_errors_without_a_ratio_are_refused(seen: NDArray[np.float64]) -> None:
    whole = np.ones(3)
    with pytest.raises(UsageError, match="errors"):
        landscape.gap((seen, seen), (whole, whole), np.random.default_rng(0))


def test_leakage_between_halves_of_a_regression_is_what_their_union_saves() -> None:
    """Eq. 12 with a constant of 1: 20 weights from 2 x 200 points leak about 20/400."""
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    leaked, saved = [], []
    for seed in range(20):
        (x, y), unseen = regression(400, 20, seed=seed), regression(1000, 20, seed=1000 + seed)
        a, b = fitted(x[:200], y[:200]), fitted(x[200:], y[200:])
        line = [squares((1 - share) * a + share * b, *unseen) for share in shares]
        found = landscape.leakage(shares, line, squares(fitted(x, y), *unseen), np.random.default_rng(0))
        assert found.leakage.ci95[0] <= found.leakage.value <= found.leakage.ci95[1]
        leaked.append(found.relative.value)
        saved.append(found.union.value)
    assert np.mean(leaked) == pytest.approx(0.05 / 1.05, abs=0.01)
    assert np.mean(leaked) == pytest.approx(np.mean(saved), abs=0.01)


def test_leakage_of_known_errors() -> None:
    """Errors 4 and 2 at the ends, 1 in the middle: 2 below the chord; the whole has 2, so 1 times that."""
    line = [np.full(6, 4.0), np.full(6, 1.0), np.full(6, 2.0)]
    found = landscape.leakage((0.0, 0.5, 1.0), line, np.full(6, 2.0), np.random.default_rng(0))
    assert [found.half, found.whole] == pytest.approx([3, 2])
    assert found.leakage.value == pytest.approx(2)
    assert found.relative.value == pytest.approx(1)
    assert found.union.value == pytest.approx(0.5)


def test_the_same_generator_gives_the_same_interval() -> None:
    errors = np.random.default_rng(1).exponential(size=40)
    one, other = (
        landscape.gap((errors, errors / 2), (errors, errors), np.random.default_rng(7)) for _ in range(2)
    )
    assert one == other
