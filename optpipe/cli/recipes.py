"""Commands that begin with a recipe or write one: run, init, inspect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from optpipe.cli.options import DEBUG, NO_CODE, PATH, RECIPE, SET

if TYPE_CHECKING:
    from optpipe.recipe import Recipe


@click.command()
@RECIPE
@click.option("--gpu", is_flag=True, help="Build and time engines on the NVIDIA GPU.")
@click.option("--out", type=PATH, help="The run's folder [runs/NAME].")
@SET
@click.option("--fresh", is_flag=True, help="Move an earlier run in the folder aside and start anew.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the full recipe, write nothing.")
@click.option("--quiet", is_flag=True, help="Only warnings and the summary.")
@NO_CODE
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
    no_code: bool,
    debug: bool,
) -> None:
    """Run a RECIPE: ingest, analyze, prune, recover, export, benchmark.

    A run that was interrupted goes on where it was when the same command is given again.
    """
    from optpipe import recipe as recipes

    loaded = recipes.load(recipe, [*overrides, *(['target.device="cuda"'] if gpu else [])])
    _refuse_code(loaded, no_code)
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


@click.command()
@click.argument("model")
@click.option("--weights", metavar="FILE|NAME", help="The network's weights.")
@click.option("--calibration", metavar="FOLDER|NPZ", help="Images to learn from.")
@click.option("--evaluation", metavar="FOLDER|NPZ", help="Images to score with.")
@click.option("--classes", type=click.IntRange(min=1), help="Classes, if not the network's default.")
@click.option("--channels", type=click.IntRange(min=1), help="Of an image, if not the network's default.")
@click.option("--size", type=click.IntRange(min=1), nargs=2, metavar="H W", help="Of an image.")
@click.option("--out", type=PATH, default="recipe.toml", show_default=True, help="The recipe to write.")
@click.option("--force", is_flag=True, help="Replace a recipe that is there.")
@NO_CODE
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
    no_code: bool,
    debug: bool,
) -> None:
    """Write a commented recipe for a MODEL after looking at it; nothing is run.

    MODEL is torchvision:NAME, zoo:NAME or your own module:function, looked for beside the recipe.
    """
    from optpipe import beginning

    if no_code:
        from optpipe import trust

        trust.refuse_named(model, calibration, evaluation, Path())
    asked = beginning.Asked(model, weights, calibration, evaluation, classes, channels, size)
    click.echo(beginning.as_text(beginning.begin(asked, out, force=force)), nl=False)


@click.command()
@RECIPE
@SET
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@NO_CODE
@DEBUG
def inspect(recipe: Path, overrides: Sequence[str], *, as_json: bool, no_code: bool, debug: bool) -> None:
    """List every block and channel group of a RECIPE's network, droppable or why not."""
    from optpipe import recipe as recipes

    loaded = recipes.load(recipe, overrides)
    _refuse_code(loaded, no_code)
    from optpipe import inspection

    shown = inspection.inspect_recipe(loaded)
    click.echo(inspection.as_json(shown) if as_json else inspection.as_text(shown), nl=False)


def _refuse_code(loaded: Recipe, no_code: bool) -> None:
    if no_code:
        from optpipe import trust

        trust.refuse_code(loaded)
