"""A sweep as its user sees it: Markdown, JSON and one figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from optpipe import comparison, files, store
from optpipe.comparison import Allowed, Comparison, Row
from optpipe.report import build, figures
from optpipe.sweep.running import Outcome
from optpipe.sweep.summary import Best, Line, Summary, summarise
from optpipe.types import Figure

TITLE = "Accuracy over measured latency, all runs"


def told(outcomes: Sequence[Outcome]) -> tuple[Summary, Comparison | None]:
    """What has become of the runs so far, from their reports, and the finished ones side by side.

    Raises:
        UsageError: a finished run's report cannot be read.
    """
    lines = [_line(outcome) for outcome in outcomes]
    finished = [Path(line.folder) for line in lines if line.state == "finished"]
    # Runs that were finished elsewhere are shown; they are held against those of their machine alone.
    compared = comparison.side_by_side(finished, Allowed(machines=True)) if finished else None
    return summarise(lines, compared), compared


def write(summary: Summary, compared: Comparison | None, folder: Path) -> None:
    """Write sweep.md, sweep.json and, once a run is finished, sweep.svg, which the first shows.

    Raises:
        RunError: the folder cannot be written.
    """
    files.write_atomically(folder / "sweep.json", as_json(summary))
    text = f"# Sweep\n\n{as_markdown(summary)}"
    if compared is not None:
        files.write_atomically(folder / "sweep.svg", figures.figure_svg(figure(summary, compared)))
        text += f"\n![{TITLE}](sweep.svg)\n"
    files.write_atomically(folder / "sweep.md", text)


def as_json(summary: Summary) -> str:
    """The summary as JSON."""
    return store.to_json(summary)


def figure(summary: Summary, compared: Comparison) -> Figure:
    """All runs with their intervals and the joint front; those of one recipe look alike."""
    recipe = {line.folder: line.recipe for line in summary.lines}
    names = [recipe[row.run] for row in compared.rows]
    return dataclasses.replace(comparison.figure(compared, names), title=TITLE)


def as_markdown(summary: Summary) -> str:
    """A table of all runs, the best for each budget, and what to keep in mind of both."""
    metric = next((line.row.result.quality.metric for line in summary.lines if line.row is not None), "top1")
    heads = (
        *("run", "method", "asked", "latency (95% interval)", f"{metric} (95% interval)"),
        *("met", "front", "took, s"),
    )
    table = [_cells(line) for line in summary.lines]
    parts = [_table(heads, table), *_failures(summary), *_original(summary)]
    if summary.finished:
        ends = ("budget", "best run", f"{metric} (95% interval)", "latency", "not surely worse")
        of = {line.name: line for line in summary.lines}
        parts += [_table(ends, [_best_cells(one, of) for one in summary.best]), _caution(summary)]
    return "\n\n".join(parts) + "\n"


def _line(outcome: Outcome) -> Line:
    entry = outcome.entry
    seconds = 0.0
    if outcome.state == "finished":
        report = build.read(entry.folder)
        seconds = sum(stage.seconds for stage in report.stages.values())
    return Line(
        entry.name,
        entry.recipe,
        entry.method,
        entry.reduction,
        str(entry.folder),
        outcome.state,
        outcome.failed,
        seconds,
    )


def _cells(line: Line) -> tuple[str, ...]:
    asked = _share(-line.asked)
    row = line.row
    if row is None:
        return line.name, line.method, asked, line.state, "", "", "", ""
    front = "yes" if row.in_front else ""
    if line.elsewhere:
        front = "measured elsewhere"
    met = "yes" if row.met else "no"
    return line.name, line.method, asked, _latency(row), _accuracy(row), met, front, f"{line.seconds:.0f}"


def _best_cells(one: Best, of: dict[str, Line]) -> tuple[str, ...]:
    asked = _share(-one.asked)
    if one.run is None:
        return asked, "none of the runs meets it", "", "", ""
    row = of[one.run].row
    assert row is not None, "the best run is a finished one"
    level = ", ".join(one.level) if one.level else "none of the others" if one.of > 1 else "no other met it"
    return asked, one.run, _accuracy(row), f"{row.latency_ratio - 1:+.1%}", level


def _latency(row: Row) -> str:
    low, high = row.latency_ratio_ci95
    return f"{row.latency_ratio - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})"


def _accuracy(row: Row) -> str:
    quality = row.result.quality
    return f"{quality.value:.2%} ({quality.ci95[0]:.1%} to {quality.ci95[1]:.1%})"


def _share(value: float) -> str:
    return f"{value:+.0%}" if round(value, 2) == value else f"{value:+.1%}"


def _failures(summary: Summary) -> list[str]:
    lines = [
        f"- {line.name} failed: {' '.join(line.reason.split())}"
        for line in summary.lines
        if line.state == "failed"
    ]
    return ["\n".join(lines)] if lines else []


def _original(summary: Summary) -> list[str]:
    row = next((line.row for line in summary.lines if line.row is not None and not line.elsewhere), None)
    if row is None:
        return []
    quality = row.original.quality
    told = (
        f"Original: {quality.metric} {quality.value:.2%} ({quality.ci95[0]:.1%} to {quality.ci95[1]:.1%}) on "
        f"{quality.count} evaluation images. Front: no other run, and not the original, is at least as good "
        "in accuracy and latency, and better in one; intervals are left aside. Each latency was timed in "
        "turn with the original."
    )
    away = sum(line.elsewhere for line in summary.lines)
    if away:
        told += (
            f" {away} of the runs {'was' if away == 1 else 'were'} measured on another machine or with other "
            "versions, and can be best for no budget; --fresh measures all anew."
        )
    return [told]


def _caution(summary: Summary) -> str:
    """How the best were chosen, and what that does to their figures."""
    chosen = (
        "Best: the most accurate of all runs whose measured latency meets the budget, whatever they were "
        'asked for, of equals the fastest; "not surely worse" are those whose difference to it has a 95% '
        "interval that holds 0."
    )
    if summary.finished < 2:
        return chosen
    return (
        f"{chosen} It is the best of {summary.finished} runs by the evaluation images themselves, so its "
        "accuracy is somewhat flattered: confirm it on images that no run has seen."
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(' --- ' for _ in heads)}|"]
    lines += [
        f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in row)} |" for row in rows
    ]
    return "\n".join(lines)
