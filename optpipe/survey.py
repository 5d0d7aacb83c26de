"""``optpipe landscape``: how smooth the loss is around a run's networks (EKG, Eq. 6, section 4.1 and A.3).

Reads a finished run and writes to a folder of its own; nothing else of the run is touched.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch

from optpipe import data, deploy, files, graph, landscape, models, store, tune
from optpipe import recipe as recipes
from optpipe.deploy.bundle import open_bundle
from optpipe.errors import RunError, UsageError
from optpipe.report import figures
from optpipe.results import Inputs
from optpipe.timing import Stopwatch
from optpipe.types import Emit, Event

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

SCHEMA = "optpipe.landscape/1"
JSON = "landscape.json"

Name = Literal["original", "pruned", "result"]

_TITLES: dict[Name, str] = {
    "original": "the original",
    "pruned": "pruned, before recovery",
    "result": "the result",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a survey costs: about ``points + 2`` times ``iterations`` Hessian products a network.

    ``images`` of each class, ``at_most`` altogether, make the one batch that the loss is taken on. ``points``
    (odd, so that the weights themselves are among them) lie on the line along the gradient, ``grid`` x
    ``grid`` on the surface; both go from -reach to reach times the gradient.
    """

    images: int = 8
    at_most: int = 128
    points: int = 5
    iterations: int = 8
    grid: int = 9
    reach: float = 0.1


@dataclass(frozen=True, slots=True)
class Point:
    """The weights ``step`` times the gradient away; negative steps lead downhill."""

    step: float
    loss: float
    condition_number: float
    extremes: landscape.Extremes


@dataclass(frozen=True, slots=True)
class Heights:
    """The loss: ``values[j][i]`` at x[i] times the gradient plus y[j] times a random orthogonal direction.

    None where it was no finite number; ``fluctuation``, the distance from the nearest quadratic, then too.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    values: tuple[tuple[float | None, ...], ...]
    fluctuation: float | None


@dataclass(frozen=True, slots=True)
class Surveyed:
    """One network's landscape; ``figure`` is the surface's file, beside landscape.json.

    ``condition_number`` is |smallest / largest| eigenvalue of the Hessian at the weights (EKG, Eq. 6),
    ``condition_mean`` its mean along the gradient (A.3). ``worst_residual``: an eigenvalue lies within
    that share of the largest absolute one, at the worst point; ones further out can still be missed.
    """

    name: Name
    parameters: int
    loss: float
    condition_number: float
    condition_mean: float
    worst_residual: float
    gradient_norm: float
    along: tuple[Point, ...]
    surface: Heights
    figure: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Survey:
    """landscape.json: the original, the pruned network before recovery, and the result, in this order.

    ``images_sha256`` is over the images that were drawn, in their order.
    """

    schema: str
    run: str
    seed: int
    device: str
    batch_norm: landscape.BatchNorm
    settings: Settings
    images: int
    classes: int
    images_sha256: str
    networks: tuple[Surveyed, ...]
    seconds: float


def survey(run: Path, settings: Settings, folder: Path, *, emit: Emit) -> Survey:
    """Condition numbers and loss surfaces of a finished run's networks; written to ``folder``.

    The loss is the cross-entropy on labelled calibration images of the run, drawn by its seed, each network's
    at its own resolution, with batch-norm by the statistics of these images. Each network gets an SVG;
    colours mean the same in all.

    Raises:
        UsageError: no finished run, no labels, or the run's model or images are gone or have changed.
        RunError: a network's landscape cannot be had, or a file cannot be written.
    """
    watch = Stopwatch()
    if settings.points % 2 == 0:
        raise UsageError(f"points = {settings.points}: give an odd number, so that one is at the weights")
    opened = _open(run)
    images = draw(opened.images, settings, opened.recipe.run.seed)
    assert images.labels is not None, "the run was refused without labels"
    try:
        folder.mkdir(parents=True, exist_ok=True)  # known before the work, not after it
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made: {error.strerror}; name another with --out") from None
    device = tune.usable(opened.recipe.target.device)
    surveyed: list[Surveyed] = []
    surfaces: list[landscape.Surface] = []
    for name, network in opened.networks.items():
        emit(Event("progress", "landscape", name, len(surveyed), len(opened.networks)))
        # The original takes them as its run did, the others at the resolution of the run's plan.
        own = images if name == "original" else data.resized(images, opened.result_hw)
        batch = own.batch(slice(None))
        one, surface = examine(
            name, network.to(device), batch, images.labels, settings, opened.recipe.run.seed
        )
        surveyed.append(one)
        surfaces.append(surface)
    emit(Event("progress", "landscape", "done", len(surveyed), len(opened.networks)))
    _draw_figures(folder, opened.recipe.run.name, surveyed, surfaces)
    whole = Survey(
        schema=SCHEMA,
        run=opened.recipe.run.name,
        seed=opened.recipe.run.seed,
        device=device,
        batch_norm="batch",
        settings=settings,
        images=len(images),
        classes=len(set(images.labels.tolist())),
        images_sha256=images.digest,
        networks=tuple(surveyed),
        seconds=watch.seconds,
    )
    files.write_atomically(folder / JSON, store.to_json(whole))
    return whole


def draw(images: data.ImageSet, settings: Settings, seed: int) -> data.ImageSet:
    """``settings.images`` of each class or all that there are, ``settings.at_most`` altogether.

    One of every class comes first, then another of every class, so that a cut leaves the classes even.
    """
    assert images.labels is not None
    labels = images.labels.tolist()
    taken: Counter[int] = Counter()
    ranked: list[tuple[int, int]] = []
    for index in np.random.default_rng(seed).permutation(len(labels)).tolist():
        if taken[labels[index]] < settings.images:
            ranked.append((taken[labels[index]], index))
            taken[labels[index]] += 1
    ranked.sort(key=lambda one: one[0])
    return data.part(images, [index for _, index in ranked[: settings.at_most]])


def examine(
    name: Name, network: nn.Module, images: Tensor, labels: Tensor, settings: Settings, seed: int
) -> tuple[Surveyed, landscape.Surface]:
    """One network's landscape on ``images`` (N, C, H, W), and its surface as it is drawn.

    Raises RunError where the loss has no gradient or no curvature, or is no number.
    """
    watch = Stopwatch()
    generator = torch.Generator().manual_seed(seed)
    try:
        with _full_precision():
            line = landscape.gradient_direction_condition(
                network,
                images,
                labels,
                generator=generator,
                reach=settings.reach,
                points=settings.points,
                iterations=settings.iterations,
            )
            numbers, mean = line.condition_numbers, line.mean
            surface = landscape.surface(
                network, images, labels, generator=generator, reach=settings.reach, points=settings.grid
            )
    except RunError as error:
        raise RunError(f"{_TITLES[name]}: {error}") from error
    along = tuple(
        Point(step, loss, number, extremes)
        for step, loss, number, extremes in zip(line.steps, line.losses, numbers, line.extremes, strict=True)
    )
    here = along[len(along) // 2]
    surveyed = Surveyed(
        name=name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        loss=here.loss,
        condition_number=here.condition_number,
        condition_mean=mean,
        worst_residual=max(_residual(extremes) for extremes in line.extremes),
        gradient_norm=line.gradient_norm,
        along=along,
        surface=_heights(surface),
        figure=f"{name}.svg",
        seconds=watch.seconds,
    )
    return surveyed, surface


def as_text(survey: Survey, folder: Path) -> str:
    """The survey as aligned columns, and where the rest is."""
    head = ("network", "loss", "condition number", "along gradient", "eigenvalues", "fluctuation", "seconds")
    rows = [head, *(_row(one) for one in survey.networks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    worst = max(one.worst_residual for one in survey.networks)
    figure_names = ", ".join(one.figure for one in survey.networks)
    return "\n".join(
        [
            f"{survey.run}: loss on {survey.images} calibration images of {survey.classes} classes, "
            "batch-norm by their own statistics",
            "",
            *table,
            "",
            f"residuals: at most {worst:.1%} of the largest eigenvalue; more --iterations lower them and may "
            "find eigenvalues further out",
            f"{folder}: {JSON}, {figure_names}\n",
        ]
    )


# ---------------------------------------------------------------- the run


@dataclass(frozen=True, slots=True)
class _Opened:
    """A finished run's recipe, its calibration images with labels, and its three networks.

    ``images`` have the original's size; the pruned network and the result take ``result_hw`` (H, W).
    """

    recipe: recipes.Recipe
    images: data.ImageSet
    result_hw: tuple[int, int]
    networks: dict[Name, nn.Module]


def _open(run: Path) -> _Opened:
    """What a finished run was made from and came to; UsageError where anything has gone or changed."""
    if not (run / store.RECIPE).is_file():
        raise UsageError(f"{run}: is no run's folder (no {store.RECIPE})")
    bundle, _ = open_bundle(run)
    saved = _read(deploy.Saved, bundle / "plan.json")
    inputs = _read(Inputs, run / "inputs.json")
    recipe = recipes.load(run / store.RECIPE)
    # Paths in a frozen recipe start where the recipe once lay.
    home, shape = Path(saved.search_folder), saved.input_shape
    images = _labelled(run, recipe, home, shape[0])
    if images.digest != inputs.calibration:
        raise UsageError(f"{run}: the calibration images have changed since the run; run the recipe anew")
    try:
        original = graph.trace(models.load_model(recipe.model, home), shape)
    except UsageError as error:
        raise UsageError(f"{run}: its original network is needed again: {error}") from None
    if models.weights_digest(original) != inputs.model:
        raise UsageError(f"{run}: the original's weights have changed since the run; run the recipe anew")
    pruned = graph.apply(original, saved.plan, shape)
    store.load_tensors(pruned, store.Run(run, None).stage_folder("prune") / store.WEIGHTS)
    result_hw = graph.image_shape(saved.plan, shape)[1:]
    networks: dict[Name, nn.Module] = {"original": original, "pruned": pruned, "result": deploy.load(run)}
    return _Opened(recipe, images, result_hw, networks)


def _labelled(run: Path, recipe: recipes.Recipe, home: Path, channels: int) -> data.ImageSet:
    """The run's calibration images; UsageError where they are gone or have no labels."""
    spec = data.made(recipe.data.calibration, run)
    try:
        images = data.load_images(spec, recipe.data.preprocess, channels, home)
    except UsageError as error:
        raise UsageError(f"{run}: its calibration images are needed again: {error}") from None
    if images.labels is None:
        why, mend = (
            ("has no labels", "with labelled images")
            if spec.labels
            else ("was read without labels", "with [data.calibration] labels = true")
        )
        raise UsageError(
            f"{run}: a loss landscape needs labelled calibration images, and {spec.source} {why}; run the "
            f"recipe anew {mend}"
        )
    return images


def _read(cls: type[T], path: Path) -> T:
    try:
        return store.from_json(cls, path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: is missing; has the run finished?") from None
    except ValueError:
        raise UsageError(
            f"{path}: is damaged or of another version of optpipe; run the recipe anew"
        ) from None


# ---------------------------------------------------------------- figures and figures' numbers


def _draw_figures(
    folder: Path, run: str, surveyed: Sequence[Surveyed], surfaces: Sequence[landscape.Surface]
) -> None:
    limits = _limits(surfaces)
    for one, surface in zip(surveyed, surfaces, strict=True):
        svg = figures.surface_svg(surface, f"{run}: {_TITLES[one.name]}", limits=limits)
        files.write_atomically(folder / one.figure, svg)


def _limits(surfaces: Sequence[landscape.Surface]) -> tuple[float, float] | None:
    """The least and the greatest finite loss of all; None where they do not differ enough to be drawn."""
    every = [value for surface in surfaces for row in surface.values for value in row if math.isfinite(value)]
    low, high = min(every, default=0.0), max(every, default=0.0)
    return (low, high) if high - low > 1e-6 * max(1.0, abs(low)) else None


def _heights(surface: landscape.Surface) -> Heights:
    """The surface as JSON can hold it."""
    values = tuple(tuple(_finite(value) for value in row) for row in surface.values)
    return Heights(surface.x, surface.y, values, _finite(surface.fluctuation))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _residual(extremes: landscape.Extremes) -> float:
    """The larger residual as a share of the largest absolute eigenvalue."""
    scale = max(abs(extremes.smallest), abs(extremes.largest))
    return max(extremes.smallest_residual, extremes.largest_residual) / scale


def _row(one: Surveyed) -> tuple[str, ...]:
    here = one.along[len(one.along) // 2].extremes
    fluctuation = one.surface.fluctuation
    return (
        one.name,
        f"{one.loss:.4g}",
        f"{one.condition_number:.3f}",
        f"{one.condition_mean:.3f}",
        f"{here.smallest:.3g} to {here.largest:.3g}",
        "not finite" if fluctuation is None else f"{fluctuation:.3g}",
        f"{one.seconds:.1f}",
    )


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Convolutions on a GPU in fp32: TF32's ten bits are what Lanczos takes for converged."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before
