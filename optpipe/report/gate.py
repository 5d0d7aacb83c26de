"""The deployment gate: a finished report against two limits, also as JUnit XML. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

from optpipe.report.schema import Report


@dataclass(frozen=True, slots=True)
class Check:
    """One limit; ``message`` names the measured value and the limit."""

    name: str
    passed: bool
    message: str


def check(report: Report, max_accuracy_drop: float, min_latency_reduction: float) -> list[Check]:
    """Hold a report against its limits, in percentage points and percent.

    The latency must be better by the whole limit and its interval must exclude no saving at all. Without
    labels the drop is 100% minus the agreement with the original.
    """
    drop = (report.original.quality.value - report.result.quality.value) * 100
    latency = report.result.latency
    ratio = latency.ratio_to_original if latency.ratio_to_original is not None else 1.0
    upper = latency.ratio_ci95[1] if latency.ratio_ci95 is not None else 1.0
    reduction = (1.0 - ratio) * 100
    return [
        Check(
            "accuracy",
            drop <= max_accuracy_drop + 1e-9,
            f"{report.result.quality.metric} drop {drop:.2f} points, at most {max_accuracy_drop:g} allowed",
        ),
        Check(
            "latency",
            reduction >= min_latency_reduction - 1e-9 and (upper < 1.0 or min_latency_reduction <= 0),
            f"latency reduction {reduction:.2f}%, at least {min_latency_reduction:g}% asked",
        ),
    ]


def junit(report: Report, checks: list[Check]) -> str:
    """The checks as JUnit XML, a test case each."""
    failures = sum(not item.passed for item in checks)
    suite = ElementTree.Element(
        "testsuite", name=f"optpipe gate {report.name}", tests=str(len(checks)), failures=str(failures)
    )
    for item in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"optpipe.{report.name}", name=item.name)
        if item.passed:
            ElementTree.SubElement(case, "system-out").text = item.message
        else:
            ElementTree.SubElement(case, "failure", message=item.message)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
