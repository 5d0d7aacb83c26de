"""What the report says of more images, by what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_report

from optpipe.report import build, leakage, markdown
from optpipe.report.schema import HalvesReport, Interval, LeakageReport


def found(
    *,
    doubling: tuple[float, float, float] = (0.1, 0.08, 0.12),
    control: tuple[float, float, float] = (1.02, 0.97, 1.07),
    halves: HalvesReport | None = None,
) -> LeakageReport:
    """Middle, low and high of what decides; the rest is as it may be."""
    return LeakageReport(
        advice="",
        seen=0.5,
        unseen=0.9,
        seen_images=200,
        unseen_images=500,
        ratio=Interval(1.8, (1.6, 2.0)),
        control=Interval(control[0], control[1:]),
        doubling=Interval(doubling[0], doubling[1:]),
        halves=halves,
    )


def halves(union: tuple[float, float, float]) -> HalvesReport:
    return HalvesReport(
        images=100,
        half=1.0,
        whole=0.9,
        leakage=Interval(0.09, (0.08, 0.1)),
        relative=Interval(0.1, (0.08, 0.12)),
        union=Interval(union[0], union[1:]),
    )


@pytest.mark.parametrize(
    ("doubling", "begins"),
    [
        (
            (0.1, 0.08, 0.12),
            "More images would help: twice as many should cut the error on unseen images by 10.0%",
        ),
        ((0.02, 0.01, 0.04), "More images would help little: twice as many should cut"),
        ((-0.01, -0.03, 0.01), "More images would help little: twice as many should cut"),
        ((0.05, 0.02, 0.09), "More images may help: twice as many should cut"),
    ],
)
def test_the_advice_follows_the_interval_and_not_the_number(
    doubling: tuple[float, float, float], begins: str
) -> None:
    assert leakage.advice(found(doubling=doubling)).startswith(begins)


def test_no_saving_is_below_zero() -> None:
    assert "by 0.0% (0.0% to 1.0%)" in leakage.advice(found(doubling=(-0.01, -0.03, 0.01)))


def test_images_of_another_kind_are_named_before_their_number() -> None:
    advised = leakage.advice(found(control=(2.4, 2.0, 2.9)))
    assert advised.startswith("Calibration and evaluation images differ in kind")
    assert "2.40 times (2.00 to 2.90)" in advised
    assert leakage.advice(found(control=(0.4, 0.3, 0.5))).startswith(
        "Calibration and evaluation images differ"
    )


def test_measured_halves_decide_where_there_are_any() -> None:
    """From a half to the whole 24% fell away; by 1/n, half of it falls with the next doubling."""
    advised = leakage.advice(found(doubling=(0.01, 0.0, 0.02), halves=halves((0.24, 0.2, 0.28))))
    assert advised.startswith("More images would help:")
    assert "by 12.0% (10.0% to 14.0%)" in advised
    assert leakage.advice(found(halves=halves((0.04, 0.02, 0.06)))).startswith(
        "More images would help little"
    )


def test_the_section_has_the_numbers_and_their_intervals(tmp_path: Path) -> None:
    whole = found(halves=halves((0.24, 0.2, 0.28)))
    report = replace(make_report(), leakage=replace(whole, advice=leakage.advice(whole)))
    said = markdown.render(report)
    assert "**Would more images help?** More images would help" in said
    assert "0.5 on 200 calibration images and 0.9 on 500 evaluation images" in said
    assert "1.80 times (1.60 to 2.00)" in said
    assert "lies 0.09 (0.08 to 0.1) below the chord, 10.0% (8.0% to 12.0%) of the 0.9" in said
    assert "by 24.0% (20.0% to 28.0%) (Eq. 12)" in said
    build.write(tmp_path, report)
    assert build.read(tmp_path) == report


def test_a_report_without_it_says_nothing() -> None:
    assert make_report().leakage is None
    assert "more images" not in markdown.render(make_report())
