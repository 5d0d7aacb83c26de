"""``optpipe compare``: finished runs side by side, as a table and as one figure.

Latencies of different machines, results of different models and accuracies on different images say nothing of
each other. They are refused, or, where that is asked for, shown with a mark on each row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optpipe import files, store
from optpipe.errors import UsageError
from optpipe.report import build, figures, html_tradeoff
from optpipe.report.schema import Report
from optpipe.types import Budget, Curve, Figure, Fingerprint, Quality, Target

SCHEMA = "optpipe.comparison/1"


@dataclass(frozen=True, slots=True)
class Allowed:
    """Which differences between runs are shown and marked; all others are refused."""

    machines: bool = False
    models: bool = False
    images: bool = False


@dataclass(frozen=True, slots=True)
class Side:
    """One network of a run: what it gets right, and how long a batch takes.

    ``agreement`` is with the original; it takes the place of the accuracy where images have no labels.
    """

    quality: Quality
    median_ms: float
    parameters: int
    macs: int
    agreement: Quality | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One run. ``latency_ratio`` is the result's to the original's latency, timed in turn.

    ``machine`` is the first letters of the fingerprint's sha256, ``model`` the sha256 of the original's
    weights, ``images`` that of the evaluation images. ``marks`` say in what the run differs from the first.
    ``in_front`` is true where no run that compares with it, and no original of theirs, is at least as
    accurate and as fast, and better in one of the two.
    """

    run: str
    name: str
    method: str
    seed: int
    asked: str
    met: bool
    original: Side
    result: Side
    latency_ratio: float
    latency_ratio_ci95: tuple[float, float]
    target: Target
    fingerprint: Fingerprint
    machine: str
    model: str
    images: str
    marks: tuple[str, ...] = ()
    in_front: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """The runs in the order in which they were named. ``by_ratio`` says what the front and the figure go by.

    It is the latency as a share of the original's where the runs have one original on one target, since it
    was timed in turn and what else the machine did is out of it, and where machines differ. Where one
    machine timed originals of other models or in other precisions it is milliseconds.
    """

    schema: str
    by_ratio: bool
    rows: tuple[Row, ...]


def compare(runs: Sequence[Path], allowed: Allowed) -> Comparison:
    """The finished runs of these folders side by side; the first is what the others are held against.

    Raises:
        UsageError: there are fewer than two, one has no report, or they differ in what is not allowed.
    """
    if len(runs) < 2:
        raise UsageError(f"{runs[0] if runs else 'compare'}: name at least two runs to compare")
    return side_by_side(runs, allowed)


def side_by_side(runs: Sequence[Path], allowed: Allowed) -> Comparison:
    """As :func:`compare`, of one run too."""
    rows = [_row(run, build.read(run)) for run in runs]
    marked = [_marked(row, rows[0], allowed) for row in rows]
    alike = len({(row.model, row.target) for row in rows}) == 1
    across = len({(row.machine, row.target.batch) for row in rows}) > 1
    by_ratio = alike or across
    fronted = tuple(_fronted(row, marked, by_ratio) for row in marked)
    return Comparison(SCHEMA, by_ratio, fronted)


def write(compared: Comparison, folder: Path) -> None:
    """Write compare.md, compare.json and compare.svg, which the first shows.

    Raises:
        RunError: the folder cannot be written.
    """
    differs = any(row.marks for row in compared.rows)
    notes = ["of runs that differ: the table says in what"] if differs else []
    files.write_atomically(folder / "compare.json", as_json(compared))
    files.write_atomically(folder / "compare.svg", figures.figure_svg(figure(compared), notes=notes))
    picture = "![Accuracy over measured latency](compare.svg)"
    files.write_atomically(folder / "compare.md", f"{as_markdown(compared)}\n{picture}\n")


def as_json(compared: Comparison) -> str:
    """The comparison as JSON."""
    return store.to_json(compared)


def as_markdown(compared: Comparison) -> str:
    """A table with a line for each run, and what its marks mean below."""
    rows = compared.rows
    differs = any(row.marks for row in rows)
    heads = (
        "#",
        "run",
        "method",
        "asked",
        "accuracy",
        "latency, ms",
        "change (95% interval)",
        "MACs",
        "parameters",
        "met",
        "precision",
        "backend",
        "machine",
        "front",
        *(("differs from the first",) if differs else ()),
    )
    names = _names(rows)
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(' --- ' for _ in heads)}|"]
    for number, row in enumerate(rows, start=1):
        cells = [str(number), names[number - 1], *_cells(row), *(("; ".join(row.marks),) if differs else ())]
        lines.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return "\n".join([*lines, "", _legend(compared, differs)]) + "\n"


def figure(compared: Comparison, names: Sequence[str] | None = None) -> Figure:
    """Accuracy over measured latency: each run, the originals, and the Pareto fronts of what compares.

    Each has its 95% intervals. Runs of one name share colour, marker and legend; by default each has its own.
    """
    rows = compared.rows
    curves: list[Curve] = []
    for group in dict.fromkeys(_group(row) for row in rows):
        front = _front([row for row in rows if _group(row) == group], compared.by_ratio)
        if len(front) > 1:
            curves.append(Curve("Pareto front", *_columns(front), style="line"))
    originals = dict.fromkeys(_original(row, compared.by_ratio) for row in rows)
    curves.append(Curve("original", *_columns(list(originals)), style="dots"))
    shown = names or [
        f"{number} {row.method}{', front' if row.in_front else ''}"
        for number, row in enumerate(rows, start=1)
    ]
    for name in dict.fromkeys(shown):
        mine = [
            _point(row, compared.by_ratio) for row, other in zip(rows, shown, strict=True) if other == name
        ]
        curves.append(Curve(name, *_columns(mine), style="dots"))
    curves += dict.fromkeys(bar for row in rows for bar in _bars(row, compared.by_ratio))
    metrics = " or ".join(dict.fromkeys(row.result.quality.metric for row in rows))
    batch = ", ".join(dict.fromkeys(str(row.target.batch) for row in rows))
    x_label = "latency, % of the original's" if compared.by_ratio else f"latency, ms (batch {batch})"
    return Figure(
        "Accuracy over measured latency",
        x_label,
        f"{metrics} on the evaluation images, %",
        tuple(curves),
    )


def _row(run: Path, report: Report) -> Row:
    original, result = report.original, report.result
    latency = result.latency
    if latency.ratio_to_original is None or latency.ratio_ci95 is None:
        raise UsageError(f"{run}: its report has no latency measured beside the original's; run it again")
    return Row(
        run=str(run.parent if run.is_file() else run),
        name=report.name,
        method=report.method,
        seed=report.seed,
        asked=_asked(report.budget.asked),
        met=report.budget.met,
        original=Side(original.quality, original.latency.median_ms, original.parameters, original.macs),
        result=Side(result.quality, latency.median_ms, result.parameters, result.macs, result.agreement),
        latency_ratio=latency.ratio_to_original,
        latency_ratio_ci95=latency.ratio_ci95,
        target=report.target,
        fingerprint=latency.fingerprint,
        machine=store.digest(latency.fingerprint)[:8],
        # Runs from before the report had the weights' sha256 are known by the model's name alone.
        model=report.sha256.get("original weights", report.model),
        images=report.data.evaluation_sha256,
    )


def _asked(budget: Budget) -> str:
    """What was asked, in a few words."""
    for what, share in (
        ("latency", budget.latency_reduction),
        ("MACs", budget.macs_reduction),
        ("parameters", budget.parameters_reduction),
    ):
        if share is not None:
            return f"{what} {-share:+.0%}" if round(share, 2) == share else f"{what} {-share:+.1%}"
    if budget.latency_ms is not None:
        return f"latency {budget.latency_ms:g} ms"
    if budget.sparsity is not None:
        return f"zeros {budget.sparsity:.0%}"
    return f"{budget.drop_blocks} blocks dropped"


# ---------------------------------------------------------------- how it is shown


def _cells(row: Row) -> list[str]:
    original, result = row.original, row.result
    low, high = row.latency_ratio_ci95
    return [
        row.method,
        row.asked,
        f"{result.quality.metric} {_percent(original.quality)} -> {_percent(result.quality)}",
        f"{original.median_ms:.3f} -> {result.median_ms:.3f}",
        f"{row.latency_ratio - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})",
        _count(original.macs, result.macs),
        _count(original.parameters, result.parameters),
        "yes" if row.met else "no",
        row.target.precision,
        row.target.backend,
        row.machine,
        "yes" if row.in_front else "",
    ]


def _names(rows: Sequence[Row]) -> list[str]:
    """The runs' folders, by their last part where these differ."""
    names = [Path(row.run).name or row.run for row in rows]
    return names if len(set(names)) == len(names) else [row.run for row in rows]


def _percent(quality: Quality) -> str:
    return f"{quality.value:.2%} ({quality.ci95[0]:.1%} to {quality.ci95[1]:.1%})"


def _count(original: int, result: int) -> str:
    return f"{result:,} ({result / original - 1:+.1%})"


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def _legend(compared: Comparison, differs: bool) -> str:
    """What the machines are, and what the front is of."""
    by = "the latency's ratio to the original's" if compared.by_ratio else "the median latency"
    lines = [
        f"Front: no other run, and no original, is at least as good in accuracy and {by}, and better in one"
        f"{'; only runs that do not differ from each other are held against each other' if differs else ''}. "
        "Intervals are left aside."
    ]
    for machine, told in {row.machine: row.fingerprint for row in compared.rows}.items():
        versions = ", ".join(f"{name} {number}" for name, number in told.versions)
        clocks = f", {told.clocks}" if told.clocks else ""
        lines.append(
            f"Machine {machine}: {told.device}, {told.driver}, threads {told.threads}{clocks}, {versions}."
        )
    return "\n\n".join(lines)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in points), tuple(y for _, y in points)


# ---------------------------------------------------------------- what does not compare


def _marked(row: Row, first: Row, allowed: Allowed) -> Row:
    """The row with its differences from the first; UsageError for one that is not allowed."""
    machine = _machine_difference(row, first)
    marks: list[str] = []
    if machine:
        if not allowed.machines:
            raise UsageError(
                f"{row.run}: its latencies were not measured as those of {first.run} were ({machine}); "
                "--across-machines shows them all the same, marked"
            )
        marks.append(f"measured otherwise: {machine}")
    if row.model != first.model:
        if not allowed.models:
            raise UsageError(
                f"{row.run}: is of another model than {first.run} (sha256 of the original's weights "
                f"{row.model[:8]}, not {first.model[:8]}); --across-models shows them all the same, marked"
            )
        marks.append(f"another model: {row.model[:8]}")
    if row.images != first.images:
        if not allowed.images:
            raise UsageError(
                f"{row.run}: its accuracy is that on other evaluation images than in {first.run} (sha256 "
                f"{row.images[:8]}, not {first.images[:8]}); --across-images shows them all the same, marked"
            )
        count = row.result.quality.count
        marks.append(f"other evaluation images: {count} of sha256 {row.images[:8]}")
    return dataclasses.replace(row, marks=tuple(marks))


def _machine_difference(row: Row, first: Row) -> str:
    """In what two measurements differ so that their times do not compare; "" where they do."""
    mine, other = row.fingerprint, first.fingerprint
    found = [
        f"{name} {here}, not {there}"
        for name, here, there in (
            ("device", mine.device, other.device),
            ("driver", mine.driver, other.driver),
            ("threads", mine.threads, other.threads),
            ("clocks", mine.clocks or "unknown", other.clocks or "unknown"),
            ("batch", row.target.batch, first.target.batch),
        )
        if here != there
    ]
    if mine.versions != other.versions:
        here, there = (
            ", ".join(f"{name} {number}" for name, number in one.versions) for one in (mine, other)
        )
        found.append(f"{here}, not {there}")
    return "; ".join(found)


# ---------------------------------------------------------------- the front


def _group(row: Row) -> tuple[str, ...]:
    """What rows share whose accuracies and latencies compare."""
    return row.machine, str(row.target.batch), row.model, row.images


def _point(row: Row, by_ratio: bool) -> tuple[float, float]:
    """(latency, accuracy) in percent; the latency in ms where not ``by_ratio``."""
    return row.latency_ratio * 100 if by_ratio else row.result.median_ms, row.result.quality.value * 100


def _bars(row: Row, by_ratio: bool) -> list[Curve]:
    """The 95% intervals of a run, and of its original's accuracy.

    Where latencies are in ms that of the ratio stands for them: what slowed both is out of it.
    """
    scale = 100 if by_ratio else row.result.median_ms / row.latency_ratio
    low, high = (end * scale for end in row.latency_ratio_ci95)
    at = _original(row, by_ratio)
    return [
        *html_tradeoff.bars(at, (at[0], at[0]), _percents(row.original.quality)),
        *html_tradeoff.bars(_point(row, by_ratio), (low, high), _percents(row.result.quality)),
    ]


def _percents(quality: Quality) -> tuple[float, float]:
    return quality.ci95[0] * 100, quality.ci95[1] * 100


def _original(row: Row, by_ratio: bool) -> tuple[float, float]:
    return 100.0 if by_ratio else row.original.median_ms, row.original.quality.value * 100


def _fronted(row: Row, rows: Sequence[Row], by_ratio: bool) -> Row:
    group = [other for other in rows if _group(other) == _group(row)]
    return dataclasses.replace(row, in_front=_point(row, by_ratio) in _front(group, by_ratio))


def _front(rows: Sequence[Row], by_ratio: bool) -> list[tuple[float, float]]:
    """The points of runs and originals that none of the others beats, the fastest first."""
    points = {point for row in rows for point in (_point(row, by_ratio), _original(row, by_ratio))}
    return sorted(
        (x, y) for x, y in points if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
    )
