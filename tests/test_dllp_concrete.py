"""Masks of the gates: exact probabilities when hard, right gradients when relaxed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optpipe.errors import RunError
from optpipe.methods.dllp.concrete import inclusion, sample, temperature, two_of_four

FOUR = torch.tensor([-1.0, 0.0, 0.5, 1.5], dtype=torch.float64)
Masks = Callable[[Tensor, float, torch.Generator, bool], Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within_binomial_error(found: Tensor, wanted: Tensor, draws: int) -> bool:
    return bool(((found - wanted).abs() < 4 * (wanted * (1 - wanted) / draws).sqrt()).all())


@pytest.mark.parametrize("at", [1.0, 0.2])
def test_hard_masks_are_bernoulli_at_every_temperature(at: float) -> None:
    logits = torch.tensor([-3.0, -1.0, 0.0, 0.7, 4.0])
    masks = sample(logits.expand(20_000, 5), at, seeded(), hard=True)
    assert set(masks.flatten().tolist()) == {0.0, 1.0}
    assert within_binomial_error(masks.mean(0), torch.sigmoid(logits), 20_000)


def test_relaxed_masks_lie_between_and_tend_to_the_hard_ones() -> None:
    logits = torch.linspace(-2, 2, 2000)
    warm, hard = sample(logits, 1.0, seeded()), sample(logits, 1.0, seeded(), hard=True)
    cold = sample(logits, 1e-3, seeded())
    assert float(warm.min()) > 0
    assert float(warm.max()) < 1
    assert bool(((warm > 0.5) == (hard == 1)).all())
    assert float((cold - hard).abs().mean()) < 0.002


def test_extreme_gates_are_closed_and_open_without_nan() -> None:
    logits = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    for hard in (False, True):
        masks = sample(logits.expand(100, 4), 0.05, seeded(), hard)
        (slope,) = torch.autograd.grad(masks.sum(), logits)
        assert masks.mean(0).tolist() == [0.0, 0.0, 1.0, 1.0]
        assert bool(slope.isfinite().all())


def value(masks: Masks, logits: Tensor, at: float, hard: bool = False) -> Tensor:
    """A number that depends on all masks unevenly, of the same noise at every call."""
    found = masks(logits, at, seeded(5), hard)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)
    return (weights * found).sum() + (found**2).sum()


@pytest.mark.parametrize("masks", [sample, two_of_four])
@pytest.mark.parametrize("at", [1.0, 0.5, 0.2])
def test_gradients_of_relaxed_masks_are_those_of_finite_differences(masks: Masks, at: float) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    (slope,) = torch.autograd.grad(value(masks, logits, at), logits)
    assert float(slope.abs().max()) > 0.1
    step = 1e-6
    for i, j in itertools.product(range(3), range(4)):
        away = torch.zeros(3, 4, dtype=torch.float64)
        away[i, j] = step
        high, low = (value(masks, logits.detach() + sign * away, at) for sign in (1, -1))
        assert float(slope[i, j]) == pytest.approx(float(high - low) / (2 * step), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("masks", [sample, two_of_four])
def test_hard_masks_borrow_the_gradient_of_the_relaxed(masks: Masks) -> None:
    logits = torch.randn(8, 4, dtype=torch.float64, generator=seeded(2), requires_grad=True)
    weights = torch.randn(8, 4, dtype=torch.float64, generator=seeded(3))
    slopes = [
        torch.autograd.grad((weights * masks(logits, 0.7, seeded(4), hard)).sum(), logits)[0]
        for hard in (False, True)
    ]
    assert torch.equal(slopes[0], slopes[1])


def test_masks_are_the_same_for_the_same_generator_and_in_every_type() -> None:
    logits = torch.linspace(-3, 3, 64)
    first, again = (sample(logits, 0.5, seeded(7)) for _ in range(2))
    other = sample(logits, 0.5, seeded(8))
    double = sample(logits.double(), 0.5, seeded(7))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.allclose(first.double(), double, atol=1e-6)


def test_two_of_each_four_stay() -> None:
    logits = 5 * torch.randn(500, 3, 4, generator=seeded(1))
    masks = two_of_four(logits, 0.3, seeded(2), hard=True)
    assert set(masks.flatten().tolist()) == {0.0, 1.0}
    assert bool((masks.sum(-1) == 2).all())
    ties = two_of_four(torch.full((200, 4), 1e8), 0.3, seeded(3), hard=True)
    assert bool((ties.sum(-1) == 2).all())


def test_relaxed_choices_sum_to_two_and_tend_to_the_hard_ones() -> None:
    logits = torch.randn(2000, 4, generator=seeded(1))
    for at in (1.0, 0.3):
        assert two_of_four(logits, at, seeded(2)).sum(-1).tolist() == pytest.approx([2.0] * 2000, abs=1e-5)
    cold, hard = two_of_four(logits, 0.01, seeded(2)), two_of_four(logits, 0.01, seeded(2), hard=True)
    assert float((cold - hard).abs().mean()) < 0.005


def test_two_of_four_keeps_each_with_the_probability_of_drawing_without_putting_back() -> None:
    p = torch.softmax(FOUR, 0).tolist()
    wanted = [
        p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)
    ]  # fmt: skip
    assert inclusion(FOUR).tolist() == pytest.approx(wanted)
    assert sum(wanted) == pytest.approx(2)
    assert wanted == sorted(wanted)
    masks = two_of_four(FOUR.expand(20_000, 4), 0.5, seeded(), hard=True)
    assert within_binomial_error(masks.mean(0), inclusion(FOUR), 20_000)


def test_extreme_choices_have_finite_gradients() -> None:
    logits = torch.tensor([[-300.0, 300.0, 0.0, 200.0]], requires_grad=True)
    for hard in (False, True):
        masks = two_of_four(logits, 0.05, seeded(), hard)
        (slope,) = torch.autograd.grad((masks * torch.arange(4.0)).sum(), logits)
        assert masks.tolist()[0] == pytest.approx([0.0, 1.0, 0.0, 1.0], abs=1e-6)
        assert bool(slope.isfinite().all())
    assert inclusion(logits).tolist()[0] == pytest.approx([0.0, 1.0, 0.0, 1.0], abs=1e-6)


def test_the_temperature_falls_by_equal_factors_between_its_ends() -> None:
    course = [temperature(step, 5, 2.0, 0.125) for step in range(5)]
    assert course == pytest.approx([2.0, 1.0, 0.5, 0.25, 0.125])
    assert temperature(0, 1, 2.0, 0.1) == 2.0
    assert math.isclose(temperature(9, 5, 2.0, 0.1), 0.1)


def test_what_cannot_be_sampled_says_why() -> None:
    with pytest.raises(RunError, match=r"temperature must be above zero, not 0"):
        sample(torch.zeros(2), 0, seeded())
    with pytest.raises(RunError, match=r"last dimension is of \(2, 3\)"):
        two_of_four(torch.zeros(2, 3), 0.5, seeded())
