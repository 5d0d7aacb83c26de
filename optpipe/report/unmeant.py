"""Figures in a report that no measurement gives: what shows and compares them divides by them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from optpipe.report.schema import NetworkReport, Report
from optpipe.types import Latency, Quality


def problem(report: Report) -> str | None:
    """The first figure that cannot be meant, in words; None where all can."""
    return next(_problems(report), None)


def _problems(report: Report) -> Iterator[str]:
    if report.target.batch < 1 or min(report.target.input_shape) < 1:
        yield f"target: batch {report.target.batch} of images {report.target.input_shape}"
    yield from _of_network("original", report.original)
    yield from _of_network("result", report.result)
    for one in report.precisions:
        if one.latency is not None:
            yield from _of_latency(f"precisions: {one.precision}", one.latency)
    if report.original.parameters < 1 or report.original.macs < 1:
        yield f"original: {report.original.parameters} parameters, {report.original.macs} MACs"


def _of_network(name: str, network: NetworkReport) -> Iterator[str]:
    yield from _of_quality(f"{name}: quality", network.quality)
    if network.agreement is not None:
        yield from _of_quality(f"{name}: agreement", network.agreement)
    yield from _of_latency(name, network.latency)
    if min(network.parameters, network.macs) < 0:
        yield f"{name}: {network.parameters} parameters, {network.macs} MACs"


def _of_quality(name: str, quality: Quality) -> Iterator[str]:
    low, high = quality.ci95
    if not (0 <= quality.value <= 1 and 0 <= low <= high <= 1 and quality.count > 0):
        yield f"{name}: {quality.value:g} ({low:g} to {high:g}) of {quality.count} images"


def _of_latency(name: str, latency: Latency) -> Iterator[str]:
    times = (latency.median_ms, latency.mean_ms, latency.min_ms, latency.max_ms)
    if not all(0 < one < math.inf for one in times) or latency.samples < 1:
        yield f"{name}: latency: median {latency.median_ms:g} ms of {latency.samples} samples"
    ratio, ends = latency.ratio_to_original, latency.ratio_ci95
    if (ratio is not None and not 0 < ratio < math.inf) or (
        ends is not None and not 0 < ends[0] <= ends[1] < math.inf
    ):
        yield f"{name}: latency: ratio to the original {ratio} ({ends})"
