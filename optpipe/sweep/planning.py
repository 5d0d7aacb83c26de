"""Which runs a sweep is made of, all checked to be possible and to compare before the first begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optpipe import pipeline, preparation, selection, store, trust
from optpipe import recipe as recipes
from optpipe.errors import UsageError
from optpipe.types import Budget, Target


@dataclass(frozen=True, slots=True)
class Entry:
    """One recipe at one budget, ``reduction`` being the share of the latency to save. Not JSON-able.

    ``name`` is the run's, and its folder's; ``recipe`` is the name of the recipe.
    """

    name: str
    recipe: str
    method: str
    reduction: float
    folder: Path
    setup: preparation.Setup

    def state(self, *, fresh: bool) -> str:
        """What the sweep would find in the run's folder."""
        if fresh or not (self.folder / store.RECIPE).exists():
            return "new"
        return "finished" if (self.folder / "report.json").exists() else "goes on"


@dataclass(frozen=True, slots=True)
class Sweep:
    """The runs in the order in which they are taken: recipe by recipe, budget by budget. Not JSON-able."""

    out: Path
    entries: tuple[Entry, ...]

    @property
    def cache(self) -> Path:
        """What the runs have from each other."""
        return self.out.resolve() / store.CACHE


@dataclass(frozen=True, slots=True)
class _Override:
    """A value of ``--set``: ``override`` is table.key=value, for the recipe file of that stem, or for all."""

    override: str
    recipe: str | None

    @staticmethod
    def read(text: str, paths: Sequence[Path]) -> _Override:
        """From table.key=value, or recipe:table.key=value.

        Raises:
            UsageError: it names none of the recipes, or a budget.
        """
        key, equals, value = text.partition("=")
        name, colon, rest = key.partition(":")
        stems = [path.stem for path in paths]
        if colon and name not in stems:
            raise UsageError(f"--set {text}: {name} is none of the recipes; there are {', '.join(stems)}")
        key = rest if colon else key
        if key.split(".")[0].strip() == "budget":
            raise UsageError(f"--set {text}: a sweep's budgets are those of --latency")
        return _Override(f"{key}{equals}{value}", name if colon else None)


def reductions(text: str) -> tuple[float, ...]:
    """The budgets that ``--latency`` names, separated by commas, in that order.

    Raises:
        UsageError: one is no number between 0 and 1, or is there twice.
    """
    found: list[float] = []
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            raise UsageError(
                f"--latency {text}: '{word.strip()}' is no number; give the shares of the original's latency "
                "that are to be saved, for example 0.1,0.2,0.3"
            ) from None
        if not 0 < value < 1:  # written so that nan fails too
            raise UsageError(
                f"--latency {text}: {word.strip()} must be between 0 and 1; 0.1 saves a tenth of the latency"
            )
        if value in found:
            raise UsageError(f"--latency {text}: {value:g} is there twice")
        found.append(value)
    return tuple(found)


def plan(
    paths: Sequence[Path],
    budgets: Sequence[float],
    out: Path,
    overrides: Sequence[str],
    *,
    fresh: bool,
    no_code: bool = False,
) -> Sweep:
    """Load every recipe and check that each can run at each budget, and that their results will compare.

    ``fresh``: runs that are in the folders already do not count. ``no_code``: nor does a recipe whose network
    or images are a function, which would be imported.

    Raises:
        UsageError: a recipe cannot be run so, two of them do not compare or have one name, or a folder holds
            something else.
        MissingError: this machine cannot run the target.
    """
    if out.is_file():
        raise UsageError(f"{out}: is a file; name a folder with --out")
    if (out / store.RECIPE).exists():
        raise UsageError(f"{out}: is a run; name another folder for the sweep with --out")
    meant = [_Override.read(override, paths) for override in overrides]
    loaded = [
        recipes.load(path, [one.override for one in meant if one.recipe in {None, path.stem}])
        for path in paths
    ]
    for recipe in loaded if no_code else ():
        trust.refuse_code(recipe)
    _refuse_twins(loaded)
    entries: list[Entry] = []
    for recipe in loaded:
        known = [entry.setup for entry in entries]
        setup = _with_known_images(preparation.prepare(_at(recipe, budgets[0])), known)
        if known:
            _refuse_other(setup, known[0])
        if setup.recipe.target.backend == selection.FASTEST:
            raise UsageError(
                f'{recipe.path}: [target] backend = "fastest": may come to another engine in each run; name '
                "one, for example --set target.backend=onnxruntime"
            )
        entries += _entries(recipe, setup, budgets, out)
    for entry in entries:
        if fresh:
            store.refuse_other(entry.folder, None)
        else:
            pipeline.check(entry.setup, entry.folder)
    return Sweep(out, tuple(entries))


def _entries(
    recipe: recipes.Recipe, setup: preparation.Setup, budgets: Sequence[float], out: Path
) -> Iterator[Entry]:
    for reduction in budgets:
        name = _named(recipe, reduction)
        budgeted = setup.with_budget(Budget(latency_reduction=reduction), name)
        yield Entry(name, recipe.run.name, recipe.method_name, reduction, out / name, budgeted)


def _at(recipe: recipes.Recipe, reduction: float) -> recipes.Recipe:
    """The recipe with its own budget replaced."""
    run = dataclasses.replace(recipe.run, name=_named(recipe, reduction))
    return dataclasses.replace(recipe, budget=Budget(latency_reduction=reduction), run=run)


def _named(recipe: recipes.Recipe, reduction: float) -> str:
    return f"{recipe.run.name}-{reduction!r}"


def _refuse_twins(loaded: Sequence[recipes.Recipe]) -> None:
    by_name: dict[str, Path] = {}
    for recipe in loaded:
        name = recipe.run.name
        if name in by_name:
            raise UsageError(
                f'{recipe.path}: [run] name = "{name}": is that of {by_name[name]} too; give each recipe of '
                "a sweep a name of its own"
            )
        by_name[name] = recipe.path


def _with_known_images(setup: preparation.Setup, known: Sequence[preparation.Setup]) -> preparation.Setup:
    """The setup with those of its images that another has in memory already taken from there."""
    for other in known:
        mine, its = setup.recipe, other.recipe
        if mine.folder != its.folder or mine.data.preprocess != its.data.preprocess:
            continue
        made = mine.data.synthesize or its.data.synthesize
        if not made and mine.data.calibration == its.data.calibration:
            setup = setup.with_calibration(other.calibration)
        if mine.data.evaluation == its.data.evaluation:
            setup = dataclasses.replace(setup, evaluation=other.evaluation)
    return setup


# ---------------------------------------------------------------- what does not compare


def _refuse_other(setup: preparation.Setup, first: preparation.Setup) -> None:
    """UsageError where results would not compare with those of the first recipe."""
    path, other = setup.recipe.path, first.recipe.path
    if setup.model_digest != first.model_digest or setup.graph != first.graph:
        mine, its = setup.recipe.model, first.recipe.model
        raise UsageError(
            f'{path}: [model] name = "{mine.name}": is not the network of {other} ("{its.name}", sha256 of '
            f"the weights {first.model_digest[:8]}, here {setup.model_digest[:8]}); a sweep is of one "
            "network: give both the same [model]"
        )
    if setup.evaluation.digest != first.evaluation.digest:
        raise UsageError(
            f"{path}: [data] evaluation: {setup.recipe.data.evaluation.source} gives other images than in "
            f"{other} (sha256 {setup.evaluation.digest[:8]}, there {first.evaluation.digest[:8]}), on which "
            "accuracies do not compare; give both the same [data] evaluation and preprocess"
        )
    differs = _difference(setup.target, first.target)
    if differs:
        key, mine_is, its_is = differs
        raise UsageError(
            f"{path}: [target] {key} = {mine_is}: is {its_is} in {other}, and latencies on different targets "
            f"do not compare; --set target.{key}=... sets it for all"
        )


def _difference(mine: Target, other: Target) -> tuple[str, str, str] | None:
    """The first field in which two targets differ, with its two values."""
    for field in dataclasses.fields(Target):
        here, there = getattr(mine, field.name), getattr(other, field.name)
        if here != there:
            shown = ["all cores" if value is None else str(value) for value in (here, there)]
            return field.name, shown[0], shown[1]
    return None
