"""The command that takes several recipes at several budgets: sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from optpipe import interruption
from optpipe.cli.options import DEBUG, NO_CODE, PATH
from optpipe.errors import RunError


@click.command()
@click.argument("recipes", type=PATH, nargs=-1, required=True, metavar="RECIPE...")
@click.option("--latency", required=True, metavar="0.1,0.2,...", help="Shares of the latency to save.")
@click.option("--gpu", is_flag=True, help="Build and time engines on the NVIDIA GPU.")
@click.option("--out", type=PATH, default="runs/sweep", show_default=True, help="The sweep's folder.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="[RECIPE:]TABLE.KEY=VALUE",
    help="Replace a value of all recipes, or of the one whose file has that name without .toml.",
)
@click.option("--fresh", is_flag=True, help="Move earlier runs aside and start anew.")
@click.option("--dry-run", is_flag=True, help="Check everything, list the runs, write nothing.")
@click.option("--quiet", is_flag=True, help="Only warnings and the summary.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@NO_CODE
@DEBUG
def sweep(
    recipes: Sequence[Path],
    *,
    latency: str,
    gpu: bool,
    out: Path,
    overrides: Sequence[str],
    fresh: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    no_code: bool,
    debug: bool,
) -> None:
    """Take each RECIPE to each latency budget, and say which run is the best for each.

    Every one is an ordinary run in OUT/NAME-BUDGET, the recipe's own budget replaced. They have the ingest
    and all that was measured from each other. A sweep that was stopped goes on where it was when the same
    command is given again. A run that fails does not end the sweep; exit code 4 if none succeeds.
    """
    from optpipe import sweep as sweeps

    budgets = sweeps.reductions(latency)
    given = [*overrides, *(['target.device="cuda"'] if gpu else [])]
    planned = sweeps.plan(recipes, budgets, out, given, fresh=fresh, no_code=no_code)
    if dry_run:
        for entry in planned.entries:
            click.echo(f"{entry.folder}: {entry.state(fresh=fresh)}")
        click.echo(f"{len(planned.entries)} runs are fine; they would run in {out}", err=True)
        return
    from optpipe.console import EventConsole

    done: list[sweeps.Outcome] = []
    with sweeps.begun(planned, fresh=fresh):
        for entry in planned.entries:
            # An interrupt between two runs has all that was done before it to go on from too.
            with interruption.in_folder(entry.folder.resolve()):
                with EventConsole(quiet) as console:
                    done.append(sweeps.take(entry, planned, fresh=fresh, emit=console.show))
                summary, compared = sweeps.told(sweeps.waiting(planned, done))
                sweeps.write(summary, compared, out)
            if done[-1].failed:
                click.echo(f"{entry.name} failed: {done[-1].failed}", err=True)
                if debug:
                    click.echo(done[-1].trace, err=True, nl=False)
    click.echo(sweeps.as_json(summary) if as_json else sweeps.as_markdown(summary), nl=False)
    if not summary.finished:
        raise RunError(f"{out}: none of the {len(planned.entries)} runs succeeded; sweep.md says why of each")
