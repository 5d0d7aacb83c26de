"""Code that a recipe names, refused where none may run; nothing is imported to find out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from optpipe import data, models
from optpipe.errors import UsageError
from optpipe.recipe import Recipe


def refuse_code(recipe: Recipe) -> None:
    """UsageError where a recipe's network or images come from a function of the user's."""
    images = recipe.data
    specs = (("calibration", images.calibration), ("evaluation", images.evaluation))
    given = (*specs, ("validation", images.validation))
    sources = [(f"[data.{name}] source", spec.source) for name, spec in given if spec is not None]
    _refuse(f"{recipe.path}: ", "[model] name", recipe.model.name, sources, recipe.folder)


def refuse_named(model: str, calibration: str | None, evaluation: str | None, folder: Path) -> None:
    """UsageError where what the command line names is a function of the user's."""
    given = (("--calibration", calibration), ("--evaluation", evaluation))
    _refuse("", "MODEL", model, [(name, one) for name, one in given if one is not None], folder)


def _refuse(where: str, key: str, model: str, sources: Iterable[tuple[str, str]], folder: Path) -> None:
    named = [(key, model)] if models.names_code(model) else []
    named += [(name, source) for name, source in sources if data.names_function(source, folder)]
    for name, value in named:
        raise UsageError(
            f'{where}{name} = "{value}": is code, which --no-code lets none run of; leave that option out if '
            "you know what it does"
        )
