"""The deployment gate: a finished report against limits and an older one; as JUnit XML and Markdown. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args
from xml.etree import ElementTree

from optpipe import store
from optpipe.errors import UsageError
from optpipe.report import intervals, shipped
from optpipe.report.schema import Report
from optpipe.types import Latency, Limits, Precision, Quality

SCHEMA = "optpipe.gate/1"
HAIR = 1e-9
"""25% of 8 ms is 25%, whatever 1 - 6 / 8 is in floating point."""

Outcome = Literal["passed", "uncertain", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """One limit, and how the measured value stands to it.

    "uncertain": the value misses the limit, but its 95% interval does not exclude that it is kept; that
    passes. "skipped": the two runs cannot be compared, as ``message`` says. Values are in ``unit``; they are
    None where nothing was compared, the interval also where there is none.
    """

    name: str
    outcome: Outcome
    message: str
    value: float | None = None
    ci95: tuple[float, float] | None = None
    limit: float | None = None
    unit: str = ""

    @property
    def passed(self) -> bool:
        """Whether this lets a run through."""
        return self.outcome != "failed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks of one run; ``baseline`` names the older run, None where there is none.

    ``precision`` is that of the engine that was held against the limits.
    """

    schema: str
    run: str
    name: str
    baseline: str | None
    strict: bool
    passed: bool
    checks: tuple[Check, ...]
    precision: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """The report of an older run; with ``across_machines`` latencies of other machines are compared too."""

    path: str
    report: Report
    across_machines: bool = False


def judge(run: str, report: Report, limits: Limits, baseline: Baseline | None = None) -> Verdict:
    """Hold a report against every limit that is given, and against an older one.

    Raises:
        UsageError: there is no limit, nothing could be compared, or a report lacks what a limit is about.
    """
    report = shipped.at(run, report, limits.precision)
    if baseline is not None:
        old = shipped.at(baseline.path, baseline.report, limits.precision)
        baseline = dataclasses.replace(baseline, report=old)
    checks = check(run, report, limits)
    if baseline is not None:
        checks += compare(report, baseline, limits)
    if not checks:
        raise UsageError(
            f"{run}: there is nothing to hold it against: give --max-accuracy-drop, --min-agreement, "
            "--min-latency-reduction or --baseline, or a [gate] table in its recipe"
        )
    if all(item.outcome == "skipped" for item in checks):
        raise UsageError(f"{run}: nothing could be checked: {'; '.join(item.message for item in checks)}")
    passed = all(item.passed for item in checks)
    against = None if baseline is None else baseline.path
    held = limits.precision or report.target.precision
    return Verdict(SCHEMA, run, report.name, against, limits.strict, passed, tuple(checks), held)


def options(
    *,
    max_accuracy_drop: float | None,
    min_agreement: float | None,
    min_latency_reduction: float | None,
    max_accuracy_regression: float | None,
    max_latency_regression: float | None,
    strict: bool,
    against_baseline: bool,
    precision: str | None = None,
) -> Limits:
    """The limits that a command line gives.

    Raises:
        UsageError: a limit or precision cannot be meant, or a regression's has no baseline.
    """
    meant = next((known for known in get_args(Precision) if known == precision), None)
    if precision is not None and meant is None:
        raise UsageError(f"--precision {precision}: must be one of {', '.join(get_args(Precision))}")
    given = Limits(
        max_accuracy_drop,
        min_agreement,
        min_latency_reduction,
        max_accuracy_regression,
        max_latency_regression,
        strict,
        meant,
    )
    problem = given.problem()
    if problem is not None:
        raise UsageError(f"{_option(problem[0])} {problem[1]:g}: {problem[2]}")
    for key in ("max_accuracy_regression", "max_latency_regression"):
        value: float | None = getattr(given, key)
        if value is not None and not against_baseline:
            raise UsageError(f"{_option(key)} {value:g}: needs the older run, --baseline OLD_RUN")
    return given


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def check(run: str, report: Report, limits: Limits) -> list[Check]:
    """The checks against the original. Without labels the accuracy is the agreement with it.

    Under ``strict`` a latency's interval must exclude no saving at all, too.
    """
    original, result = report.original.quality, report.result.quality
    checks: list[Check] = []
    if limits.max_accuracy_drop is not None:
        ends = intervals.difference(original, result, intervals.disagreements(report.result))
        if result.metric == "agreement":  # with the original itself, which is no sample
            ends = 1 - result.ci95[1], 1 - result.ci95[0]
        drop = (original.value - result.value) * 100, (ends[0] * 100, ends[1] * 100)
        held = _Held("accuracy", f"{result.metric} drop", "points", *drop)
        checks.append(held.at_most(limits.max_accuracy_drop, limits.strict))
    if limits.min_agreement is not None:
        agreement = report.result.agreement or (result if result.metric == "agreement" else None)
        if agreement is None:
            raise UsageError(f"{run}: the report holds no agreement with the original")
        share = agreement.value * 100, (agreement.ci95[0] * 100, agreement.ci95[1] * 100)
        held = _Held("agreement", "agreement with the original", "%", *share)
        checks.append(held.at_least(limits.min_agreement, limits.strict))
    if limits.min_latency_reduction is not None:
        latency = report.result.latency
        if latency.ratio_to_original is None or latency.ratio_ci95 is None:
            raise UsageError(f"{run}: the report's result was not timed beside its original")
        low, high = latency.ratio_ci95
        saved = (1 - latency.ratio_to_original) * 100, ((1 - high) * 100, (1 - low) * 100)
        held = _Held("latency", "latency reduction", "%", *saved)
        found = held.at_least(limits.min_latency_reduction, limits.strict)
        if limits.strict and found.passed and limits.min_latency_reduction > 0 and not high < 1:
            message = f"{found.message}; the interval includes no saving at all"
            found = dataclasses.replace(found, outcome="failed", message=message)
        checks.append(found)
    return checks


def compare(report: Report, baseline: Baseline, limits: Limits) -> list[Check]:
    """The result against an older run's result: accuracy and latency."""
    return [_accuracy(report, baseline, limits), _latency(report, baseline, limits)]


def _accuracy(report: Report, baseline: Baseline, limits: Limits) -> Check:
    name, old = "accuracy against the baseline", baseline.report
    new_q, old_q = report.result.quality, old.result.quality
    if new_q.metric != old_q.metric:
        return Check(name, "skipped", f"not compared: {new_q.metric} here, {old_q.metric} there")
    same_original = _same_original(report, old)
    if new_q.metric == "agreement" and not same_original:
        return Check(name, "skipped", "not compared: the two agreements are with different originals")
    same_images = report.data.evaluation_sha256 == old.data.evaluation_sha256
    differing = None
    if same_images and same_original:
        differing = intervals.disagreements(report.result, old.result)
    low, high = intervals.difference(old_q, new_q, differing)
    fallen = (old_q.value - new_q.value) * 100, (low * 100, high * 100)
    remark = f"from {_share(old_q)} to {_share(new_q)}"
    if not same_images:
        remark += ", on other images"
    held = _Held(name, f"{new_q.metric} drop", "points", *fallen, remark)
    return held.at_most(limits.max_accuracy_regression or 0.0, limits.strict)


def _latency(report: Report, baseline: Baseline, limits: Limits) -> Check:
    """The ratios to the original divided where it is the same; else medians, which have no interval."""
    name, old = "latency against the baseline", baseline.report
    new_l, old_l = report.result.latency, old.result.latency
    elsewhere = _machine_difference(new_l, old_l)
    if elsewhere and not baseline.across_machines:
        message = f"not compared: the machines or their settings differ ({elsewhere})"
        return Check(name, "skipped", f"{message}; --across-machines compares them")
    if report.target.batch != old.target.batch:
        message = f"not compared: batches of {report.target.batch} here, of {old.target.batch} there"
        return Check(name, "skipped", message)
    mark = f", though the machines or their settings differ ({elsewhere})" if elsewhere else ""
    if report.target == old.target and _same_original(report, old):
        found = intervals.quotient(new_l, old_l)
        if found is None:
            return Check(name, "skipped", "not compared: a result was not timed beside its original")
        ratio, (low, high) = found
        slower = (ratio - 1) * 100, ((low - 1) * 100, (high - 1) * 100)
        remark = f"each timed beside the same original{mark}"
        held = _Held(name, "latency increase", "%", *slower, remark)
        return held.at_most(limits.max_latency_regression or 0.0, limits.strict)
    remark = f"from {old_l.median_ms:.3f} to {new_l.median_ms:.3f} ms{mark}"
    if not limits.strict:
        message = (
            f"not compared: {remark}; the two runs time other originals or targets, so that their times have "
            "no interval: --strict compares them as they are, optpipe bench RUN --vs OLD_RUN times them anew"
        )
        return Check(name, "skipped", message)
    increase = (new_l.median_ms / old_l.median_ms - 1) * 100
    held = _Held(name, "latency increase", "%", increase, None, remark)
    return held.at_most(limits.max_latency_regression or 0.0, strict=True)


def _same_original(report: Report, old: Report) -> bool:
    digest = report.sha256.get("original weights")
    return digest is not None and digest == old.sha256.get("original weights") and report.model == old.model


def _machine_difference(new: Latency, old: Latency) -> str:
    """What of the machine differs, in words; empty where nothing does."""
    there, here = dataclasses.asdict(old.fingerprint), dataclasses.asdict(new.fingerprint)
    keys = [key for key in here if here[key] != there[key]]
    return ", ".join(f"{key} {_plain(here[key])} here, {_plain(there[key])} there" for key in keys)


def _plain(value: object) -> str:
    return " ".join(f"{a} {b}" for a, b in value) if isinstance(value, tuple) else str(value) or "unknown"


def _share(quality: Quality) -> str:
    return f"{quality.value:.2%}"


@dataclass(frozen=True, slots=True)
class _Held:
    """A measured value with its interval, to be held against a limit."""

    name: str
    what: str
    unit: str
    value: float
    ci95: tuple[float, float] | None
    remark: str = ""

    def at_most(self, limit: float, strict: bool) -> Check:
        """The value must not be above the limit. Comparisons are written so that nan fails."""
        low, high = self.ci95 or (self.value, self.value)
        return self._outcome(
            f"at most {self._with_unit(limit)} allowed",
            limit,
            kept=self.value <= limit + HAIR,
            reached=low <= limit + HAIR and not strict,
            beyond=not high <= limit + HAIR,
        )

    def at_least(self, limit: float, strict: bool) -> Check:
        """The value must not be below the limit."""
        low, high = self.ci95 or (self.value, self.value)
        return self._outcome(
            f"at least {self._with_unit(limit)} asked",
            limit,
            kept=self.value >= limit - HAIR,
            reached=high >= limit - HAIR and not strict,
            beyond=not low >= limit - HAIR,
        )

    def _outcome(self, asked: str, limit: float, *, kept: bool, reached: bool, beyond: bool) -> Check:
        outcome: Outcome = "passed" if kept else "uncertain" if reached else "failed"
        note = "; the interval reaches beyond that" if kept and beyond else ""
        note = "; the interval does not exclude that" if outcome == "uncertain" else note
        between = "" if self.ci95 is None else f" ({self.ci95[0]:.2f} to {self.ci95[1]:.2f})"
        shown = self._with_unit(f"{self.value:.2f}")
        remark = f" {self.remark}" if self.remark else ""
        message = f"{self.what} {shown}{between}{remark}, {asked}{note}"
        return Check(self.name, outcome, message, self.value, self.ci95, limit, self.unit)

    def _with_unit(self, number: float | str) -> str:
        shown = number if isinstance(number, str) else f"{number:g}"
        if self.unit == "%":
            return f"{shown}%"
        return f"{shown} {self.unit.removesuffix('s') if shown == '1' else self.unit}"


def junit(report: Report, verdict: Verdict) -> str:
    """The checks as JUnit XML, a test case each."""
    checks = verdict.checks
    held = "" if verdict.precision == report.target.precision else f" {verdict.precision}"
    count = {outcome: sum(item.outcome == outcome for item in checks) for outcome in ("failed", "skipped")}
    suite = ElementTree.Element(
        "testsuite",
        name=f"optpipe gate {report.name}{held}",
        tests=str(len(checks)),
        failures=str(count["failed"]),
        skipped=str(count["skipped"]),
    )
    for item in checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"optpipe.{report.name}{held}", name=item.name
        )
        if item.outcome == "failed":
            ElementTree.SubElement(case, "failure", message=item.message)
        elif item.outcome == "skipped":
            ElementTree.SubElement(case, "skipped", message=item.message)
        else:
            ElementTree.SubElement(case, "system-out").text = item.message
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def as_text(verdict: Verdict) -> str:
    """A line for each check, as a terminal shows it."""
    return "".join(f"{item.outcome.upper()} {item.name}: {item.message}\n" for item in verdict.checks)


def as_json(verdict: Verdict) -> str:
    """The verdict as JSON."""
    return store.to_json(verdict)


def failed(verdict: Verdict) -> list[str]:
    """The names of the checks that failed."""
    return [item.name for item in verdict.checks if not item.passed]


def markdown(report: Report, verdict: Verdict) -> str:
    """A summary for a pull request or a build's page."""
    machine = report.result.latency.fingerprint.device
    rows = [f"| {_cell(item.name)} | {item.outcome} | {_cell(item.message)} |" for item in verdict.checks]
    return "\n".join(
        [
            f"### optpipe gate: {_cell(report.name)} {'passed' if verdict.passed else 'FAILED'}",
            "",
            f"{_cell(report.method)} on {_cell(report.model)}, {report.target.backend} "
            f"{verdict.precision} at batch {report.target.batch} on {_cell(machine)}."
            + (f" Baseline: {_cell(verdict.baseline)}." if verdict.baseline else ""),
            "",
            "| check | outcome | measured (95% interval) and allowed |",
            "| --- | --- | --- |",
            *rows,
            "",
            "",
        ]
    )


def _cell(text: str) -> str:
    """Text that cannot break out of a table."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.split())
