from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import make_report

from optpipe.report import gate


def test_a_report_within_both_limits_passes() -> None:
    checks = gate.check(make_report(), max_accuracy_drop=1.0, min_latency_reduction=25.0)
    assert checks == [
        gate.Check("accuracy", True, "top1 drop 1.00 points, at most 1 allowed"),
        gate.Check("latency", True, "latency reduction 25.00%, at least 25% asked"),
    ]


def test_a_larger_drop_fails_the_accuracy_alone() -> None:
    accuracy, latency = gate.check(make_report(), max_accuracy_drop=0.9, min_latency_reduction=20)
    assert (accuracy.passed, latency.passed) == (False, True)
    assert accuracy.message == "top1 drop 1.00 points, at most 0.9 allowed"


def test_a_smaller_reduction_fails_the_latency_alone() -> None:
    accuracy, latency = gate.check(make_report(), max_accuracy_drop=1, min_latency_reduction=25.5)
    assert (accuracy.passed, latency.passed) == (True, False)
    assert latency.message == "latency reduction 25.00%, at least 25.5% asked"


def test_an_accuracy_that_rose_passes_a_limit_of_zero() -> None:
    accuracy, _ = gate.check(make_report(result_top1=0.92), 0.0, 0.0)
    assert (accuracy.passed, accuracy.message) == (True, "top1 drop -0.50 points, at most 0 allowed")


def test_a_saving_within_its_own_interval_is_no_saving() -> None:
    noisy = make_report(ratio=0.97, ci95=(0.9, 1.04))
    assert not gate.check(noisy, 1.0, 2.0)[1].passed
    sure = make_report(ratio=0.97, ci95=(0.95, 0.99))
    assert gate.check(sure, 1.0, 2.0)[1].passed


def test_where_no_saving_is_asked_a_slower_result_within_the_limit_passes() -> None:
    slower = make_report(ratio=1.01, ci95=(1.0, 1.02))
    assert gate.check(slower, 1.0, -2.0)[1].passed
    assert not gate.check(slower, 1.0, 0.0)[1].passed


@pytest.mark.parametrize(
    ("drop", "reduction", "failures"), [(1.0, 25.0, 0), (0.5, 25.0, 1), (1.0, 30.0, 1), (0.5, 30.0, 2)]
)
def test_junit_counts_what_failed(drop: float, reduction: float, failures: int) -> None:
    report = make_report()
    checks = gate.check(report, drop, reduction)
    suite = ElementTree.fromstring(gate.junit(report, checks).encode())
    assert suite.tag == "testsuite"
    assert suite.attrib == {"name": "optpipe gate practise", "tests": "2", "failures": str(failures)}
    cases = suite.findall("testcase")
    assert [(case.get("classname"), case.get("name")) for case in cases] == [
        ("optpipe.practise", "accuracy"),
        ("optpipe.practise", "latency"),
    ]
    for case, check in zip(cases, checks, strict=True):
        failure, output = case.find("failure"), case.find("system-out")
        assert (failure is None) == check.passed
        if failure is not None:
            assert failure.get("message") == check.message
        else:
            assert output is not None and output.text == check.message


def test_junit_escapes_what_a_name_holds(tmp_path: Path) -> None:
    checks = [gate.Check("a<b>&'\"", False, 'drop < 1 & > "0" ä')]
    path = tmp_path / "junit.xml"
    path.write_text(gate.junit(make_report(), checks), encoding="utf-8")
    case = ElementTree.parse(path).getroot()[0]
    assert case.get("name") == "a<b>&'\""
    assert case[0].get("message") == 'drop < 1 & > "0" ä'
