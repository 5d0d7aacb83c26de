"""A long life: how growth is told in the quick suite, a few runs in the slow one."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import soak
from faults.report import PAGE


def held(count: int, **grow: float) -> list[dict[str, float | str]]:
    """What runs held, all the same but for what grows by so much a run."""
    names = ("memory MB", "objects", *soak.COUNTED)
    ended = ["Error: no plan meets the budget" if number % 5 == 4 else "finished" for number in range(count)]
    return [
        {"ended": ended[number], **{name: 100.0 + grow.get(name, 0.0) * number for name in names}}
        for number in range(count)
    ]


def test_the_slope_of_a_line_and_of_noise() -> None:
    exact = soak.slope_of([1.0, 3.0, 5.0, 7.0])
    assert (exact.slope, exact.low, exact.high) == pytest.approx((2.0, 2.0, 2.0))
    # By hand: slope 0.5, residual variance 2.5 / 1 over 3 points, t of one degree of freedom 12.706.
    noisy = soak.slope_of([0.0, 2.0, 1.0])
    assert noisy.slope == pytest.approx(0.5)
    assert noisy.high - noisy.slope == pytest.approx(12.7062 * (1.5 / 2) ** 0.5, rel=1e-4)


def test_what_grows_is_told() -> None:
    assert soak.problems(held(20)) == []
    assert soak.problems(held(20, **{"memory MB": soak.MOST_MB * 0.9, "objects": 20.0})) == []
    for name, much in (
        ("memory MB", soak.MOST_MB * 1.1),
        ("objects", 30.0),
        ("files", 1.0),
        ("threads", 0.1),
    ):
        (problem,) = soak.problems(held(20, **{name: much}))
        assert problem.startswith(f"{name}: ")


def test_a_run_that_ends_as_none_should_is_told() -> None:
    runs = held(20)
    runs[4]["ended"] = "finished"
    runs[7]["ended"] = "Error: unexpected ValueError: x (--debug shows where)"
    assert [problem.partition(":")[0] for problem in soak.problems(runs)] == ["run 4", "run 7"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_few_runs_in_one_process_leave_nothing_behind(tmp_path: Path) -> None:
    found = soak.run(tmp_path, 5, print)
    assert found.problems == ()
    assert found.section.startswith(soak.TITLE)


def test_the_page_says_what_is_done_and_what_was_mended() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for text in (soak.TITLE, soak.INTRODUCTION, soak.MENDED):
        assert text in page
