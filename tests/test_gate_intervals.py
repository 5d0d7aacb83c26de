from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import make_report

from optpipe.quality import wilson_ci95
from optpipe.report import intervals
from optpipe.types import Quality


def top1(hits: int, count: int) -> Quality:
    return Quality("top1", hits / count, wilson_ci95(hits, count), count, "evaluation")


def from_counts(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    n = both + first + second + neither
    return intervals.difference(top1(both + first, n), top1(both + second, n), first + second)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, chapter 8.
        ((59, 6, 16, 80), -0.1186, -0.0046),
        # By hand from Newcombe's formula: 19 and 14 of 41, phi = (14 * 22 - 20.5) / sqrt(19 * 22 * 14 * 27).
        ((14, 5, 0, 22), 0.0115, 0.2265),
        # phi would be negative only for want of images: taken as 0.
        ((1, 1, 7, 12), -0.5069, -0.0256),
    ],
)
def test_the_paired_interval_is_newcombes(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    assert from_counts(*counts) == pytest.approx((low, high), abs=5e-5)


def test_the_unpaired_interval_is_newcombes() -> None:
    """56 of 70 against 48 of 80: his first example, method 10."""
    assert intervals.difference(top1(56, 70), top1(48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_more_disagreements_never_make_it_narrower() -> None:
    widths = []
    for most in range(4, 60):
        low, high = intervals.difference(top1(380, 423), top1(376, 423), most)
        widths.append(high - low)
    assert all(wider >= narrower - 1e-12 for narrower, wider in itertools.pairwise(widths))
    assert widths[0] < 0.5 * widths[-1]


def test_it_is_never_wider_than_that_of_independent_samples() -> None:
    for most in (0, 4, 50, 423):
        low, high = intervals.difference(top1(380, 423), top1(376, 423), most)
        alone = intervals.difference(top1(380, 423), top1(376, 423))
        assert alone[0] <= low < high <= alone[1]


def test_it_holds_the_truth_at_least_as_often_as_it_says_from_disagreements_alone() -> None:
    """Images that both have right, the first alone, the second alone, neither alike, neither differently."""
    shares = (0.9, 0.03, 0.02, 0.03, 0.02)
    covered, draws = 0, np.random.default_rng(0).multinomial(423, shares, size=1000)
    for both, first, second, _, differently in draws.tolist():
        most = first + second + differently
        low, high = intervals.difference(top1(both + first, 423), top1(both + second, 423), most)
        covered += low <= shares[1] - shares[2] <= high
    assert 950 <= covered < 1000


def test_swapping_the_two_mirrors_it() -> None:
    there = intervals.difference(top1(380, 423), top1(376, 423), 20)
    back = intervals.difference(top1(376, 423), top1(380, 423), 20)
    assert back == pytest.approx((-there[1], -there[0]))


def test_all_right_tells_nothing_of_how_errors_go_together() -> None:
    assert intervals.difference(top1(50, 50), top1(49, 50), 1) == intervals.difference(
        top1(50, 50), top1(49, 50)
    )


def test_two_networks_differ_at_most_where_either_differs_from_their_original() -> None:
    result = make_report().result
    assert intervals.disagreements(result) == 17, "4% of 423"
    assert intervals.disagreements(result, result) == 34
    assert intervals.disagreements(dataclasses.replace(result, agreement=None)) is None


def test_a_quotient_needs_two_ratios() -> None:
    latency = make_report().result.latency
    found = intervals.quotient(latency, latency)
    assert found is not None
    assert found[0] == 1.0
    assert intervals.quotient(latency, make_report().original.latency) is None
    assert intervals.quotient(make_report().original.latency, latency) is None
