"""A recipe with its modules, model and images loaded, and checked to fit together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe import data, graph, models, plugins, tune
from optpipe import recipe as recipes
from optpipe.errors import MissingError, UsageError
from optpipe.types import Backend, Method, ModelGraph, Target, Tune

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True, slots=True)
class Setup:
    """A recipe with its modules, model and images loaded and checked. Not JSON-able."""

    recipe: recipes.Recipe
    method: Method
    config: object
    recover: Tune
    backend: Backend
    target: Target
    original: fx.GraphModule
    graph: ModelGraph
    model_digest: str
    calibration: data.ImageSet
    evaluation: data.ImageSet

    @property
    def frozen(self) -> str:
        """The recipe as TOML with every default written out."""
        return self.recipe.frozen(self.config, self.recover)


def prepare(recipe: recipes.Recipe) -> Setup:
    """Load what a recipe names and check that it fits together, before anything is written.

    Raises:
        UsageError: something in the recipe, the model or the images does not fit.
        MissingError: this machine cannot run the target.
    """
    try:
        method = plugins.method(recipe.method_name)
        backend = plugins.backend(recipe.target.backend)
    except UsageError as error:
        raise UsageError(f"{recipe.path}: {error}") from None
    config: object = recipes.bind(method.Config, recipe.method, recipe.path, "method")
    recover = recipes.merge(method.RECOVER, recipe.recover, recipe.path, "recover")
    recipes.check_recovery(recover, recipe.path)
    recover = tune.on_this_machine(recover)
    model = models.load_model(recipe.model, recipe.folder)
    channels = models.input_channels(model)
    prepared = recipe.data.preprocess
    calibration = data.load_images(recipe.data.calibration, prepared, channels, recipe.folder)
    shape = calibration.shape
    target = Target(
        backend=recipe.target.backend,
        batch=recipe.target.batch,
        input_shape=shape,
        precision=recipe.target.precision,
        device=recipe.target.device,
        threads=recipe.target.threads,
        options=tuple(sorted(recipe.target.options.items())),
    )
    missing = backend.missing(target)
    if missing:
        raise MissingError(missing)
    original = graph.trace(model, shape)
    shown = graph.inspect(original, shape)
    evaluation = data.load_images(
        recipe.data.evaluation, prepared, channels, recipe.folder, classes=shown.classes
    )
    data.check_classes(calibration, shown.classes, recipe.data.calibration.source)
    if evaluation.shape != shape:
        raise UsageError(
            f"{recipe.path}: [data] evaluation: images are {evaluation.shape}, calibration images {shape}; "
            "give [data.preprocess] size"
        )
    shared = data.overlap(calibration, evaluation)
    if shared:
        raise UsageError(
            f"{recipe.path}: [data]: {shared} evaluation images are also calibration images; the accuracy "
            "would flatter the result: give disjoint sets"
        )
    if method.NEEDS_LABELS and calibration.labels is None:
        raise UsageError(
            f"{recipe.path}: [method] name = {recipe.method_name!r}: needs labelled calibration images, and "
            f"{recipe.data.calibration.source} has no labels"
        )
    return Setup(
        recipe=recipe,
        method=method,
        config=config,
        recover=recover,
        backend=backend,
        target=target,
        original=original,
        graph=shown,
        model_digest=models.weights_digest(original),
        calibration=calibration,
        evaluation=evaluation,
    )
