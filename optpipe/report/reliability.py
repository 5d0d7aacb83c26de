"""How far the probabilities of the original and of what is shipped can be trusted: a table and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from optpipe.report.schema import EnsembleReport, Report
from optpipe.types import Cell, Curve, Figure, Reliability, Selective, Table

TITLE = "Reliability: how sure of the class, and how often right"


def table(report: Report) -> Table | None:
    """A row for each network: calibration error and selective accuracy; None without labels."""
    named = list(_named(report))
    if not named:
        return None
    shares = [one.rejected for one in named[0][1].selective]
    heads = [f"the least sure {share:.0%} rejected" if share else "accuracy" for share in shares]
    bins = len(named[0][1].calibration.bins)
    rows = [_row(name, f"{found.calibration.error:.2%}", found.selective) for name, found in named]
    joined = report.ensemble
    if joined is not None and joined.by_information:
        name = f"{_ensemble(joined)}, sure by mutual information"
        rows.append(_row(name, None, joined.by_information))
    return Table(TITLE, ("network", f"calibration error, {bins} bins", *heads), tuple(rows))


def figure(report: Report) -> Figure | None:
    """The reliability diagram: accuracy over mean probability, a point a bin; None without labels."""
    named = list(_named(report))
    if not named:
        return None
    ideal = Curve("as sure as right", (0.0, 1.0), (0.0, 1.0))
    curves = (curve for name, found in named for curve in _curves(name, found))
    return Figure(TITLE, "probability of the likeliest class", "accuracy", (ideal, *curves))


def _named(report: Report) -> Iterator[tuple[str, Reliability]]:
    """Each network whose answers were held against labels, by its name in the report."""
    if report.original.reliability is not None:
        yield f"original, {report.target.precision}", report.original.reliability
    for one in report.precisions:
        if one.reliability is not None:
            yield f"result, {one.precision}", one.reliability
    if report.ensemble is not None and report.ensemble.reliability is not None:
        yield _ensemble(report.ensemble), report.ensemble.reliability


def _ensemble(ensemble: EnsembleReport) -> str:
    return f"ensemble of {ensemble.members}"


def _row(name: str, error: str | None, selective: Sequence[Selective]) -> tuple[Cell, ...]:
    return (name, error, *[f"{one.accuracy:.2%}" for one in selective])


def _curves(name: str, found: Reliability) -> tuple[Curve, Curve]:
    """A line through the bins that hold images, and a dot for each: there may be but one."""
    points = [
        (row.confidence, row.accuracy)
        for row in found.calibration.bins
        if row.confidence is not None and row.accuracy is not None
    ]
    line = Curve(name, tuple(x for x, _ in points), tuple(y for _, y in points))
    return line, replace(line, style="dots")
