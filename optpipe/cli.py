"""The command line: parses, calls, prints. The only file that imports click; torch is imported late.

Exit codes: 0 fine, 1 gate not met, 2 bad usage or recipe, 3 something missing on this machine, 4 the run
failed, 130 interrupted. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from optpipe import __version__
from optpipe.errors import GateError, MissingError, OptpipeError

PATH = click.Path(path_type=Path)
RECIPE = click.argument("recipe", type=PATH)
RUN = click.argument("run", type=PATH)
SET = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Replace a value of the recipe."
)
DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


class Commands(click.Group):
    """A group whose unknown commands name the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; an unknown word gets a suggestion."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near or near[0] in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{near[0]}'?", ctx) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="optpipe")
def cli() -> None:
    """Make a trained vision network faster on your device, and know what it costs in accuracy.

    Exit codes: 0 fine, 1 gate not met, 2 bad usage or recipe, 3 something missing on this machine,
    4 the run failed, 130 interrupted.
    """


@cli.command()
@RECIPE
@click.option("--gpu", is_flag=True, help="Build and time engines on the NVIDIA GPU.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder [runs/NAME].")
@SET
@click.option("--fresh", is_flag=True, help="Move an earlier run in the folder aside and start anew.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the full recipe, write nothing.")
@click.option("--quiet", is_flag=True, help="Only warnings and the summary.")
@DEBUG
def run(
    recipe: Path,
    *,
    gpu: bool,
    out: Path | None,
    overrides: Sequence[str],
    fresh: bool,
    dry_run: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Run a RECIPE: ingest, analyze, prune, recover, export, benchmark.

    A run that was interrupted goes on where it was when the same command is given again.
    """
    from optpipe import recipe as recipes

    loaded = recipes.load(recipe, [*overrides, *(['target.device="cuda"'] if gpu else [])])
    folder = out or Path("runs") / loaded.run.name
    from optpipe import pipeline, preparation
    from optpipe.console import EventConsole
    from optpipe.report import markdown

    setup = preparation.prepare(loaded)
    if dry_run:
        if setup.selected.note:
            click.echo(setup.selected.note, err=True)
        click.echo(setup.frozen, nl=False)
        click.echo(f"{recipe} is fine; it would run in {folder}", err=True)
        return
    with EventConsole(quiet) as console:
        report = pipeline.run(setup, folder, fresh=fresh, emit=console.show)
    for line in markdown.summary(report, str(folder)):
        click.echo(line)


@cli.command()
@click.argument("model")
@click.option("--weights", metavar="FILE|NAME", help="The network's weights.")
@click.option("--calibration", metavar="FOLDER|NPZ", help="Images to learn from.")
@click.option("--evaluation", metavar="FOLDER|NPZ", help="Images to score with.")
@click.option("--classes", type=click.IntRange(min=1), help="Classes, if not the network's default.")
@click.option("--channels", type=click.IntRange(min=1), help="Of an image, if not the network's default.")
@click.option("--size", type=click.IntRange(min=1), nargs=2, metavar="H W", help="Of an image.")
@click.option("--out", type=PATH, default="recipe.toml", show_default=True, help="The recipe to write.")
@click.option("--force", is_flag=True, help="Replace a recipe that is there.")
@DEBUG
def init(
    model: str,
    *,
    weights: str | None,
    calibration: str | None,
    evaluation: str | None,
    classes: int | None,
    channels: int | None,
    size: tuple[int, int] | None,
    out: Path,
    force: bool,
    debug: bool,
) -> None:
    """Write a commented recipe for a MODEL after looking at it; nothing is run.

    MODEL is torchvision:NAME, zoo:NAME or your own module:function, looked for beside the recipe.
    """
    from optpipe import beginning

    asked = beginning.Asked(model, weights, calibration, evaluation, classes, channels, size)
    click.echo(beginning.as_text(beginning.begin(asked, out, force=force)), nl=False)


@cli.command()
@RECIPE
@SET
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@DEBUG
def inspect(recipe: Path, overrides: Sequence[str], as_json: bool, debug: bool) -> None:
    """List every block and channel group of a RECIPE's network, droppable or why not."""
    from optpipe import recipe as recipes

    loaded = recipes.load(recipe, overrides)
    from optpipe import inspection

    shown = inspection.inspect_recipe(loaded)
    click.echo(inspection.as_json(shown) if as_json else inspection.as_text(shown), nl=False)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.onnx|RUN")
@click.option(
    "--vs", type=click.Path(path_type=Path), help="Another model or run, timed in turn with the first."
)
@click.option("--batch", type=click.IntRange(min=1), help="Images in a batch [the run's, or 1].")
@click.option("--threads", type=click.IntRange(min=1), help="Threads [the run's, or all cores].")
@click.option("--backend", metavar="NAME", help="The engine [the run's, or what suits the device].")
@click.option("--gpu", is_flag=True, help="Time on the NVIDIA GPU.")
@click.option("--warmUp", "warmup_ms", type=click.IntRange(min=0), default=200, show_default=True, help="ms.")
@click.option("--duration", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@DEBUG
def bench(
    model: Path,
    vs: Path | None,
    *,
    batch: int | None,
    threads: int | None,
    backend: str | None,
    gpu: bool,
    warmup_ms: int,
    duration: float,
    as_json: bool,
    debug: bool,
) -> None:
    """Time an ONNX model or a run's result; with --vs two of them in turn, with the ratio's interval."""
    from optpipe import bench as benches

    measured = benches.bench(
        model,
        vs,
        batch=batch,
        threads=threads,
        warmup_ms=warmup_ms,
        duration_s=duration,
        backend=backend,
        gpu=gpu,
    )
    click.echo(benches.as_json(measured) if as_json else benches.as_text(measured), nl=False)


@cli.command()
@RUN
@click.option("--max-accuracy-drop", type=float, metavar="P", help="Percentage points.")
@click.option("--min-agreement", type=float, metavar="P", help="Percent, with the original's classes.")
@click.option("--min-latency-reduction", type=float, metavar="P", help="Percent.")
@click.option("--baseline", type=click.Path(path_type=Path), metavar="OLD_RUN", help="Refuse regressions.")
@click.option("--max-accuracy-regression", type=float, metavar="P", help="Points, to the baseline [0].")
@click.option("--max-latency-regression", type=float, metavar="P", help="Percent, to the baseline [0].")
@click.option("--across-machines", is_flag=True, help="Compare latencies of other machines too, marked.")
@click.option("--strict", is_flag=True, help="Values must keep the limits, not only their intervals.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the checks as JUnit XML.")
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
    )
    report = build.read(run)
    old = None if baseline is None else gates.Baseline(str(baseline), build.read(baseline), across_machines)
    verdict = gates.judge(str(run), report, given.over(recorded.read(run)), old)
    if junit is not None:
        files.write_atomically(junit, gates.junit(report, verdict.checks))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(gates.markdown(report, verdict))
    click.echo(gates.as_json(verdict) if as_json else gates.as_text(verdict), nl=False)
    if not verdict.passed:
        raise GateError(f"{run}: {' and '.join(gates.failed(verdict))} not met")


@cli.command()
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


@cli.command("report")
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


@cli.command()
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


@cli.command()
@RUN
@click.option("--gpu", is_flag=True, help="Build engines for the NVIDIA GPU.")
@click.option("--backend", metavar="NAME", help="The engine [the bundle's, or what suits the device].")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder for the bundle [in its place].")
@DEBUG
def rebuild(run: Path, *, gpu: bool, backend: str | None, out: Path | None, debug: bool) -> None:
    """Build the engines of a RUN's deploy bundle anew on this machine."""
    from optpipe import rebuild as rebuilds
    from optpipe.console import EventConsole

    with EventConsole() as console:
        rebuilt = rebuilds.rebuild(run, gpu=gpu, out=out, backend=backend, emit=console.show)
    click.echo(rebuilds.as_text(rebuilt), nl=False)


@cli.command()
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
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    show_default=True,
    help="How far to look, in gradients.",
)
@click.option("--out", type=click.Path(path_type=Path), help="A folder for what comes out [RUN/landscape].")
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


@cli.command()
@click.option("--gpu", is_flag=True, help="What engines on an NVIDIA GPU take, and a self-test of them.")
@click.option("--self-test", is_flag=True, help="Build, compare and time a small engine of each kind.")
@DEBUG
def doctor(*, gpu: bool, self_test: bool, debug: bool) -> None:
    """Say what this machine can run, and what is missing for the rest."""
    from optpipe import environment

    lacking: list[str] = []

    def show(finding: environment.Finding, otherwise: str = "missing") -> None:
        mend = f"; {finding.mend}" if finding.mend else ""
        click.echo(f"{'ok     ' if finding.fine else otherwise} {finding.subject}: {finding.detail}{mend}")
        if finding.needed and not finding.fine:
            lacking.append(finding.subject)

    for finding in environment.examine_gpu() if gpu else environment.examine(Path.cwd()):
        show(finding)
    if gpu or self_test:
        from optpipe import selftest

        for finding in selftest.check("cuda" if gpu else "cpu"):
            show(finding, "failed ")
    if lacking:
        raise MissingError(f"not fine: {', '.join(lacking)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs a command and turns every failure into one line and its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Training threads that wait by spinning take the processor from the engines that are timed, and, on a
    # machine that others use too, from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli.main(args=words, prog_name="optpipe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; given again, the same command takes a run on from here", err=True)
        sys.exit(130)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except OptpipeError as error:
        _fail(f"Error: {error}", error.exit_code, words)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"Error: {where}{error.strerror or error}", 4, words)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        _fail(f"Error: unexpected {type(error).__name__}: {text} (--debug shows where)", 4, words)


def _fail(message: str, code: int, words: Sequence[str]) -> None:
    if "--debug" in words:
        traceback.print_exc()
    click.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
