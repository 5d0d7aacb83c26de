"""report.json -> Markdown, for pull requests and terminals. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optpipe.report import layers, leakage, reliability
from optpipe.report.schema import NetworkReport, PrecisionReport, Report
from optpipe.types import Cell, DeviceState, Figure, Latency, Quality, Table, Tune

_BESIDE = ("Enqueue Time", "H2D Latency", "D2H Latency", "Latency")
"""What stands beside a GPU's compute time where it was measured, by trtexec's names."""


def render(report: Report) -> str:
    """The whole report as Markdown."""
    sections = [
        f"# {report.name}: {report.method} on {report.model}",
        _verdict(report),
        _side_by_side(report),
        _precisions(report),
        _reliability(report),
        _price_of_knowing(report),
        f"**Why this plan.** {report.reason}",
        leakage.section(report.leakage),
        _engines(report),
        *_tables(report),
        *_layers(report),
        _synthesized(report),
        _conditions(report),
        _hashes(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def summary(report: Report, folder: str) -> list[str]:
    """At most 15 lines for a terminal."""
    original, result = report.original, report.result
    lines = [
        f"{report.name}: {report.method} on {report.model}, {report.target.backend} "
        f"(batch {report.target.batch}, {report.environment.executed_on})",
        *_taken_out(report),
        f"  latency     {original.latency.median_ms:.3f} -> {result.latency.median_ms:.3f} ms   "
        f"{_change(result.latency)}",
        f"  {original.quality.metric:<10}  {_quality(original.quality)} -> {_quality(result.quality)}"
        f"   (before recovery {report.quality_before_recovery.value:.1%})",
    ]
    for one in report.precisions[1:]:
        if one.latency is not None and one.quality is not None:
            slower = "".join(f"; {note}" for note in one.notes if note.startswith("slower"))
            lines.append(
                f"  at {one.precision:<8} {one.latency.median_ms:.3f} ms   {_change(one.latency)}, "
                f"{one.quality.metric} {one.quality.value:.2%}{slower}"
            )
    if result.agreement is not None:
        lines.append(f"  agreement   {_quality(result.agreement)} with the original")
    lines += [
        f"  parameters  {original.parameters:,} -> {result.parameters:,}   "
        f"{result.parameters / original.parameters - 1:+.1%}",
        f"  MACs        {original.macs:,} -> {result.macs:,}   {result.macs / original.macs - 1:+.1%}",
        f"  budget      {'met' if report.budget.met else 'NOT MET'}: {report.budget.verdict}",
        f"  took        {sum(stage.seconds for stage in report.stages.values()):.0f} s: "
        + ", ".join(f"{name} {stage.seconds:.0f}" for name, stage in report.stages.items()),
        *[f"  warning     {warning}" for warning in report.warnings],
        f"  report      {folder}/report.md",
    ]
    return lines[:14] + lines[-1:] if len(lines) > 15 else lines


def _taken_out(report: Report) -> list[str]:
    """What the plan takes out, a line for each kind."""
    plan = report.plan
    lines = []
    if plan.drop_blocks or not plan.keep_channels:
        lines.append(f"  dropped     {' '.join(plan.drop_blocks) or 'nothing'}")
    if plan.keep_channels:
        kept = ", ".join(f"{name} {len(channels)}" for name, channels in plan.keep_channels[:3])
        more = ", ..." if len(plan.keep_channels) > 3 else ""
        lines.append(f"  narrowed    {len(plan.keep_channels)} channel groups: {kept}{more}")
    return lines


def _verdict(report: Report) -> str:
    mark = "met" if report.budget.met else "**not met**"
    lines = [f"Budget {mark}: {report.budget.verdict}.", *[f"Note: {note}." for note in report.notes]]
    lines += [f"Warning: {_one_line(warning)}." for warning in report.warnings]
    return "\n".join(lines)


def _side_by_side(report: Report) -> str:
    original, result = report.original, report.result
    rows = [
        ("", *_heads(report), "change"),
        ("---", "---:", "---:", "---:"),
        (
            f"{original.quality.metric} ({original.quality.count} images)",
            _quality(original.quality),
            _quality(result.quality),
            f"{(result.quality.value - original.quality.value) * 100:+.2f} points",
        ),
        ("before recovery", "", _quality(report.quality_before_recovery), ""),
        *_optional_rows(original, result),
        (
            f"{original.latency.headline}, median ms (batch {report.target.batch})",
            f"{original.latency.median_ms:.3f}",
            f"{result.latency.median_ms:.3f}",
            _change(result.latency),
        ),
        (
            "p90 / p95 / p99 ms",
            _percentiles(original.latency),
            _percentiles(result.latency),
            f"{result.latency.samples} pairs"
            + ("" if result.latency.converged else ", ended by `timing.final_budget_s`"),
        ),
        _count_row("parameters", original.parameters, result.parameters),
        _count_row("MACs of one image", original.macs, result.macs),
        _count_row("ONNX bytes", original.onnx_bytes, result.onnx_bytes),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _precisions(report: Report) -> str:
    """A row for each precision of the result, beside the original's."""
    if not report.precisions:
        return ""
    original = report.original
    first: tuple[Cell, ...] = (
        f"original, {report.target.precision}",
        _quality(original.quality),
        None,
        f"{original.latency.median_ms:.3f}",
        None,
        *_beside(original.latency),
        None,
        "; ".join(original.latency.notes),
    )
    columns = (
        "network",
        f"{original.quality.metric} ({original.quality.count} images)",
        "agreement with the original",
        f"{original.latency.headline}, median ms",
        "against the original",
        *[f"{name}, median ms" for name in _BESIDE],
        "engine bytes",
        "notes",
    )
    title = "Precisions: each on its own engine, timed in turn with the original"
    rows = (first, *[_precision(one) for one in report.precisions])
    return _table(_without_empty_columns(Table(title, columns, rows)))


def _precision(one: PrecisionReport) -> tuple[Cell, ...]:
    name = f"result, {one.precision}"
    if one.latency is None or one.quality is None or one.agreement is None:
        return (name, *[None] * (5 + len(_BESIDE)), f"none: {one.failed}")
    notes = [*one.notes, *one.latency.notes]
    if one.kept_in_float:
        notes.append(f"{len(one.kept_in_float)} nodes kept in float: {', '.join(one.kept_in_float)}")
    return (
        name,
        _quality(one.quality),
        f"{one.agreement.value:.2%}",
        f"{one.latency.median_ms:.3f}",
        _change(one.latency),
        *_beside(one.latency),
        f"{one.engine_bytes:,}",
        "; ".join(notes),
    )


def _beside(latency: Latency) -> tuple[Cell, ...]:
    return latency.enqueue_ms, latency.h2d_ms, latency.d2h_ms, latency.end_to_end_ms


def _without_empty_columns(table: Table) -> Table:
    kept = [index for index in range(len(table.columns)) if any(row[index] is not None for row in table.rows)]
    rows = tuple(tuple(row[index] for index in kept) for row in table.rows)
    return Table(table.title, tuple(table.columns[index] for index in kept), rows)


def _reliability(report: Report) -> str:
    """Calibration and selective accuracy, and the reliability diagram."""
    found = reliability.table(report)
    figures = all_figures(report)
    return "" if found is None else f"{_table(found)}\n\n{_image(figures[-1], figure_paths(figures)[-1])}"


def _price_of_knowing(report: Report) -> str:
    """What the ensemble tells, and what asking it costs beside the result alone."""
    joined = report.ensemble
    if joined is None:
        return ""
    said = (
        f"**The price of knowing.** `uncertainty.onnx` joins {joined.members} networks and gives, beside the "
        "log of their mean probabilities, each image's expected entropy and mutual information in nats."
    )
    if joined.latency is None or joined.quality is None:
        return f"{said} What it costs is not known: {_one_line(joined.failed)}."
    alone, ratio = report.result.latency.ratio_to_original, joined.latency.ratio_to_original
    times = "" if not alone or ratio is None else f", {ratio / alone:.2f} times the result's"
    lines = [
        said,
        f"An inference of its logits at {report.target.precision} takes {joined.latency.median_ms:.3f} ms "
        f"(median), {_change(joined.latency)} against the original{times}. {joined.quality.metric} is "
        f"{_quality(joined.quality)}, the result's {_quality(report.result.quality)}.",
    ]
    means = [
        (joined.expected_entropy, "expected entropy {:.4f} nats"),
        (joined.mutual_information, "mutual information {:.4f} nats"),
        (joined.aleatoric_variance, "1/d^2 (DLLP, Eq. 9) {:.5f}"),
    ]
    found = ", ".join(text.format(value) for value, text in means if value is not None)
    return " ".join([*lines, f"Over the evaluation images: {found}."] if found else lines)


def _engines(report: Report) -> str:
    """Where the candidates' engines came from, and what a cache saved."""
    count = report.engines
    if count is None or not count.candidates:
        return ""
    shared = count.candidates - count.structures
    saved = shared + count.cached
    lines = [
        f"**Engines.** {count.candidates} latencies were asked for; {saved} of them "
        f"({saved / count.candidates:.0%}) were answered without a build: {shared} by an engine of equal "
        f"structure, {count.cached} from other runs. Building took {sum(count.builds_s):.1f} s for "
        f"{len(count.builds_s)} engines.",
    ]
    if count.first_build_s is not None and count.second_build_s is not None:
        lines.append(
            f"One candidate's first build took {count.first_build_s:.2f} s, its second with a warm cache "
            f"{count.second_build_s:.2f} s ({count.second_build_s / count.first_build_s - 1:+.0%})."
        )
    elif count.builds_s:
        lines.append("This backend keeps no cache of builds.")
    return " ".join(lines)


def _heads(report: Report) -> tuple[str, str]:
    """What is compared; below fp32 the original is the original at that precision."""
    precision = report.target.precision
    return (
        ("original", "result") if precision == "fp32" else (f"original, {precision}", f"result, {precision}")
    )


def _optional_rows(original: NetworkReport, result: NetworkReport) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    if original.quality.top5 is not None and result.quality.top5 is not None:
        change = (result.quality.top5 - original.quality.top5) * 100
        rows.append(
            ("top5", f"{original.quality.top5:.2%}", f"{result.quality.top5:.2%}", f"{change:+.2f} points")
        )
    if result.agreement is not None:
        rows.append(("agreement with the original", "", _quality(result.agreement), ""))
    return rows


def _count_row(name: str, original: int, result: int) -> tuple[str, str, str, str]:
    return name, f"{original:,}", f"{result:,}", f"{result / original - 1:+.1%}"


def _quality(quality: Quality) -> str:
    return f"{quality.value:.2%} ({quality.ci95[0]:.1%} to {quality.ci95[1]:.1%})"


def _change(latency: Latency) -> str:
    if latency.ratio_to_original is None or latency.ratio_ci95 is None:
        return ""
    low, high = latency.ratio_ci95
    return f"{latency.ratio_to_original - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})"


def _percentiles(latency: Latency) -> str:
    return f"{latency.p90_ms:.3f} / {latency.p95_ms:.3f} / {latency.p99_ms:.3f}"


def _table(table: Table) -> str:
    lines = [
        f"## {table.title}",
        "",
        f"| {' | '.join(_cell(column) for column in table.columns)} |",
        f"|{'|'.join(' --- ' for _ in table.columns)}|",
        *[f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows],
    ]
    return "\n".join(lines)


def _tables(report: Report) -> list[str]:
    """The tables, each with the figures of its title; the other figures under titles of their own."""
    paths = figure_paths(report.figures)
    shown = [(figure.title, _image(figure, path)) for figure, path in zip(report.figures, paths, strict=True)]
    sections: list[str] = []
    for table in report.tables:
        sections += [_table(table), *[image for title, image in shown if title == table.title]]
    titles = {table.title for table in report.tables}
    return sections + [f"## {_one_line(title)}\n\n{image}" for title, image in shown if title not in titles]


def _layers(report: Report) -> list[str]:
    """How long each layer takes; nothing in reports from before that was asked."""
    if report.layers is None:
        return []
    return [f"## {layers.TITLE}\n\n{layers.note(report.layers)}", *map(_table, layers.tables(report.layers))]


def _synthesized(report: Report) -> str:
    """The contact sheet of calibration images that were made from the original."""
    data = report.data
    if data.contact_sheet is None:
        return ""
    return (
        "## Calibration images made from the original alone\n\n"
        f"![{data.calibration_count} synthesised images, the first of them]({data.contact_sheet})"
    )


def all_figures(report: Report) -> tuple[Figure, ...]:
    """The method's figures, and the reliability diagram last where there is one."""
    diagram = reliability.figure(report)
    return report.figures if diagram is None else (*report.figures, diagram)


def figure_paths(figures: Sequence[Figure]) -> tuple[str, ...]:
    """Where the figures are, seen from the report: each at a path of its own, made from its title."""
    paths: list[str] = []
    for figure in figures:
        name = re.sub("[^a-z0-9]+", "-", figure.title.lower())[:60].strip("-") or "figure"
        path, number = f"figures/{name}.svg", 1
        while path in paths:
            number += 1
            path = f"figures/{name}-{number}.svg"
        paths.append(path)
    return tuple(paths)


def _image(figure: Figure, path: str) -> str:
    title = re.sub(r"([\\\[\]])", r"\\\1", _one_line(figure.title))
    return f"![{title}]({path})"


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return _one_line(str(cell)).replace("|", "\\|")


def _one_line(text: str) -> str:
    """What an engine's own words must be, so as not to end a row or a paragraph."""
    return " ".join(text.split())


def _conditions(report: Report) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report.environment.versions.items())
    data = report.data
    made = "" if data.contact_sheet is None else "synthesised "
    validated = f"validation: {data.validation_count} others; " if data.validation_count else ""
    stages = ", ".join(f"{name} {stage.seconds:.1f} s" for name, stage in report.stages.items())
    return "\n".join(
        [
            "## Conditions",
            "",
            f"- Executed on {report.environment.executed_on}; {report.environment.platform}.",
            *_clocks(report),
            f"- Target: {report.target.backend}, {report.target.precision}, batch {report.target.batch}, "
            f"input {report.target.input_shape}.",
            f"- Calibration: {data.calibration_count} {made}images; {validated}evaluation: "
            f"{data.evaluation_count} others.",
            f"- Seed {report.seed}; {_recovery(report.recover)}.",
            f"- Stages: {stages}.",
            f"- optpipe {report.environment.optpipe}, Python {report.environment.python}; {versions}.",
        ]
    )


def _recovery(recover: Tune) -> str:
    """How the result was trained, and by what: ``[recover]`` in a few words."""
    if not recover.steps:
        return "no recovery"
    softened = f"temperature {recover.temperature:g}"
    taught = "" if recover.teachers == "none" else f" and teachers ({recover.teachers}, {softened})"
    learned = {
        "mimic": "the original's features",
        "kd": f"the original's answers, {softened}",
        "cross": f"the original's features and answers, {softened}",
        "labels": f"labels{taught}",
    }[recover.loss]
    return f'recovery {recover.steps} steps of batch {recover.batch}, loss "{recover.loss}" ({learned})'


def _clocks(report: Report) -> list[str]:
    """The GPU's state around each timing, a line each; nothing where none was read."""
    timed = [("original", report.original.latency)]
    timed += [(f"result, {one.precision}", one.latency) for one in report.precisions if one.latency]
    return [
        f"- GPU before and after timing the {name}: {_state(latency.before)}; {_state(latency.after)}."
        for name, latency in timed
        if latency.before is not None or latency.after is not None
    ]


def _state(state: DeviceState | None) -> str:
    if state is None:
        return "not read"
    held = f", throttled: {', '.join(state.throttle)}" if state.throttle else ""
    return f"SM {state.sm_clock_mhz} MHz, memory {state.memory_clock_mhz} MHz, {state.temperature_c} C{held}"


def _hashes(report: Report) -> str:
    lines = ["## sha256", ""]
    lines += [f"- {name}: `{value}`" for name, value in report.sha256.items()]
    lines.append(f"- calibration images: `{report.data.calibration_sha256}`")
    if report.data.validation_sha256 is not None:
        lines.append(f"- validation images: `{report.data.validation_sha256}`")
    lines.append(f"- evaluation images: `{report.data.evaluation_sha256}`")
    return "\n".join(lines)
