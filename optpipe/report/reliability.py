"""How far the probabilities of the original and of what is shipped can be trusted: a table and a figure."""

from __future__ import annotations

from collections.abc import Iterator

from optpipe.report.schema import Report
from optpipe.types import Cell, Curve, Figure, Reliability, Table

TITLE = "Reliability: how sure of the class, and how often right"


def table(report: Report) -> Table | None:
    """A row for each network: calibration error and selective accuracy; None without labels."""
    named = list(_named(report))
    if not named:
        return None
    shares = [one.rejected for one in named[0][1].selective]
    heads = [f"the least sure {share:.0%} rejected" if share else "accuracy" for share in shares]
    bins = len(named[0][1].calibration.bins)
    return Table(TITLE, ("network", f"calibration error, {bins} bins", *heads), tuple(map(_row, named)))


def figure(report: Report) -> Figure | None:
    """The reliability diagram: accuracy over mean probability, a point a bin; None without labels."""
    named = list(_named(report))
    if not named:
        return None
    ideal = Curve("as sure as right", (0.0, 1.0), (0.0, 1.0))
    curves = (_curve(name, found) for name, found in named)
    return Figure(TITLE, "probability of the likeliest class", "accuracy", (ideal, *curves))


def _named(report: Report) -> Iterator[tuple[str, Reliability]]:
    """Each network whose answers were held against labels, by its name in the report."""
    if report.original.reliability is not None:
        yield f"original, {report.target.precision}", report.original.reliability
    for one in report.precisions:
        if one.reliability is not None:
            yield f"result, {one.precision}", one.reliability


def _row(named: tuple[str, Reliability]) -> tuple[Cell, ...]:
    name, found = named
    return (name, f"{found.calibration.error:.2%}", *[f"{one.accuracy:.2%}" for one in found.selective])


def _curve(name: str, found: Reliability) -> Curve:
    """A line through the bins that hold images."""
    points = [
        (row.confidence, row.accuracy)
        for row in found.calibration.bins
        if row.confidence is not None and row.accuracy is not None
    ]
    return Curve(name, tuple(x for x, _ in points), tuple(y for _, y in points))
