"""Commands that look at finished runs: gate, compare, report, verify, landscape."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from optpipe.cli.options import DEBUG, PATH, RUN, Finite
from optpipe.errors import GateError, MissingError


@click.command()
@RUN
@click.option("--max-accuracy-drop", type=float, metavar="P", help="Percentage points.")
@click.option("--min-agreement", type=float, metavar="P", help="Percent, with the original's classes.")
@click.option("--min-latency-reduction", type=float, metavar="P", help="Percent.")
@click.option("--baseline", type=PATH, metavar="OLD_RUN", help="Refuse regressions.")
@click.option("--max-accuracy-regression", type=float, metavar="P", help="Points, to the baseline [0].")
@click.option("--max-latency-regression", type=float, metavar="P", help="Percent, to the baseline [0].")
@click.option("--across-machines", is_flag=True, help="Compare latencies of other machines too, marked.")
@click.option("--precision", metavar="NAME", help="Of the shipped engine to hold [the target's].")
@click.option("--strict", is_flag=True, help="Values must keep the limits, not only their intervals.")
@click.option("--junit", type=PATH, help="Write the checks as JUnit XML.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@DEBUG
def gate(
    run: Path,
    *,
    max_accuracy_drop: float | None,
    min_agreement: float | None,
    min_latency_reduction: float | None,
    baseline: Path | None,
    max_accuracy_regression: float | None,
    max_latency_regression: float | None,
    across_machines: bool,
    precision: str | None,
    strict: bool,
    junit: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Hold a finished RUN against limits and an older run; exit code 1 when one is missed.

    A limit is missed where it lies outside the measured 95% interval, on the bad side. Those that are not
    given are taken from the [gate] table of the run's recipe. Where GITHUB_STEP_SUMMARY names a file, a
    summary in Markdown is appended to it.
    """
    from optpipe import files
    from optpipe.report import build
    from optpipe.report import gate as gates
    from optpipe.report import limits as recorded

    given = gates.options(
        max_accuracy_drop=max_accuracy_drop,
        min_agreement=min_agreement,
        min_latency_reduction=min_latency_reduction,
        max_accuracy_regression=max_accuracy_regression,
        max_latency_regression=max_latency_regression,
        strict=strict,
        against_baseline=baseline is not None,
        precision=precision,
    )
    report = build.read(run)
    old = None if baseline is None else gates.Baseline(str(baseline), build.read(baseline), across_machines)
    verdict = gates.judge(str(run), report, given.over(recorded.read(run)), old)
    if junit is not None:
        files.write_atomically(junit, gates.junit(report, verdict))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(gates.markdown(report, verdict))
    click.echo(gates.as_json(verdict) if as_json else gates.as_text(verdict), nl=False)
    if not verdict.passed:
        raise GateError(f"{run}: {' and '.join(gates.failed(verdict))} not met")


@click.command()
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option("--out", type=PATH, help="A folder for compare.md, .json and .svg.")
@click.option("--across-machines", is_flag=True, help="Show latencies of other machines too, marked.")
@click.option("--across-models", is_flag=True, help="Show runs of other models too, marked.")
@click.option("--across-images", is_flag=True, help="Show accuracies on other images too, marked.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@DEBUG
def compare(
    runs: Sequence[Path],
    *,
    out: Path | None,
    across_machines: bool,
    across_models: bool,
    across_images: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Show finished RUNs side by side; the others are held against the first."""
    from optpipe import comparison

    allowed = comparison.Allowed(across_machines, across_models, across_images)
    compared = comparison.compare(runs, allowed)
    if out is not None:
        comparison.write(compared, out)
    click.echo(comparison.as_json(compared) if as_json else comparison.as_markdown(compared), nl=False)


@click.command("report")
@RUN
@click.option("--open", "opens", is_flag=True, help="Open it in the browser.")
@DEBUG
def rewrite_report(run: Path, *, opens: bool, debug: bool) -> None:
    """Write the report of a finished RUN anew from its report.json, and print where it is."""
    from optpipe.report import rewrite

    path = rewrite.rewrite(run)
    click.echo(path)
    if opens:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            raise MissingError(f"{path}: there is no browser to open it with; open the file yourself")


@click.command()
@RUN
@DEBUG
def verify(run: Path, debug: bool) -> None:
    """Check every sha256 in the manifest of a RUN's deploy bundle."""
    from optpipe.deploy import bundle

    problems = bundle.verify(run)
    for problem in problems:
        click.echo(f"FAILED {problem}")
    if problems:
        raise GateError(f"{run}: files that are not what the manifest says: {len(problems)}")
    click.echo("PASSED every file is as the manifest says")


@click.command()
@RUN
@click.option("--images", type=click.IntRange(min=1), default=8, show_default=True, help="Of each class.")
@click.option("--at-most", type=click.IntRange(min=2), default=128, show_default=True, help="Images in all.")
@click.option(
    "--points",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Along the gradient; an odd number.",
)
@click.option(
    "--iterations", type=click.IntRange(min=1), default=8, show_default=True, help="Of Lanczos, at a point."
)
@click.option(
    "--grid", type=click.IntRange(min=3), default=9, show_default=True, help="Each way, on the surface."
)
@click.option(
    "--reach",
    type=Finite(min=0, min_open=True),
    default=0.1,
    show_default=True,
    help="How far to look, in gradients.",
)
@click.option("--out", type=PATH, help="A folder for what comes out [RUN/landscape].")
@DEBUG
def landscape(
    run: Path,
    *,
    images: int,
    at_most: int,
    points: int,
    iterations: int,
    grid: int,
    reach: float,
    out: Path | None,
    debug: bool,
) -> None:
    """Condition numbers and loss surfaces of a RUN's networks; its calibration images need labels."""
    from optpipe import survey as surveys
    from optpipe.console import EventConsole

    settings = surveys.Settings(images, at_most, points, iterations, grid, reach)
    folder = out or run / "landscape"
    with EventConsole() as console:
        survey = surveys.survey(run, settings, folder, emit=console.show)
    click.echo(surveys.as_text(survey, folder), nl=False)
