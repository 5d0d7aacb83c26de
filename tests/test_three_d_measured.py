"""The cost surface that is exact along the axes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from optpipe.errors import RunError
from optpipe.methods.three_d.cost import fit_cost, formula
from optpipe.methods.three_d.measured import Knots, MeasuredSurface, fit_measured

Array = NDArray[np.float64]


def stepped(points: Array) -> Array:
    """An engine that works in quarters of the channels, and rounds the images up to quarters too."""
    d, w, r = points.T
    return np.asarray(0.1 + 0.9 * d * np.ceil(w * 4 - 1e-9) / 4 * (np.ceil(r * 4 - 1e-9) / 4) ** 2)


def axes() -> Array:
    shares = (0.3, 0.5, 0.6, 0.8)
    found = [(1.0, 1.0, 1.0)]
    for along in range(3):
        for share in shares:
            point = [1.0, 1.0, 1.0]
            point[along] = share
            found.append((point[0], point[1], point[2]))
    return np.array(found)


INSIDE = np.array([(0.5, 0.6, 1.0), (0.8, 1.0, 0.6), (1.0, 0.6, 0.8), (0.8, 0.6, 0.6)])


def test_it_is_exact_along_the_axes() -> None:
    points = np.concatenate([axes(), INSIDE])
    surface = fit_measured(points, stepped(points))
    assert surface(axes()) == pytest.approx(stepped(axes()), rel=1e-3)


def test_steps_that_show_on_the_axes_are_known_beside_them() -> None:
    known = axes()
    corrected = fit_measured(known, stepped(known))
    smooth = fit_cost(known, stepped(known))
    truth = stepped(INSIDE)
    off = np.abs(corrected(INSIDE) / truth - 1).mean()
    assert off < 0.5 * np.abs(smooth(INSIDE) / truth - 1).mean()
    assert off < 0.05


def test_its_gradient_is_that_of_finite_differences() -> None:
    points = np.concatenate([axes(), INSIDE])
    surface = fit_measured(points, stepped(points))
    at = np.array([(0.7, 0.75, 0.66), (0.45, 0.9, 0.9)])
    for along in range(3):
        step = np.zeros(3)
        step[along] = 1e-6
        numeric = (surface(at + step) - surface(at - step)) / 2e-6
        assert surface.gradient(at)[:, along] == pytest.approx(numeric, rel=1e-4, abs=1e-6)


def test_beyond_the_knots_the_correction_stays_what_it_was() -> None:
    knots = Knots((0.5, 1.0), (0.2, 0.0))
    assert knots.at(np.array([0.1, 0.5, 1.0, 1.2])) == pytest.approx([0.2, 0.2, 0.0, 0.0])
    assert knots.at(np.array([0.1, 1.2]), slope=True) == pytest.approx([0.0, 0.0])


def test_without_knots_it_is_the_surface_times_its_factor() -> None:
    surface = MeasuredSurface(formula(), factor=1.1)
    assert surface(INSIDE) == pytest.approx(1.1 * formula()(INSIDE))
    assert surface.gradient(INSIDE) == pytest.approx(1.1 * formula().gradient(INSIDE))


def test_two_measurements_of_one_share_count_as_their_mean() -> None:
    twice = np.array([(1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (0.5, 1.0, 1.0), (0.8, 1.0, 1.0)])
    surface = fit_measured(twice, np.array([1.0, 0.5, 0.6, 0.8]))
    assert 0.5 < float(surface([(0.5, 1.0, 1.0)])[0]) < 0.6


def test_a_ratio_that_is_no_number_is_refused() -> None:
    with pytest.raises(RunError, match="cannot be fitted"):
        fit_measured(axes()[:2], np.array([1.0, np.nan]))
