"""The cost surface against synthetic latencies, and the optimum against problems solved by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from optpipe.errors import RunError, UsageError
from optpipe.methods.three_d.comparison import left_out, relative_error
from optpipe.methods.three_d.cost import CostSurface, fit_cost, formula
from optpipe.methods.three_d.optimum import optimise, realisable
from optpipe.methods.three_d.predictor import Predictor

Array = NDArray[np.float64]

# x (2 - x) in each dimension: 1 at 1, with slope 0 there.
HUMP = (0.0, 2.0, -1.0)
HUMPS = Predictor(((HUMP, HUMP, HUMP),))
LOWER = (0.1, 0.1, 0.1)
AXES = np.array(
    [(1.0, 1.0, 1.0)]
    + [
        tuple(x if i == dimension else 1.0 for i in range(3))
        for dimension in range(3)
        for x in (0.4, 0.55, 0.7, 0.85)
    ]
)
INSIDE = np.array([(0.8, 0.8, 0.8), (0.6, 0.9, 0.7), (0.9, 0.6, 0.8)])


def latency(points: Array, overhead: float, blocks: int = 27) -> Array:
    """A made-up engine: fixed time, and layers that take their arithmetic or their launch, whichever is more.

    Three stages, each of half the resolution and twice the channels; the stem is no unit of depth.
    """
    found = []
    for d, w, r in points:
        whole = max(overhead, 0.4 * w * r**2) + 2 * overhead
        for stage in range(3):
            work = w**2 * r**2 * (1.0 + 0.2 * stage) + 0.3 * w * r**2 / 2**stage
            whole += (1 + (blocks // 3 - 1) * d) * 2 * max(overhead, work)
        found.append(whole)
    return np.array(found)


def ratios(points: Array, overhead: float) -> Array:
    return np.asarray(latency(points, overhead) / latency(np.ones((1, 3)), overhead))


# ---------------------------------------------------------------- cost


def test_the_papers_cost_is_worked_out_by_hand() -> None:
    # 0.5 * 0.64 * 0.25; by d 0.64 * 0.25, by w 0.5 * 1.6 * 0.25, by r 0.5 * 0.64 * 1.
    assert formula()([(0.5, 0.8, 0.5)]).tolist() == pytest.approx([0.08])
    assert formula().gradient([(0.5, 0.8, 0.5)]).tolist() == [pytest.approx([0.16, 0.2, 0.32])]


def test_a_cost_surface_is_worked_out_by_hand() -> None:
    # w r^2 = 1/4: 0.1 + 0.2 / 2 + (0.3 + 0.4 / 2) / 4. By d 0.2 + 0.4 / 4, by w 0.5 / 4, by r 0.5 * 2 * 0.5.
    surface = CostSurface((0.1, 0.2, 0.3, 0.4), (1.0, 2.0))
    assert surface([(0.5, 1.0, 0.5)]).tolist() == pytest.approx([0.325])
    assert surface.gradient([(0.5, 1.0, 0.5)]).tolist() == [pytest.approx([0.3, 0.125, 0.5])]


def test_work_below_the_floor_costs_the_floor() -> None:
    surface = CostSurface((0.0, 0.0, 1.0, 0.0), (2.0, 2.0), floor=0.5)
    # ((1/2)^4 / ((1/2)^4 + 1))^(1/4), and nothing more to be had there.
    assert surface([(1.0, 0.1, 0.1)]).tolist() == pytest.approx([(1 / 17) ** 0.25], rel=1e-6)
    assert np.abs(surface.gradient([(1.0, 0.1, 0.1)])).max() < 1e-6
    assert surface([(0.3, 1.0, 1.0)]).tolist() == [1.0]


def test_the_gradient_of_a_cost_surface_is_that_of_its_values() -> None:
    surface = CostSurface((0.1, 0.2, 0.3, 0.4), (1.3, 2.2), floor=0.6)
    point = np.array([0.7, 0.8, 0.9])
    steps = 1e-6 * np.eye(3)
    slopes = (surface(point + steps) - surface(point - steps)) / 2e-6
    assert surface.gradient(point)[0].tolist() == pytest.approx(slopes.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    "truth",
    [
        formula(),
        CostSurface((0.2, 0.0, 0.1, 0.7), (1.5, 1.8)),
        CostSurface((0.1, 0.1, 0.2, 0.6), (2.0, 2.0), 0.5),
    ],
    ids=["formula", "powers", "floor"],
)
def test_a_cost_surface_is_found_again_from_axes_and_a_few_points_inside(truth: CostSurface) -> None:
    points = np.concatenate([AXES, INSIDE])
    found = fit_cost(points, truth(points))
    elsewhere = np.array(list(product((0.4, 0.6, 0.8, 1.0), repeat=3)))
    elsewhere = elsewhere[truth(elsewhere) > 0.2]
    assert relative_error(found(elsewhere), truth(elsewhere)) < 0.005


def test_a_cost_surface_is_one_at_the_original_and_grows_in_each_dimension_whatever_was_measured() -> None:
    rng = np.random.default_rng(5)
    points = rng.uniform(0.3, 1.0, (16, 3))
    found = fit_cost(points, rng.uniform(0.2, 1.2, 16))
    assert found([(1.0, 1.0, 1.0)]).tolist() == pytest.approx([1.0], abs=1e-3)
    assert found.gradient(rng.uniform(0.01, 1.0, (200, 3))).min() >= 0
    assert min(found.terms) >= 0


def test_by_default_errors_of_the_cost_count_relative_to_it() -> None:
    # At one place 0.1 and 0.3 were measured: (x / 0.1 - 1)^2 + (x / 0.3 - 1)^2 is least at 0.12.
    points = [(0.01, 0.01, 0.01)] * 2
    assert fit_cost(points, [0.1, 0.3])(points[:1])[0] == pytest.approx(0.12, abs=1e-3)
    assert fit_cost(points, [0.1, 0.3], weights=[1, 1])(points[:1])[0] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(("overhead", "limit"), [(0.0, 0.01), (0.2, 0.01), (0.5, 0.04)])
def test_a_made_up_engines_latency_inside_is_predicted_from_axes_and_three_points(
    overhead: float, limit: float
) -> None:
    points = np.concatenate([AXES, INSIDE])
    found = fit_cost(points, ratios(points, overhead))
    inside = np.random.default_rng(1).uniform(0.5, 1.0, (1000, 3))
    truths = ratios(inside, overhead)
    # Where an optimum may lie: a cut by a fifth to a half.
    asked = (truths > 0.5) & (truths < 0.8)
    error = relative_error(found(inside[asked]), truths[asked])
    print(f"overhead {overhead}: {error:.2%} over {asked.sum()} points inside")
    assert error < limit


def test_the_cost_of_points_left_out_can_be_told() -> None:
    points = np.concatenate([AXES, INSIDE])
    measured = ratios(points, 0.2)
    assert relative_error(left_out(fit_cost, points, measured), measured) < 0.05


def test_a_ratio_that_is_not_positive_is_refused() -> None:
    with pytest.raises(RunError, match=r"0\.5, 0 cannot be fitted"):
        fit_cost([(1.0, 1.0, 1.0), (0.5, 1.0, 1.0)], [0.5, 0.0])


# ---------------------------------------------------------------- optimum


def test_two_dimensions_of_equal_worth_share_the_cut() -> None:
    # With d = 1, w r = 1/4 = s: the value s (4 - 2 (w + r) + s) is highest where w + r is least, at 1/2 each.
    found = optimise(HUMPS, formula(), 1 / 16, LOWER, ("width", "resolution"))
    assert found.point == pytest.approx((1.0, 0.5, 0.5), abs=1e-4)
    assert found.value == pytest.approx(0.5625, abs=1e-6)
    assert found.taken == "solver"
    assert found.agree
    assert found.spacing[0] == 0.0


def test_the_solvers_point_satisfies_the_conditions_of_lagrange() -> None:
    smooth = Predictor(((HUMP, HUMP, (0.1, 1.8, -0.9)),))
    found = optimise(smooth, formula(), 0.5, LOWER)
    assert found.solver is not None
    d, w, r = found.solver.point
    assert all(0.1 < share < 0.999 for share in (d, w, r)), "the case must be one without a bound"
    # Eq. 8: the first line, then the other three with one multiplier.
    assert d * w**2 * r**2 == pytest.approx(0.5, abs=1e-6)
    by_d, by_w, by_r = smooth.gradient([(d, w, r)])[0]
    multiplier = -by_d / (w**2 * r**2)
    assert multiplier < 0
    assert by_w + multiplier * 2 * d * w * r**2 == pytest.approx(0.0, abs=1e-4)
    assert by_r + multiplier * 2 * d * w**2 * r == pytest.approx(0.0, abs=1e-4)


def test_one_dimension_alone_takes_the_whole_cut() -> None:
    found = optimise(HUMPS, formula(), 0.6, LOWER, ("depth",))
    assert found.point == pytest.approx((0.6, 1.0, 1.0), abs=1e-5)
    assert abs(found.grid.point[0] - 0.6) <= found.spacing[0]


def test_less_is_taken_where_less_is_predicted_to_be_better() -> None:
    # x (1.2 - x) is highest at 0.6, where 0.36 of the cost is far below the 0.9 allowed.
    peak = Predictor((((1.0,), (0.0, 1.2, -1.0), (1.0,)),))
    found = optimise(peak, formula(), 0.9, LOWER, ("width",))
    assert found.point == pytest.approx((1.0, 0.6, 1.0), abs=1e-4)
    assert found.best.cost == pytest.approx(0.36, abs=1e-3)


def test_the_grid_finds_the_higher_of_two_peaks_and_so_does_the_solver() -> None:
    # A quartic in d with maxima at 0.2 and 0.8, that at 0.2 higher: its slope is -(x - 0.2)(x - 0.5)(x - 0.8)
    # times 50, less 0.2.
    slope = np.polynomial.Polynomial.fromroots([0.2, 0.5, 0.8]) * -50 - 0.2
    peaks = Predictor(((tuple(slope.integ(k=0.5).coef.tolist()), (1.0,), (1.0,)),))
    found = optimise(peaks, formula(), 0.95, LOWER, ("depth",))
    assert found.point[0] == pytest.approx(0.17, abs=0.03)
    assert found.agree


def test_lower_ends_hold() -> None:
    found = optimise(HUMPS, formula(), 0.3, (0.9, 0.8, 0.5))
    assert found.point[0] >= 0.9
    assert found.point[1] >= 0.8
    assert found.point[2] < 0.8
    assert found.best.cost <= 0.3 * (1 + 1e-5)


def test_a_budget_below_the_smallest_network_says_what_that_costs() -> None:
    with pytest.raises(RunError, match=r"resolution 0\.5\) is predicted to cost 25\.0% .* 20\.0% is allowed"):
        optimise(HUMPS, formula(), 0.2, (0.5, 0.5, 0.5), ("resolution",))


def test_a_lower_end_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="lowest width is 0"):
        optimise(HUMPS, formula(), 0.5, (0.5, 0.0, 0.5))


# ---------------------------------------------------------------- networks that can be built


def test_networks_that_can_be_built_are_sorted_by_what_is_predicted_and_within_the_budget() -> None:
    found = realisable(HUMPS, formula(), 0.5, ((1.0, 0.5), (1.0, 0.75), (1.0, 0.8)))
    # Of the eight, (1, 1, 1), (1, 0.75, 1) with 0.5625 and (1, 1, 0.8) with 0.64 cost too much.
    assert [candidate.point for candidate in found] == [
        (1.0, 0.75, 0.8),
        (0.5, 1.0, 1.0),
        (0.5, 1.0, 0.8),
        (0.5, 0.75, 1.0),
        (0.5, 0.75, 0.8),
    ]
    assert found[0].value == pytest.approx(0.9375 * 0.96)
    assert found[0].cost == pytest.approx(0.36)


def test_only_networks_near_the_best_are_given_where_asked() -> None:
    found = realisable(HUMPS, formula(), 0.5, ((1.0, 0.5), (1.0, 0.75), (1.0, 0.8)), within=0.17)
    # 0.9, then 0.75; the next, 0.72, is too far.
    assert [candidate.value for candidate in found] == pytest.approx([0.9, 0.75])


def test_of_equal_predictions_the_cheaper_network_comes_first() -> None:
    flat = Predictor((((0.9,), (1.0,), (1.0,)),))
    found = realisable(flat, formula(), 1.0, ((1.0, 0.5), (1.0,), (1.0,)))
    assert [candidate.point[0] for candidate in found] == [0.5, 1.0]


def test_no_network_within_the_budget_says_so() -> None:
    with pytest.raises(RunError, match=r"depth 0\.5, width 0\.75, resolution 1\) .* 28\.1% "):
        realisable(HUMPS, formula(), 0.2, ((1.0, 0.5), (1.0, 0.75), (1.0,)))
