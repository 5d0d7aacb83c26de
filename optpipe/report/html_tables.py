"""The tables of report.html that are made from the report's own fields. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from optpipe.report.html_parts import Entry, Sheet, spread
from optpipe.report.schema import PrecisionReport, Report
from optpipe.types import Curve, Figure, Latency, Quality

PERCENTILES = (0.0, 50.0, 90.0, 95.0, 99.0, 100.0)
DISTRIBUTION = "How the latencies are spread"


def sides(report: Report) -> Sheet:
    """The original against the result, a row for each measure."""
    original, result = report.original, report.result
    quality, latency = result.quality, result.latency
    points = (quality.value - original.quality.value) * 100
    rows = [
        _side(
            f"{original.quality.metric} on {original.quality.count} {original.quality.split} images",
            accuracy(original.quality),
            accuracy(quality),
            f"{points:+.2f} points",
        ),
        _side(
            f"{original.latency.headline}, median ms of a batch of {report.target.batch}",
            f"{original.latency.median_ms:.3f}",
            f"{latency.median_ms:.3f}",
            change(latency),
        ),
        _side("before recovery", "", accuracy(report.quality_before_recovery), ""),
    ]
    if original.quality.top5 is not None and quality.top5 is not None:
        gained = (quality.top5 - original.quality.top5) * 100
        rows.append(
            _side("top5", f"{original.quality.top5:.2%}", f"{quality.top5:.2%}", f"{gained:+.2f} points")
        )
    if result.agreement is not None:
        rows.append(_side("agreement with the original", "", accuracy(result.agreement), ""))
    if result.sparsity or original.sparsity:
        rows.append(_side("weights that are zero", f"{original.sparsity:.2%}", f"{result.sparsity:.2%}", ""))
    rows += [
        _count("parameters", original.parameters, result.parameters),
        _count("MACs of one image", original.macs, result.macs),
        _count("ONNX bytes", original.onnx_bytes, result.onnx_bytes),
    ]
    below = "" if report.target.precision == "fp32" else f", {report.target.precision}"
    columns = ("measure", f"original{below}", f"result{below}", "change")
    return Sheet("Original against result", columns, tuple(rows), sortable=False)


def precisions(report: Report) -> Sheet | None:
    """The original, and the result at each precision on an engine of its own; None without engines."""
    if not report.precisions:
        return None
    original = report.original
    first = (
        Entry(f"original, {report.target.precision}"),
        _accuracy_entry(original.quality),
        Entry(),
        *_timed(original.latency),
        Entry(),
        Entry(),
        Entry(),
        Entry("; ".join(original.latency.notes)),
    )
    columns = (
        "network",
        original.quality.metric,
        "agreement with the original",
        f"{original.latency.headline}, median ms",
        "against the original",
        "Enqueue Time, ms",
        "H2D Latency, ms",
        "D2H Latency, ms",
        "end to end, ms",
        "engine bytes",
        "build, s",
        "largest relative error",
        "notes",
    )
    rows = (first, *[_precision(one, len(columns)) for one in report.precisions])
    return _without_empty_columns(Sheet("Precisions: each on its own engine", columns, rows))


def distributions(report: Report) -> Sheet:
    """What was measured of each network's latencies, in milliseconds."""
    columns = ("network", "min", "median", "mean", "p90", "p95", "p99", "max", "samples", "settled")
    rows = tuple(
        (
            Entry(name),
            *[
                _ms(value)
                for value in (
                    found.min_ms,
                    found.median_ms,
                    found.mean_ms,
                    found.p90_ms,
                    found.p95_ms,
                    found.p99_ms,
                    found.max_ms,
                )
            ],
            Entry(str(found.samples), float(found.samples)),
            Entry("yes" if found.converged else "no: the time for it ran out"),
        )
        for name, found in _latencies(report)
    )
    return Sheet(f"{DISTRIBUTION}, in ms of a batch", columns, rows)


def distribution_figure(report: Report) -> Figure:
    """The percentiles of each network's latencies, joined by lines."""
    curves = tuple(
        Curve(
            name,
            PERCENTILES,
            (found.min_ms, found.median_ms, found.p90_ms, found.p95_ms, found.p99_ms, found.max_ms),
        )
        for name, found in _latencies(report)
    )
    return Figure(DISTRIBUTION, "share of the inferences that take no longer, %", "ms", curves)


def taken_out(report: Report) -> Sheet | None:
    """What the plan takes out, a row for each block and narrowed group; None where it takes out nothing."""
    plan = report.plan
    rows = [(Entry(name), Entry("dropped")) for name in plan.drop_blocks]
    rows += [
        (Entry(name), Entry(f"{len(kept)} channels kept", float(len(kept))))
        for name, kept in plan.keep_channels
    ]
    if plan.input_hw is not None:
        rows.append((Entry("input"), Entry(f"{plan.input_hw[0]} x {plan.input_hw[1]} pixels")))
    return Sheet("What the plan takes out", ("part", "what became of it"), tuple(rows)) if rows else None


def ensemble(report: Report) -> Sheet | None:
    """What the ensemble tells, and what asking it costs; None where none is shipped."""
    joined = report.ensemble
    if joined is None:
        return None
    rows = [
        ("members", f"{joined.members}"),
        ("file", f"{joined.onnx_bytes:,} bytes"),
    ]
    if joined.failed:
        rows.append(("no price", joined.failed))
    if joined.latency is not None:
        rows.append((f"{joined.latency.headline}, median", f"{joined.latency.median_ms:.3f} ms"))
        rows.append(("against the original", change(joined.latency)))
    if joined.quality is not None:
        rows.append((joined.quality.metric, accuracy(joined.quality)))
    means = (
        ("expected entropy", joined.expected_entropy, "{:.4f} nats"),
        ("mutual information", joined.mutual_information, "{:.4f} nats"),
        ("1/d^2 (DLLP, Eq. 9)", joined.aleatoric_variance, "{:.5f}"),
    )
    rows += [(name, form.format(value)) for name, value, form in means if value is not None]
    shown = tuple((Entry(name), Entry(value)) for name, value in rows)
    return Sheet("The price of knowing: uncertainty.onnx", ("measure", "value"), shown)


def engines(report: Report) -> Sheet | None:
    """Where the candidates' engines came from; None where no latency was asked for."""
    count = report.engines
    if count is None or not count.candidates:
        return None
    rows = [
        ("latencies asked for", count.candidates),
        ("answered by an engine of equal structure", count.candidates - count.structures),
        ("answered from other runs", count.cached),
        ("engines built", len(count.builds_s)),
    ]
    shown = [(Entry(name), Entry(str(value), float(value))) for name, value in rows]
    times = [("building, s", sum(count.builds_s))]
    if count.first_build_s is not None and count.second_build_s is not None:
        times.append(("first build of one candidate, s", count.first_build_s))
        times.append(("its second build, with a warm cache, s", count.second_build_s))
    shown += [(Entry(name), Entry(f"{value:.2f}", value)) for name, value in times]
    return Sheet("Engines of the search", ("measure", "value"), tuple(shown))


def accuracy(quality: Quality) -> str:
    """A quality in percent with its interval."""
    low, high = quality.ci95
    return f"{quality.value:.2%} ({spread(f'{low:.1%}', f'{high:.1%}')})"


def change(latency: Latency) -> str:
    """The change of the latency against the original's with its interval; "" for the original itself."""
    if latency.ratio_to_original is None or latency.ratio_ci95 is None:
        return ""
    low, high = latency.ratio_ci95
    return f"{latency.ratio_to_original - 1:+.1%} ({spread(f'{low - 1:+.1%}', f'{high - 1:+.1%}')})"


def _side(name: str, original: str, result: str, changed: str) -> tuple[Entry, ...]:
    return Entry(name), Entry(original), Entry(result), Entry(changed)


def _count(name: str, original: int, result: int) -> tuple[Entry, ...]:
    changed = f"{result / original - 1:+.1%}" if original else ""
    return _side(name, f"{original:,}", f"{result:,}", changed)


def _accuracy_entry(quality: Quality) -> Entry:
    return Entry(accuracy(quality), quality.value)


def _precision(one: PrecisionReport, columns: int) -> tuple[Entry, ...]:
    name = Entry(f"result, {one.precision}")
    if one.latency is None or one.quality is None:
        return (name, *[Entry()] * (columns - 2), Entry(f"none: {one.failed}"))
    notes = [*one.notes, *one.latency.notes]
    if one.kept_in_float:
        notes.append(f"{len(one.kept_in_float)} nodes kept in float: {', '.join(one.kept_in_float)}")
    return (
        name,
        _accuracy_entry(one.quality),
        Entry() if one.agreement is None else _accuracy_entry(one.agreement),
        *_timed(one.latency),
        Entry(f"{one.engine_bytes:,}", float(one.engine_bytes)),
        Entry(f"{one.build_s:.2f}", one.build_s),
        Entry() if one.max_rel is None else Entry(f"{one.max_rel:.2g}", one.max_rel),
        Entry("; ".join(notes)),
    )


def _timed(latency: Latency) -> tuple[Entry, ...]:
    beside = (latency.enqueue_ms, latency.h2d_ms, latency.d2h_ms, latency.end_to_end_ms)
    return (
        _ms(latency.median_ms),
        Entry(change(latency), latency.ratio_to_original),
        *[Entry() if value is None else _ms(value) for value in beside],
    )


def _ms(value: float) -> Entry:
    return Entry(f"{value:.3f}", value)


def _without_empty_columns(shown: Sheet) -> Sheet:
    kept = [index for index in range(len(shown.columns)) if any(row[index].text for row in shown.rows)]
    rows = tuple(tuple(row[index] for index in kept) for row in shown.rows)
    return Sheet(shown.title, tuple(shown.columns[index] for index in kept), rows)


def _latencies(report: Report) -> Iterator[tuple[str, Latency]]:
    """Each network that was timed at the end, by its name in the report."""
    yield f"original, {report.target.precision}", report.original.latency
    if not report.precisions:
        yield f"result, {report.target.precision}", report.result.latency
    for one in report.precisions:
        if one.latency is not None:
            yield f"result, {one.precision}", one.latency
    if report.ensemble is not None and report.ensemble.latency is not None:
        yield f"ensemble of {report.ensemble.members}", report.ensemble.latency
