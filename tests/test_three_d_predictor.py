"""The accuracy predictor against polynomials known in advance and against the paper's own measurements."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from optpipe.errors import RunError
from optpipe.methods.three_d import tables
from optpipe.methods.three_d.collect import Point
from optpipe.methods.three_d.comparison import comparison, full, left_out, relative_error
from optpipe.methods.three_d.config import DIMENSIONS, Config
from optpipe.methods.three_d.points import on_axis
from optpipe.methods.three_d.predictor import Predictor, fit
from optpipe.methods.three_d.space import Level
from optpipe.types import Plan, Quality

Array = NDArray[np.float64]

# 2 - d, times 1 + w + w^2, times 3 r^3; plus d, times w, times 1.
TWO = Predictor((((2.0, -1.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 3.0)), ((0.0, 1.0), (0.0, 1.0), (1.0,))))
# A product of three cubics, 0.93 at (1, 1, 1), that falls ever faster towards small shares.
CUBICS = Predictor(
    (((0.6, 0.9, -0.9, 0.33), (0.85, 0.3, -0.2, 0.05), (0.5, 1.2, -1.05, 0.35)),),
)
DEPTHS, WIDTHS, SIZES = (0.11, 0.33, 0.55, 0.77, 1.0), (0.6, 0.7, 0.8, 0.9, 1.0), (0.5, 0.62, 0.75, 0.87, 1.0)
GRID = np.array(list(product(DEPTHS, WIDTHS, SIZES)))
AXES = np.array(
    [(1.0, 1.0, 1.0)]
    + [(d, 1.0, 1.0) for d in DEPTHS[:-1]]
    + [(1.0, w, 1.0) for w in WIDTHS[:-1]]
    + [(1.0, 1.0, r) for r in SIZES[:-1]]
)


# ---------------------------------------------------------------- evaluating


def test_a_predictor_is_the_sum_of_the_products_of_its_polynomials() -> None:
    # (2 - 0.5) * (1 + 2 + 4) * 3 * 8 = 252, and 0.5 * 2 * 1.
    assert TWO([(0.5, 2.0, 2.0)]).tolist() == pytest.approx([253.0])
    assert TWO([(2.0, 1.0, 1.0), (0.0, 1.0, 1.0)]).tolist() == pytest.approx([2.0, 18.0])


def test_the_gradient_of_a_predictor_is_worked_out_by_hand() -> None:
    # By d: -7 * 24 + 2. By w: 1.5 * (1 + 2 * 2) * 24 + 0.5. By r: 1.5 * 7 * 9 * 4.
    assert TWO.gradient([(0.5, 2.0, 2.0)]).tolist() == [pytest.approx([-166.0, 180.5, 378.0])]


def test_along_a_dimension_the_other_two_are_whole() -> None:
    shares = [0.5, 0.75, 1.0]
    assert TWO.along("width", shares).tolist() == TWO([(1.0, w, 1.0) for w in shares]).tolist()
    assert on_axis("resolution", shares).tolist() == [[1.0, 1.0, 0.5], [1.0, 1.0, 0.75], [1.0, 1.0, 1.0]]


def test_the_gradient_of_a_full_polynomial_is_that_of_its_monomials() -> None:
    points = np.array(list(product((0.5, 0.7, 1.0), repeat=3)))
    d, w, r = points.T
    polynomial = full(points, 0.2 + d * w**2 - 0.5 * r**2 * d, degree=2)
    # By d: w^2 - 0.5 r^2. By w: 2 d w. By r: -r d.
    assert polynomial.gradient([(0.6, 0.8, 0.9)])[0].tolist() == pytest.approx([0.235, 0.96, -0.54])


# ---------------------------------------------------------------- fitting


@pytest.mark.parametrize("points", [GRID, AXES], ids=["grid", "axes"])
def test_a_product_of_cubics_is_found_again_even_from_its_axes_alone(points: Array) -> None:
    found = fit(points, CUBICS(points))
    assert np.abs(found(GRID) - CUBICS(GRID)).max() < 1e-5


def test_a_fit_gives_the_accuracy_to_depth_and_leaves_the_other_factors_one_at_one() -> None:
    ((depth, width, resolution),) = fit(AXES, CUBICS(AXES)).coefficients
    assert sum(width) == pytest.approx(1.0)
    assert sum(resolution) == pytest.approx(1.0)
    assert sum(depth) == pytest.approx(CUBICS([(1.0, 1.0, 1.0)])[0], abs=1e-5)


def test_a_sum_of_two_products_needs_rank_two() -> None:
    d, w, r = GRID.T
    values = 0.4 * d * (2 - w) * r + 0.3 * (1.5 - d) * w * (2 - r)
    # It falls as the width grows, from 0.925 to 0.7 with the others at 1.
    plain = partial(fit, degree=1, monotone=False)
    assert np.abs(plain(GRID, values, rank=2)(GRID) - values).max() < 1e-5
    assert np.abs(plain(GRID, values, rank=1)(GRID) - values).max() > 0.02


def test_a_dimension_that_does_not_vary_has_the_factor_one() -> None:
    points = AXES[AXES[:, 2] == 1.0]
    found = fit(points, CUBICS(points))
    assert found.coefficients[0][2] == (1.0, 0.0, 0.0, 0.0)
    assert np.abs(found(points) - CUBICS(points)).max() < 1e-5
    assert found.gradient(points)[:, 2].tolist() == [0.0] * len(points)


def test_two_shares_of_a_dimension_tell_no_more_than_a_line() -> None:
    points = [(1.0, 1.0, 1.0), (0.5, 1.0, 1.0)]
    found = fit(points, [0.9, 0.7])
    assert found.along("depth", [0.75]).tolist() == pytest.approx([0.8])
    assert found.coefficients[0][0][2:] == (0.0, 0.0)


def test_points_at_one_place_are_predicted_by_their_mean() -> None:
    found = fit([(0.5, 1.0, 1.0)] * 3, [0.5, 0.6, 0.7])
    assert found([(0.5, 1.0, 1.0), (0.9, 0.3, 0.2)]).tolist() == pytest.approx([0.6, 0.6])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fewer_points_than_coefficients_are_met_without_wild_values_elsewhere(rank: int) -> None:
    rng = np.random.default_rng(3)
    points = rng.uniform(0.3, 1.0, (7, 3))
    found = fit(points, CUBICS(points), rank=rank)
    assert np.abs(found(points) - CUBICS(points)).max() < 2e-3
    inside = rng.uniform(0.3, 1.0, (500, 3))
    assert np.abs(found(inside) - CUBICS(inside)).max() < 0.2


def test_a_fit_is_the_same_every_time_and_starts_can_be_many() -> None:
    values = CUBICS(AXES) + 0.003 * np.random.default_rng(0).standard_normal(len(AXES))
    assert fit(AXES, values, rank=2, seed=4) == fit(AXES, values, rank=2, seed=4)
    one, many = fit(AXES, values, starts=1), fit(AXES, values, starts=8)
    assert np.abs(one(GRID) - many(GRID)).max() < 1e-4


def test_accuracies_of_zero_are_fitted_like_others() -> None:
    assert fit(AXES, np.zeros(len(AXES)))(AXES).tolist() == pytest.approx([0.0] * len(AXES), abs=1e-6)


def test_a_value_that_is_no_number_is_named_with_its_point() -> None:
    with pytest.raises(RunError, match=r"depth 0\.5, width 1, resolution 1 is nan"):
        fit([(1.0, 1.0, 1.0), (0.5, 1.0, 1.0)], [0.9, float("nan")])


def test_no_points_cannot_be_fitted() -> None:
    with pytest.raises(RunError, match="no point to fit"):
        fit([], [])


def test_values_of_another_number_than_points_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(13, 3\) and \(12,\)"):
        fit(AXES, np.ones(12))


def test_the_full_polynomial_has_the_least_norm_of_those_that_fit() -> None:
    # Lines a + b d through 0.9 at 1; of the constant and d alone the norm is least at equal parts. The other
    # point makes it 0.9 = a + b + c, 0.6 = a + b / 2 + c / 4.
    found = full([(1.0, 1.0, 1.0), (0.5, 1.0, 1.0)], [0.9, 0.6], degree=2)
    least = np.linalg.pinv(np.array([[1.0, 1.0, 1.0], [1.0, 0.5, 0.25]])) @ [0.9, 0.6]
    assert [plane[0][0] for plane in found.coefficients] == pytest.approx(least.tolist())


def test_ridge_shrinks_the_constant_too() -> None:
    # (t - 0.8)^2 twice plus 2 t^2 is least where 2 t - 1.6 + 2 t = 0.
    found = full([(1.0, 1.0, 1.0)] * 2, [0.8, 0.8], degree=3, ridge=2.0)
    assert np.array(found.coefficients).ravel().tolist() == pytest.approx([0.4])


# ---------------------------------------------------------------- kept from falling

# Accuracies of a network that little is taken out of: nothing lost but at the least width.
FEW = np.array(
    [(1.0, 1.0, 1.0), (1.0, 0.625, 1.0), (1.0, 0.375, 1.0), (1.0, 0.1875, 1.0)]
    + [(d, 1.0, 1.0) for d in (0.9, 0.7, 0.5)]
    + [(1.0, 1.0, r) for r in (0.9, 0.75, 0.5)]
)
LOST = np.where(FEW[:, 1] < 0.2, 0.947, 1.0)


def fall(curve: Array) -> float:
    """The most that a curve is below what it was at a smaller share."""
    return float((np.maximum.accumulate(curve) - curve).max())


def test_between_few_points_the_predictor_neither_swings_nor_exceeds_what_was_measured() -> None:
    shares = np.linspace(0.1875, 1.0, 400)
    found, plain = (fit(FEW, LOST, monotone=monotone).along("width", shares) for monotone in (True, False))
    print(f"to {found.max():.4f}, falls {fall(found):.5f}; plain {plain.max():.4f}, {fall(plain):.4f}")
    assert found.max() < 1.002
    assert fall(found) < 0.001
    assert plain.max() > 1.006
    assert fall(plain) > 0.015


@pytest.mark.parametrize("rank", [1, 2])
def test_noise_along_every_axis_makes_the_predictor_fall_along_none(rank: int) -> None:
    values = CUBICS(AXES) + 0.02 * np.random.default_rng(5).standard_normal(len(AXES))
    lows = {"depth": DEPTHS[0], "width": WIDTHS[0], "resolution": SIZES[0]}
    axes = [on_axis(dimension, np.linspace(lows[dimension], 1.0, 200)) for dimension in DIMENSIONS]
    found, plain = (fit(AXES, values, rank=rank, monotone=monotone) for monotone in (True, False))
    assert max(fall(found(axis)) for axis in axes) < 0.001
    assert max(fall(plain(axis)) for axis in axes) > 0.01
    assert found([(1.0, 1.0, 1.0)])[0] < values.max() + 0.002


@pytest.mark.parametrize("points", [GRID, AXES], ids=["grid", "axes"])
def test_what_does_not_fall_by_itself_is_fitted_as_by_plain_least_squares(points: Array) -> None:
    values = CUBICS(points)
    found, plain = fit(points, values), fit(points, values, monotone=False)
    assert np.abs(found(GRID) - plain(GRID)).max() < 1e-6


def test_without_it_a_cubic_goes_through_four_points() -> None:
    # 1 + c (w - 1) (w - 0.625) (w - 0.375), with c such that it is 0.947 at 0.1875.
    through = [1.0, 0.625, 0.375]
    w = np.linspace(0.1875, 1.0, 50)
    c = -0.053 / np.prod([0.1875 - one for one in through])
    expected = 1 + c * np.prod([w - one for one in through], axis=0)
    assert fit(FEW, LOST, monotone=False).along("width", w).tolist() == pytest.approx(expected, abs=1e-5)


def test_of_a_noisy_truth_the_predictor_tells_more_when_it_is_kept_from_falling() -> None:
    lows = (0.4, 0.2, 0.5)
    points = np.ones((13, 3))
    for axis, low in enumerate(lows):
        points[1 + 4 * axis : 5 + 4 * axis, axis] = np.linspace(low, 1.0, 5)[:-1]
    inside = np.random.default_rng(0).uniform(lows, 1.0, (400, 3))

    def truth(x: Array) -> Array:
        """Flat near the original, as networks are that have parts to spare."""
        return np.asarray(0.93 * np.prod(1 - np.array([0.25, 0.35, 0.2]) * (1 - x) ** 3, axis=1))

    def errors(monotone: bool) -> float:
        squares = []
        for seed in range(20):
            noise = 0.01 * np.random.default_rng(seed).standard_normal(len(points))
            found = fit(points, truth(points) + noise, monotone=monotone, starts=1)
            squares.append(np.sqrt(np.mean((found(inside) - truth(inside)) ** 2)))
        return float(np.mean(squares))

    kept, plain = errors(monotone=True), errors(monotone=False)
    print(f"off by {kept:.4f} in the mean of 20 seeds, plain least squares by {plain:.4f}")
    assert kept < 0.9 * plain


def test_the_comparison_keeps_the_predictor_alone_from_falling() -> None:
    kept, plain = (comparison(FEW, LOST, degree=2, monotone=monotone) for monotone in (True, False))
    assert kept[0].train_error > plain[0].train_error
    assert kept[1:] == plain[1:]


def test_the_reports_table_shows_the_predictor_as_the_recipe_has_it() -> None:
    level = Level(0, 1.0, (32, 32))
    points = [
        Point((), 1, level, (d, w, r), Plan(), Quality("top1", value, (0.9, 1.0), 100, "held out"))
        for (d, w, r), value in zip(FEW.tolist(), LOST.tolist(), strict=True)
    ]
    for monotone in (True, False):
        shown = tables.predictors(points, Config(degree=2, monotone=monotone))
        assert shown.rows[0][3] == comparison(FEW, LOST, degree=2, monotone=monotone)[0].train_error


# ---------------------------------------------------------------- judging


def test_a_point_is_left_out_with_all_that_were_measured_there() -> None:
    points = [(1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (1.0, 0.5, 1.0)]

    def mean(x: Array, y: Array) -> Predictor:
        return Predictor(((((float(y.mean())),), (1.0,), (1.0,)),))

    predicted = left_out(mean, points, [1.0, 0.8, 0.6, 0.3])
    assert predicted.tolist() == pytest.approx([0.45, 0.45, 0.7, 0.8])


def test_the_only_point_cannot_be_left_out() -> None:
    with pytest.raises(RunError, match=r"all 2 points are at depth 0\.5"):
        left_out(fit, [(0.5, 1.0, 1.0)] * 2, [0.5, 0.6])


def test_a_relative_error_is_the_mean_over_values_that_are_not_zero() -> None:
    assert relative_error([0.9, 0.5, 0.1], [1.0, 0.4, 0.0]) == pytest.approx((0.1 + 0.25) / 2)


def test_the_comparison_has_the_predictor_and_full_polynomials_with_and_without_ridge() -> None:
    rows = comparison(AXES, CUBICS(AXES), rank=1, degree=2)
    assert [(row.kind, row.degree, row.ridge) for row in rows] == [
        ("rank 1", 2, 0.0),
        ("full", 1, 0.0),
        ("full", 1, 1e-3),
        ("full", 2, 0.0),
        ("full", 2, 1e-3),
    ]
    assert rows[3].train_error < rows[1].train_error < rows[1].left_out_error


# ---------------------------------------------------------------- the paper's own measurements

# Table 5 (a), (b), (c), ResNet-32 on CIFAR-10, top-1 in percent. Rows of (a) are widths, of (b) depths, both
# over SIZES from 1.00 down; rows of (c) are widths over DEPTHS. Its heading of (a) says d = 1.0, but the row
# w = 1.00 there is (b)'s row d = 0.55, and no other. The DenseNet of the same table is left out: its (a)
# agrees with no row of its (b), so what depth it was measured at cannot be told.
WIDTH_SIZE = """90.59 89.43 88.51 86.59 83.19
91.39 90.53 89.26 87.38 84.62
92.19 90.95 89.88 88.38 85.15
92.54 91.55 90.77 88.60 85.93
92.84 91.87 91.10 89.38 86.56"""
DEPTH_SIZE = """86.88 85.91 85.15 83.64 81.68
92.30 91.12 90.08 88.79 85.87
92.84 91.87 91.10 89.38 86.56
93.43 92.40 91.77 89.87 87.17
93.63 92.63 91.79 90.14 87.48"""
WIDTH_DEPTH = """83.36 89.39 90.91 91.41 92.01
84.03 90.17 91.43 91.85 92.36
85.45 91.21 92.16 92.65 92.7
86.14 91.74 92.60 92.56 93.12
86.22 92.12 92.88 93.17 93.64"""


def rows_of(text: str) -> list[list[float]]:
    return [[float(cell) / 100 for cell in line.split()] for line in text.splitlines()]


def paper_grid() -> tuple[Array, Array]:
    """The 61 points and their accuracies; those in two or three of the tables are the mean of these."""
    found: dict[tuple[float, float, float], list[float]] = {}
    downwards = SIZES[::-1]
    for w, row in zip(WIDTHS, rows_of(WIDTH_SIZE), strict=True):
        for r, value in zip(downwards, row, strict=True):
            found.setdefault((0.55, w, r), []).append(value)
    for d, row in zip(DEPTHS, rows_of(DEPTH_SIZE), strict=True):
        for r, value in zip(downwards, row, strict=True):
            found.setdefault((d, 1.0, r), []).append(value)
    for w, row in zip(WIDTHS, rows_of(WIDTH_DEPTH), strict=True):
        for d, value in zip(DEPTHS, row, strict=True):
            found.setdefault((d, w, 1.0), []).append(value)
    return np.array(list(found)), np.array([np.mean(values) for values in found.values()])


POINTS, ACCURACIES = paper_grid()
ON_AXES = (POINTS < 1).sum(axis=1) <= 1


def test_the_papers_grid_has_61_points_of_which_13_are_on_the_axes() -> None:
    assert len(POINTS) == 61
    assert int(ON_AXES.sum()) == 13
    assert rows_of(WIDTH_SIZE)[-1] == rows_of(DEPTH_SIZE)[2]


def test_from_the_papers_axes_the_rank_1_cubic_predicts_the_other_48_points() -> None:
    predicted = fit(POINTS[ON_AXES], ACCURACIES[ON_AXES])(POINTS[~ON_AXES])
    error = relative_error(predicted, ACCURACIES[~ON_AXES])
    print(f"rank-1 cubic from 13 points, on the other 48: {error:.3%}")
    assert error < 0.008


def test_the_rank_1_cubic_fits_the_papers_61_points() -> None:
    error = relative_error(fit(POINTS, ACCURACIES)(POINTS), ACCURACIES)
    print(f"rank-1 cubic fitted to 61 points: {error:.3%}")
    assert error < 0.004


def test_on_the_papers_grid_points_left_out_are_predicted_better_at_rank_1_than_by_the_full_cubic() -> None:
    ours = relative_error(left_out(fit, POINTS, ACCURACIES), ACCURACIES)
    theirs = relative_error(left_out(full, POINTS, ACCURACIES), ACCURACIES)
    print(f"left out: rank-1 cubic {ours:.3%}, full cubic {theirs:.3%}")
    assert ours < theirs


def test_on_the_axes_alone_the_two_cannot_be_told_apart() -> None:
    # Along an axis both are any cubic, equal at the original: what differs is what they say off the axes.
    points, accuracies = POINTS[ON_AXES], ACCURACIES[ON_AXES]
    plain = left_out(partial(fit, monotone=False), points, accuracies)
    assert plain == pytest.approx(left_out(full, points, accuracies), abs=1e-3)


def test_on_the_papers_axes_keeping_the_predictor_from_falling_predicts_more_of_what_was_left_out() -> None:
    points, accuracies = POINTS[ON_AXES], ACCURACIES[ON_AXES]
    errors = {
        monotone: relative_error(left_out(partial(fit, monotone=monotone), points, accuracies), accuracies)
        for monotone in (True, False)
    }
    print(f"left out on the axes: {errors[True]:.3%}, plain least squares {errors[False]:.3%}")
    assert errors[True] < errors[False]


def test_the_full_cubic_from_the_papers_axes_is_far_off_elsewhere() -> None:
    predicted = full(POINTS[ON_AXES], ACCURACIES[ON_AXES])(POINTS[~ON_AXES])
    error = relative_error(predicted, ACCURACIES[~ON_AXES])
    print(f"full cubic from 13 points, on the other 48: {error:.3%}")
    assert error > 0.05
