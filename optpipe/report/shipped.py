"""A report seen from one of its shipped engines. Pure."""

from __future__ import annotations

import dataclasses

from optpipe.errors import UsageError
from optpipe.report.schema import NetworkReport, Report
from optpipe.types import Precision


def at(run: str, report: Report, precision: Precision | None) -> Report:
    """The report with the engine of a precision as its result; as it is for None and the target's own.

    The original stays the one at the target's precision, beside which all engines were timed.

    Raises:
        UsageError: the run holds no measured engine of that precision.
    """
    if precision is None or precision == report.target.precision:
        return report
    found = next((one for one in report.precisions if one.precision == precision), None)
    if found is None:
        held = [one.precision for one in report.precisions if not one.failed] or [report.target.precision]
        raise UsageError(
            f"{run}: has no {precision} engine, only {' and '.join(held)}; add {precision!r} to [export] "
            "precisions and run it anew"
        )
    if found.latency is None or found.quality is None:
        reason = found.failed or "it was not measured"
        raise UsageError(f"{run}: its {precision} engine is left out: {reason}; hold another --precision")
    result = NetworkReport(
        found.quality,
        found.latency,
        report.result.parameters,
        report.result.macs,
        found.source_bytes,
        found.agreement,
        found.reliability,
        report.result.sparsity,
    )
    return dataclasses.replace(report, result=result)
