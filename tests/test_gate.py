from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import FINGERPRINT, make_report

from optpipe.errors import UsageError
from optpipe.report import gate, limits
from optpipe.report.schema import Report
from optpipe.types import Limits, Quality

ORIGINAL = {"original weights": "0" * 64}


def judged(report: Report, given: Limits, old: Report | None = None, *, across: bool = False) -> gate.Verdict:
    baseline = None if old is None else gate.Baseline("old", old, across)
    return gate.judge("run", report, given, baseline)


def single(report: Report, given: Limits) -> gate.Check:
    (check,) = judged(report, given).checks
    return check


def outcomes(verdict: gate.Verdict) -> list[str]:
    return [check.outcome for check in verdict.checks]


def of_one_original(report: Report) -> Report:
    return dataclasses.replace(report, sha256=ORIGINAL)


def with_quality(report: Report, quality: Quality, agreement: Quality | None = None) -> Report:
    result = dataclasses.replace(report.result, quality=quality, agreement=agreement)
    return dataclasses.replace(report, result=result)


def unlabelled() -> Report:
    """95% of 100 images get the original's class; nobody knows which is right."""
    report = make_report()
    same = Quality("agreement", 0.95, (0.89, 0.98), 100, "evaluation")
    own = Quality("agreement", 1.0, (0.96, 1.0), 100, "evaluation")
    original = dataclasses.replace(report.original, quality=own)
    return dataclasses.replace(with_quality(report, same, same), original=original)


# ---------------------------------------------------------------- against the original


def test_a_report_within_all_limits_passes() -> None:
    verdict = judged(make_report(), Limits(1.0, 95.0, 25.0))
    assert verdict.passed
    assert gate.as_text(verdict).splitlines() == [
        "PASSED accuracy: top1 drop 1.00 points (-0.68 to 2.68), at most 1 point allowed; "
        "the interval reaches beyond that",
        "PASSED agreement: agreement with the original 96.00% (94.00 to 98.00), at least 95% asked; "
        "the interval reaches beyond that",
        "PASSED latency: latency reduction 25.00% (24.00 to 26.00), at least 25% asked; "
        "the interval reaches beyond that",
    ]


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        # Of a drop of 1.00 points, -0.68 to 2.68.
        (Limits(max_accuracy_drop=2.7), "passed"),
        (Limits(max_accuracy_drop=1.0), "passed"),
        (Limits(max_accuracy_drop=0.9), "uncertain"),
        (Limits(max_accuracy_drop=-0.6), "uncertain"),
        (Limits(max_accuracy_drop=-0.7), "failed"),
        # Of an agreement of 96%, 94 to 98.
        (Limits(min_agreement=96.0), "passed"),
        (Limits(min_agreement=97.9), "uncertain"),
        (Limits(min_agreement=98.1), "failed"),
        # Of a reduction by 25%, 24 to 26.
        (Limits(min_latency_reduction=25.0), "passed"),
        (Limits(min_latency_reduction=26.0), "uncertain"),
        (Limits(min_latency_reduction=26.1), "failed"),
    ],
)
def test_a_limit_is_missed_only_beyond_the_interval(given: Limits, outcome: str) -> None:
    found = single(make_report(), given)
    assert found.outcome == outcome
    assert found.passed == (outcome != "failed")
    strict = single(make_report(), dataclasses.replace(given, strict=True))
    assert strict.outcome == ("passed" if outcome == "passed" else "failed")


def test_an_uncertain_check_says_so() -> None:
    found = single(make_report(), Limits(max_accuracy_drop=0.5))
    assert found.message == (
        "top1 drop 1.00 points (-0.68 to 2.68), at most 0.5 points allowed; "
        "the interval does not exclude that"
    )


def test_a_value_that_is_no_number_fails() -> None:
    wrong = make_report(result_top1=math.nan, ratio=math.nan, ci95=(math.nan, math.nan))
    nothing = Quality("agreement", math.nan, (math.nan, math.nan), 10, "evaluation")
    report = with_quality(wrong, nothing, nothing)
    assert outcomes(judged(report, Limits(50.0, 10.0, 2.0))) == ["failed", "failed", "failed"]


def test_without_labels_the_drop_is_what_does_not_agree() -> None:
    found = single(unlabelled(), Limits(max_accuracy_drop=5.0))
    assert found.outcome == "passed"
    assert found.value == pytest.approx(5.0)
    assert found.ci95 == pytest.approx((2.0, 11.0))
    assert single(unlabelled(), Limits(max_accuracy_drop=1.9)).outcome == "failed"
    assert single(unlabelled(), Limits(min_agreement=98.5)).outcome == "failed"


def test_a_strict_saving_within_its_own_interval_is_no_saving() -> None:
    noisy = make_report(ratio=0.97, ci95=(0.9, 1.04))
    assert single(noisy, Limits(min_latency_reduction=2.0)).outcome == "passed"
    found = single(noisy, Limits(min_latency_reduction=2.0, strict=True))
    assert found.outcome == "failed"
    assert found.message.endswith("; the interval includes no saving at all")
    sure = make_report(ratio=0.97, ci95=(0.95, 0.99))
    assert single(sure, Limits(min_latency_reduction=2.0, strict=True)).outcome == "passed"
    assert single(noisy, Limits(min_latency_reduction=-5.0, strict=True)).outcome == "passed"


def test_no_limit_at_all_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"run: there is nothing to hold it against: give --max-accuracy-drop"
    ):
        judged(make_report(), Limits(strict=True))


def test_an_agreement_that_is_not_there_is_refused() -> None:
    report = with_quality(make_report(), make_report().result.quality)
    with pytest.raises(UsageError, match="run: the report holds no agreement with the original"):
        judged(report, Limits(min_agreement=90.0))


# ---------------------------------------------------------------- against an older run


def test_the_same_run_is_no_regression_of_itself() -> None:
    report = of_one_original(make_report())
    verdict = judged(report, Limits(), report)
    assert (verdict.passed, outcomes(verdict), verdict.baseline) == (True, ["passed", "passed"], "old")
    assert [check.value for check in verdict.checks] == [0.0, pytest.approx(0.0)]


def test_a_latency_is_compared_by_the_ratios_to_the_same_original() -> None:
    """0.76 / 0.75 is 1.33% slower; its ends are those of the two ratios added as squares of logarithms."""
    old = of_one_original(make_report(ratio=0.75, ci95=(0.748, 0.752)))
    new = of_one_original(make_report(ratio=0.76, ci95=(0.758, 0.762)))
    found = judged(new, Limits(), old).checks[1]
    assert found.value == pytest.approx((0.76 / 0.75 - 1) * 100)
    below = math.hypot(math.log(0.76 / 0.758), math.log(0.752 / 0.75))
    above = math.hypot(math.log(0.762 / 0.76), math.log(0.75 / 0.748))
    assert found.ci95 == pytest.approx(
        ((0.76 / 0.75 * math.exp(-below) - 1) * 100, (0.76 / 0.75 * math.exp(above) - 1) * 100)
    )
    assert (found.outcome, found.limit) == ("failed", 0.0)
    assert "each timed beside the same original" in found.message
    assert judged(new, Limits(max_latency_regression=1.0), old).checks[1].outcome == "uncertain"
    assert judged(new, Limits(max_latency_regression=1.0, strict=True), old).checks[1].outcome == "failed"
    assert judged(new, Limits(max_latency_regression=1.5, strict=True), old).checks[1].outcome == "passed"


def test_latencies_of_other_machines_are_compared_only_when_told_and_marked() -> None:
    old = of_one_original(make_report())
    elsewhere = dataclasses.replace(FINGERPRINT, device="another processor")
    slower = dataclasses.replace(
        make_report(ratio=0.9, ci95=(0.89, 0.91)).result.latency, fingerprint=elsewhere
    )
    new = of_one_original(dataclasses.replace(old, result=dataclasses.replace(old.result, latency=slower)))
    verdict = judged(new, Limits(), old)
    assert (verdict.passed, outcomes(verdict)) == (True, ["passed", "skipped"])
    differs = "the machines or their settings differ (device another processor here, a processor there)"
    assert verdict.checks[1].message == f"not compared: {differs}; --across-machines compares them"
    told = judged(new, Limits(), old, across=True)
    assert outcomes(told) == ["passed", "failed"]
    assert f"though {differs}" in told.checks[1].message


def test_latencies_of_other_originals_have_no_interval() -> None:
    old, new = of_one_original(make_report(ratio=0.5)), make_report(ratio=0.75)
    verdict = judged(new, Limits(), old)
    assert outcomes(verdict) == ["passed", "skipped"]
    assert "from 4.000 to 6.000 ms" in verdict.checks[1].message
    strict = judged(new, Limits(strict=True), old).checks[1]
    assert (strict.outcome, strict.ci95) == ("failed", None)
    assert strict.value == pytest.approx(50.0)
    assert judged(new, Limits(max_latency_regression=50.0, strict=True), old).passed


def test_other_batches_are_not_compared() -> None:
    old, new = make_report(), make_report()
    new = dataclasses.replace(new, target=dataclasses.replace(new.target, batch=1))
    found = judged(new, Limits(), old).checks[1]
    assert (found.outcome, found.message) == ("skipped", "not compared: batches of 1 here, of 16 there")


def test_an_accuracy_that_fell_beyond_doubt_is_a_regression() -> None:
    same = Quality("top1", 0.8, (0.76, 0.835), 423, "evaluation")
    old = of_one_original(make_report())
    new = of_one_original(with_quality(make_report(), same, old.result.agreement))
    found = judged(new, Limits(), old).checks[0]
    assert found.outcome == "failed"
    assert "from 90.50% to 80.00%, at most 0 points allowed" in found.message
    assert judged(new, Limits(max_accuracy_regression=10.5, strict=True), old).passed


def test_the_same_images_and_original_make_the_interval_narrower() -> None:
    def width(new: Report) -> float:
        ends = judged(new, Limits(), of_one_original(make_report())).checks[0].ci95
        assert ends is not None
        return ends[1] - ends[0]

    paired, unknown = of_one_original(make_report()), make_report()
    other = dataclasses.replace(paired.data, evaluation_sha256="f" * 64)
    assert width(paired) < width(unknown)
    assert width(dataclasses.replace(paired, data=other)) == width(unknown)


def test_images_that_differ_are_named() -> None:
    old = make_report()
    new = dataclasses.replace(old, data=dataclasses.replace(old.data, evaluation_sha256="f" * 64))
    assert "on other images" in judged(new, Limits(), old).checks[0].message


def test_accuracy_and_agreement_are_not_compared() -> None:
    found = judged(unlabelled(), Limits(strict=True), make_report()).checks[0]
    assert (found.outcome, found.message) == ("skipped", "not compared: agreement here, top1 there")


def test_agreements_with_different_originals_are_not_compared() -> None:
    one = of_one_original(unlabelled())
    assert judged(one, Limits(), one).checks[0].outcome == "passed"
    found = judged(one, Limits(strict=True), unlabelled()).checks[0]
    assert (found.outcome, found.message) == (
        "skipped",
        "not compared: the two agreements are with different originals",
    )


def test_a_baseline_with_which_nothing_compares_is_refused() -> None:
    with pytest.raises(UsageError, match="run: nothing could be checked: not compared: agreement here"):
        judged(unlabelled(), Limits(), make_report(ratio=0.5))


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (Limits(max_accuracy_drop=math.nan), ("max_accuracy_drop", "must be finite")),
        (Limits(max_accuracy_drop=101.0), ("max_accuracy_drop", "must be at most 100")),
        (Limits(min_agreement=0.95), ("min_agreement", "is in percent: write 95 for a share of 0.95")),
        (
            Limits(min_latency_reduction=0.2),
            ("min_latency_reduction", "is in percent: write 20 for a share of 0.2"),
        ),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused(given: Limits, problem: tuple[str, str]) -> None:
    found = given.problem()
    assert found is not None
    assert (found[0], found[2]) == problem


def test_limits_that_can_be_meant_are_not() -> None:
    assert Limits().problem() is None
    assert Limits(0.5, 99.5, -2.0, 0.1, 150.0, strict=True).problem() is None


def test_given_limits_win_over_the_recipes() -> None:
    recipe = Limits(max_accuracy_drop=1.0, min_latency_reduction=20.0, strict=True)
    assert Limits(max_accuracy_drop=0.0).over(recipe) == Limits(0.0, None, 20.0, strict=True)
    assert Limits(min_agreement=90.0, strict=True).over(Limits()) == Limits(min_agreement=90.0, strict=True)


def test_a_runs_limits_are_read_back_from_its_folder_and_beside_its_report(tmp_path: Path) -> None:
    assert limits.read(tmp_path) == Limits()
    limits.write(tmp_path, Limits(1.0, None, 20.0, strict=True))
    (tmp_path / "report.json").write_text("{}")
    assert (
        limits.read(tmp_path) == limits.read(tmp_path / "report.json") == Limits(1.0, None, 20.0, strict=True)
    )


@pytest.mark.parametrize("text", ["", '{"max_accuracy_drop": "x"}', "[]"])
def test_damaged_limits_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "gate.json").write_text(text)
    with pytest.raises(UsageError, match=r"gate.json: is damaged; give the same optpipe run again"):
        limits.read(tmp_path)


# ---------------------------------------------------------------- for machines and pages


def test_junit_counts_what_failed_and_what_was_skipped() -> None:
    verdict = judged(make_report(), Limits(0.5, None, 30.0), make_report(ratio=0.5))
    assert outcomes(verdict) == ["uncertain", "failed", "passed", "skipped"]
    suite = ElementTree.fromstring(gate.junit(make_report(), verdict).encode())
    counts = {"name": "optpipe gate practise", "tests": "4", "failures": "1", "skipped": "1"}
    assert (suite.tag, suite.attrib) == ("testsuite", counts)
    inside = []
    for case, check in zip(suite.findall("testcase"), verdict.checks, strict=True):
        assert (case.get("classname"), case.get("name")) == ("optpipe.practise", check.name)
        assert check.message in (case[0].get("message"), case[0].text)
        inside.append(case[0].tag)
    assert inside == ["system-out", "failure", "system-out", "skipped"]


def test_junit_escapes_what_a_name_holds(tmp_path: Path) -> None:
    checks = (gate.Check("a<b>&'\"", "failed", 'drop < 1 & > "0" ä'),)
    verdict = dataclasses.replace(judged(make_report(), Limits(0.5)), checks=checks)
    path = tmp_path / "junit.xml"
    path.write_text(gate.junit(make_report(), verdict), encoding="utf-8")
    case = ElementTree.parse(path).getroot()[0]
    assert case.get("name") == "a<b>&'\""
    assert case[0].get("message") == 'drop < 1 & > "0" ä'


def test_the_json_holds_the_values() -> None:
    read = json.loads(gate.as_json(judged(make_report(), Limits(min_latency_reduction=30.0))))
    assert (read["schema"], read["run"], read["passed"], read["baseline"]) == (
        gate.SCHEMA,
        "run",
        False,
        None,
    )
    (check,) = read["checks"]
    assert (check["name"], check["outcome"], check["limit"], check["unit"]) == ("latency", "failed", 30, "%")
    assert [check["value"], *check["ci95"]] == pytest.approx([25, 24, 26])


def test_the_summary_is_a_table_that_a_name_cannot_break() -> None:
    report = dataclasses.replace(make_report(), name="a|b<i>\nc")
    verdict = judged(report, Limits(1.0, None, 30.0))
    text = gate.markdown(report, verdict)
    lines = text.splitlines()
    assert lines[0] == "### optpipe gate: a\\|b&lt;i> c FAILED"
    assert lines[2] == "practise on zoo:resnet20_cifar, onnxruntime fp32 at batch 16 on a processor."
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4
    assert rows[3].startswith("| latency | failed | latency reduction 25.00% (24.00 to 26.00), at least 30%")
    assert text.endswith("\n\n"), "what is appended next is no part of the table"
