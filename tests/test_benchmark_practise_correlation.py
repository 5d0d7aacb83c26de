"""Figs. 9 and 12 of PRACTISE: ranks of criteria against recovered errors, and their figures."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import practise_correlation as correlation  # noqa: E402
from benchmarks import practise_correlation_tables as tables  # noqa: E402
from benchmarks.practise_correlation_tables import Alone, Correlated, Error, Scale, Several  # noqa: E402
from optpipe import store  # noqa: E402

SCALE = Scale("resnet20", "practise_resnet56.toml", 300, 0, (), "here")


def alone(seed: int, number: int, recoverability: float, l2: float, feature: float) -> Alone:
    return Alone(
        seed,
        f"layer1.{number}",
        {"recoverability": recoverability, "l2": l2, "random": float(number)},
        Error(2 * feature, 0.5, 0.5),
        Error(feature, feature / 10, 0.1),
        4.0,
    )


def several(seed: int, dropped: int) -> Several:
    errors = (Error(1.0, 0.3, 0.2 * dropped), Error(0.5, 0.2, 0.12), Error(0.4, 0.2, 0.1))
    return Several(seed, dropped, ("a",) * dropped, *errors)


def found(*seeds: int, blocks: int = 4) -> Correlated:
    """Recoverability ranks the blocks as the errors do, l2 the other way round."""
    rows = tuple(
        alone(seed, number, float(number), -float(number), 1.0 + number)
        for seed in seeds
        for number in range(blocks)
    )
    return Correlated(
        SCALE, "2026-11-22", rows, tuple(several(seed, drop) for seed in seeds for drop in (1, 2))
    )


def test_a_criterion_that_ranks_as_the_errors_do_has_coefficient_one() -> None:
    by_name = tables.correlations(found(0, 1))
    assert by_name["recoverability"]["feature error"] == pytest.approx([1.0, 1.0])
    assert by_name["l2"]["disagreement"] == pytest.approx([-1.0, -1.0])


def test_equal_errors_have_no_ranks() -> None:
    assert tables.correlations(found(0))["l2"]["test error"] == []


def test_a_coefficient_is_that_of_the_ranks() -> None:
    """Scores 0, 1, 2, 3 and errors 1, 3, 2, 4: 1 - 6 * 2 / (4 * 15) = 0.8."""
    rows = [alone(0, n, float(n), 0.0, e) for n, e in enumerate((1.0, 3.0, 2.0, 4.0))]
    assert tables.correlation(rows, "recoverability", lambda error: error.feature) == pytest.approx(0.8)


def test_a_seed_that_is_not_done_is_left_out() -> None:
    whole = found(0)
    begun = dataclasses.replace(whole, alone=(*whole.alone, alone(1, 0, 1.0, 1.0, 1.0)))
    assert list(tables.whole_seeds(begun.alone)) == [0]
    assert tables.correlations(begun) == tables.correlations(whole)


def test_the_table_says_who_is_first_and_what_was_trained() -> None:
    text = tables.markdown(found(0, 1))
    assert "| recoverability | +1.000 ± 0.000 | +1.000 ± 0.000 |  |" in text
    assert "By the feature error, `recoverability` is first (+1.000)." in text
    assert "takes 300 steps (the paper: 2000 and 1000)" in text
    assert "| 2 | 2 | 40.00 ± 0.00 | 12.00 ± 0.00 | 10.00 ± 0.00 |" in text


def test_the_table_says_where_recoverability_is_not_first() -> None:
    rows = tuple(alone(0, n, -float(n), float(n), 1.0 + n) for n in range(4))
    text = tables.markdown(Correlated(SCALE, "2026-11-22", rows, ()))
    assert "`recoverability` is not first: `l2` is, at +1.000 (-1.000)." in text


def test_figures_are_drawn_once_there_are_rows_enough() -> None:
    drawn = tables.figures(found(0))
    assert list(drawn) == ["blocks", "several"]
    assert all("<svg" in svg and "recoverability" in svg for svg in drawn.values())
    assert tables.figures(Correlated(SCALE, "", (), (several(0, 1),))) == {}


def test_curves_lie_between_their_least_and_their_largest() -> None:
    curves = {curve.name: curve.y for curve in tables.blocks_figure(found(0)).curves}
    assert curves["recoverability"] == pytest.approx((0.0, 1 / 3, 2 / 3, 1.0))
    assert curves["l2"] == pytest.approx((1.0, 2 / 3, 1 / 3, 0.0))
    assert curves["test error once recovered"] == (0.0, 0.0, 0.0, 0.0)
    assert "random" not in curves


def test_a_short_network_is_dropped_whole_and_a_long_one_at_the_papers_numbers() -> None:
    assert correlation.counts_of(7) == (1, 2, 3, 4, 5, 6, 7)
    assert correlation.counts_of(25) == (1, 2, 3, 5, 8, 11)


def test_rows_of_another_scale_are_not_gone_on_with(tmp_path: Path) -> None:
    kept = found(0)
    path = tmp_path / "rows.json"
    correlation.publish(path, kept)
    assert store.from_json(Correlated, path.read_bytes()) == kept
    assert correlation.resume(path, SCALE) == kept
    assert correlation.resume(path, dataclasses.replace(SCALE, steps=1)).alone == ()
    assert (tmp_path / "rows-blocks.svg").exists() and (tmp_path / "rows.md").exists()
