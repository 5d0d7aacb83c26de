"""A recipe from Python."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from optpipe import pipeline, preparation
from optpipe import recipe as recipes
from optpipe.api.result import Result
from optpipe.types import Emit, Event


def run(
    recipe: str | Path | Mapping[str, object],
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    gpu: bool = False,
    on_event: Emit | None = None,
) -> Result:
    """Run a recipe through the six stages, as ``optpipe run`` does.

    ``recipe`` is the path of a TOML file, or its tables as a mapping: then relative paths start at the
    current folder, and the run has its method's name unless ``[run] name`` says otherwise. ``out`` is the
    run's folder, ``runs/NAME`` by default; ``overrides`` are words of ``--set``
    ("budget.latency_reduction=0.3"). ``fresh`` moves an earlier run in the folder aside; without it a run
    that was interrupted goes on where it was, and a finished one is read back. ``gpu`` builds and times
    engines on the NVIDIA GPU.

    ``on_event`` is called with each :class:`~optpipe.types.Event` as it happens, for a bar or a log:
    ``optpipe.console.EventConsole`` has the command line's. Nothing is printed otherwise.

    The command line sets ``OMP_WAIT_POLICY=PASSIVE`` before torch starts its threads, so that those waiting
    do not take the processor from the engines that are timed; a program does that itself, before it imports
    torch.

    Raises:
        UsageError: something in the recipe, the model, the images or the folder does not fit.
        MissingError: this machine cannot run the target.
        RunError: a stage failed, or no network meets the budget; what was done before stays done.
    """
    loaded = load(recipe, [*overrides, *(['target.device="cuda"'] if gpu else [])])
    return take(preparation.prepare(loaded), out, fresh=fresh, on_event=on_event)


def load(recipe: str | Path | Mapping[str, object], overrides: Sequence[str]) -> recipes.Recipe:
    """A checked recipe of a file or a mapping, which is left as it is."""
    if isinstance(recipe, Mapping):
        return recipes.from_tables(copy.deepcopy(dict(recipe)), Path.cwd() / "<mapping>", overrides)
    return recipes.load(Path(recipe), overrides)


def take(setup: preparation.Setup, out: str | Path | None, *, fresh: bool, on_event: Emit | None) -> Result:
    """A prepared recipe's run, in ``out`` or ``runs/NAME``."""
    folder = folder_of(setup.recipe, out)
    report = pipeline.run(setup, folder, fresh=fresh, emit=on_event or _ignore)
    return Result(folder, report)


def folder_of(recipe: recipes.Recipe, out: str | Path | None) -> Path:
    """Where a recipe's run is."""
    return Path("runs") / recipe.run.name if out is None else Path(out)


def _ignore(event: Event) -> None:
    """Nobody asked for events."""
