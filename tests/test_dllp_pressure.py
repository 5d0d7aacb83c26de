"""What presses units out: costs along measured counts, costs of units, and the mu that meets a budget."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from optpipe import graph
from optpipe.methods._ladder import Ladder, Rung
from optpipe.methods.dllp.pressure import Kept, Sized, Timed, along, multiplier, unit_costs

SHAPE = (3, 8, 8)


def rung(count: int, saving: float) -> Rung:
    return Rung(count, saving, saving - 0.001, saving + 0.001)


# Of 16 channels 12 save a tenth and 4 a half; 8 are no faster than 12 and no rung.
LADDER = Ladder(16, (0, 2), (0.25, 0.75), (rung(12, 0.1), rung(8, 0.1), rung(4, 0.5)))
STIFF = Ladder(8, (1,), (1.0,), (rung(6, 0.0), rung(2, 0.0)))


def counts(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_layers() -> graph.Costs:
    """Two groups, of 4 and 8 channels."""
    layers = [nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 8, 1, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2, bias=False))
    return graph.Costs(model.eval(), SHAPE)


# ---------------------------------------------------------------- along what was measured


@pytest.mark.parametrize(
    ("count", "saving"),
    [
        (16, 0.0),
        (14, 0.05),
        (12, 0.1),
        (10, 0.2),  # a quarter of the way from 12 to 4, and from 0.1 to 0.5
        (4.5, 0.475),
        (4, 0.5),
        (1, 0.5),  # below the lowest rung nothing was measured
        (20, 0.0),
    ],
)
def test_savings_lie_on_lines_between_the_rungs(count: float, saving: float) -> None:
    assert along(LADDER, count) == pytest.approx(saving)


def test_a_class_that_is_never_faster_saves_nothing() -> None:
    assert STIFF.rungs == ()
    assert [along(STIFF, count) for count in (8, 5.5, 1)] == [0, 0, 0]


def test_measured_savings_add_up_by_each_groups_share() -> None:
    timed = Timed((LADDER, STIFF))
    assert timed.cost(counts(16, 8, 16)) == 1
    assert timed.cost(counts(12, 8, 16)) == pytest.approx(1 - 0.25 * 0.1)
    assert timed.cost(counts(12, 1, 4)) == pytest.approx(1 - 0.25 * 0.1 - 0.75 * 0.5)


def test_sizes_are_the_arithmetic_of_the_counts() -> None:
    costs = two_layers()
    # 3 weights for each channel of the first, so many as there are inputs for the second, 2 classes.
    whole = 3 * 4 + 4 * 8 + 8 * 2
    parameters = Sized(costs, "parameters", whole)
    assert parameters.cost(counts(4, 8)) == 1
    assert parameters.cost(counts(2, 5)) == pytest.approx((3 * 2 + 2 * 5 + 5 * 2) / whole)
    assert parameters.cost(counts(2.5, 4.5)) == pytest.approx((3 * 2.5 + 2.5 * 4.5 + 4.5 * 2) / whole)
    macs = 64 * (3 * 4 + 4 * 8) + 8 * 2
    assert Sized(costs, "MACs", macs).cost(counts(2, 5)) == pytest.approx((64 * (6 + 10) + 10) / macs)


def test_single_weights_count_alike() -> None:
    assert Kept(40).cost(counts(8, 12)) == 0.5


# ---------------------------------------------------------------- what a unit costs


def test_units_cost_what_half_of_them_save_and_one_on_average() -> None:
    # Half of each: of group 0 0.25 * 0.3, of group 2 0.75 * 0.3, each over 8 channels; of group 1 nothing.
    assert along(LADDER, 8) == pytest.approx(0.3)
    sizes = (16, 8, 16)
    found = unit_costs(Timed((LADDER, STIFF)), sizes)
    raw = [0.25 * 0.3 / 8, 0.0, 0.75 * 0.3 / 8]
    mean = sum(cost * size for cost, size in zip(raw, sizes, strict=True)) / 40
    assert found == pytest.approx([cost / mean for cost in raw])
    assert found[1] == 0
    assert sum(cost * size for cost, size in zip(found, sizes, strict=True)) / 40 == pytest.approx(1)


def test_units_of_a_network_cost_their_macs() -> None:
    macs = 64 * (3 * 4 + 4 * 8) + 8 * 2
    found = unit_costs(Sized(two_layers(), "MACs", macs), (4, 8))
    # A channel of the first is 3 inputs and, of whole 8, 8 outputs; one of the second 4 inputs and 2 classes.
    first, second = 64 * (3 + 8), 64 * 4 + 2
    mean = (4 * first + 8 * second) / 12
    assert found == pytest.approx([first / mean, second / mean])


def test_where_nothing_saves_all_units_cost_alike() -> None:
    assert unit_costs(Timed((STIFF,)), (8, 8)) == [1, 1]


# ---------------------------------------------------------------- the mu that meets the budget


@pytest.mark.parametrize("allowed", [0.9, 0.5, 0.1])
def test_mu_brings_the_expected_cost_to_what_is_allowed(allowed: float) -> None:
    odds, costs = torch.linspace(-1, 5, 30, dtype=torch.float64), torch.linspace(0.5, 1.5, 30)

    def cost(mu: float) -> float:
        return float(torch.sigmoid(odds - mu * costs).mean())

    mu = multiplier(cost, 0.05, allowed)
    assert cost(mu) == pytest.approx(min(allowed, cost(0)), abs=1e-6)
    assert cost(mu) <= allowed


def test_mu_of_equal_units_by_hand() -> None:
    # sigmoid(2 - mu) = 1/4 at mu = 2 + log 3.
    found = multiplier(lambda mu: 1 / (1 + math.exp(mu - 2)), 0.1, 0.25)
    assert found == pytest.approx(2 + math.log(3), abs=1e-6)


def test_nothing_presses_between_the_budget_and_what_is_allowed() -> None:
    assert multiplier(lambda mu: 0.6 - 0.001 * mu, 0.5, 0.7) == 0
    assert multiplier(lambda mu: 1.0, 0.5, 1.0) == 0


def test_mu_is_negative_where_evidence_alone_leaves_less_than_the_budget() -> None:
    assert multiplier(lambda mu: 0.6 - 0.001 * mu, 0.7, 0.9) == pytest.approx(-100)
    assert multiplier(lambda mu: 0.6, 0.7, 0.9) == pytest.approx(-200)


def test_a_cost_that_cannot_be_met_is_pressed_as_far_as_types_go() -> None:
    mu = multiplier(lambda mu: 1 - mu / 1e6, 0.4, 0.5)
    assert mu == pytest.approx(200)
    assert float(torch.sigmoid(torch.tensor(10.0) - mu)) == 0
