"""A recipe with its modules, model and images loaded, and checked to fit together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe import data, graph, models, plugins, selection, synthesis, tune
from optpipe import recipe as recipes
from optpipe.building import Workbench
from optpipe.errors import UsageError
from optpipe.types import Backend, Budget, Method, ModelGraph, Plan, Precision, Target, Tune

if TYPE_CHECKING:
    from torch import fx, nn


@dataclass(frozen=True, slots=True)
class Setup:
    """A recipe with its modules, model and images loaded and checked. Not JSON-able.

    ``benches`` are several only where the fastest backend is still to be found; ``device`` is where torch
    trains; ``validation`` is None where the recipe has no such images. Calibration images that are to be
    synthesised have their labels and no pixels yet: the run makes them (:meth:`with_calibration`).
    """

    recipe: recipes.Recipe
    method: Method
    config: object
    recover: Tune
    benches: tuple[Workbench, ...]
    selected: selection.Selected
    device: str
    original: fx.GraphModule
    graph: ModelGraph
    model_digest: str
    calibration: data.ImageSet
    evaluation: data.ImageSet
    validation: data.ImageSet | None = None

    @property
    def bench(self) -> Workbench:
        """The backend and its target; before the fastest of several is known, the first."""
        return self.benches[0]

    @property
    def backend(self) -> Backend:
        """The backend that engines are built with."""
        return self.bench.backend

    @property
    def target(self) -> Target:
        """What engines are built for."""
        return self.bench.target

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """In which precisions the result is shipped, the target's own first."""
        offered = self.backend.precisions(self.target.device)
        wanted = self.recipe.export.precisions
        others = offered if wanted is None else wanted
        return tuple(dict.fromkeys((self.target.precision, *others)))

    @property
    def frozen(self) -> str:
        """The recipe as TOML with every default written out."""
        return self.recipe.frozen(self.config, self.recover)

    def with_budget(self, budget: Budget, name: str) -> Setup:
        """The same under another budget, as the run of this name.

        Raises:
            UsageError: the method cannot work under that budget.
        """
        run = dataclasses.replace(self.recipe.run, name=name)
        recipe = dataclasses.replace(self.recipe, budget=budget, run=run)
        try:
            self.method.check(
                self.graph, self.calibration, budget, self.config, self.recover, self.validation
            )
        except UsageError as error:
            raise UsageError(f"{recipe.path}: {error}") from None
        return dataclasses.replace(self, recipe=recipe)

    def with_calibration(self, images: data.ImageSet) -> Setup:
        """The same with these calibration images."""
        benches = tuple(dataclasses.replace(bench, images=images) for bench in self.benches)
        return dataclasses.replace(self, calibration=images, benches=benches)

    def at(self, plan: Plan) -> Resolved:
        """What a plan's network takes: the original, the recipe's images and its target stay as they are."""
        return Resolved(self, graph.image_shape(plan, self.target.input_shape))


@dataclass(frozen=True, slots=True)
class Resolved:
    """A setup at a plan's resolution: what the plan's network takes, with ``shape`` (C, H, W) of an image.

    At the original's own size everything is the setup's; image sets of another size are made anew by each
    call and held by nobody but the caller. Not JSON-able.
    """

    setup: Setup
    shape: tuple[int, int, int]

    @property
    def target(self) -> Target:
        """What the plan's engines are built for."""
        return dataclasses.replace(self.setup.target, input_shape=self.shape)

    @property
    def preprocess(self) -> data.Preprocess:
        """How images are prepared for the plan's network."""
        preprocess = self.setup.recipe.data.preprocess
        if self.shape == self.setup.target.input_shape:
            return preprocess
        return data.at_size(preprocess, self._hw)

    def calibration(self) -> data.ImageSet:
        """The calibration images at this size."""
        return data.resized(self.setup.calibration, self._hw)

    def evaluation(self) -> data.ImageSet:
        """The evaluation images at this size."""
        return data.resized(self.setup.evaluation, self._hw)

    def bench(self) -> Workbench:
        """Where the plan's engines are built, with calibration images of its size."""
        return self.setup.bench.sized(self.shape, self.calibration())

    @property
    def _hw(self) -> tuple[int, int]:
        return self.shape[1], self.shape[2]


def prepare(recipe: recipes.Recipe, module: nn.Module | None = None) -> Setup:
    """Load what a recipe names and check that it fits together, before anything is written.

    ``module`` is the network itself, in eval mode on the CPU, where the recipe's name makes none.

    Raises:
        UsageError: something in the recipe, the model or the images does not fit.
        MissingError: this machine cannot run the target.
    """
    try:
        method = plugins.method(recipe.method_name)
        if recipe.target.backend not in {selection.AUTO, selection.FASTEST}:
            plugins.backend(recipe.target.backend)
    except UsageError as error:
        raise UsageError(f"{recipe.path}: {error}") from None
    config: object = recipes.bind(method.Config, recipe.method, recipe.path, "method")
    recover = recipes.recovery(_recovery_of(recipe, method), recipe.recover, recipe.path)
    device = tune.training_device(
        recipe.target.device, recipe.run.trainer, elsewhere=recipe.run.workers == "ray"
    )
    recover = tune.on_this_machine(recover, device)
    model = models.load_model(recipe.model, recipe.folder) if module is None else module
    channels = models.input_channels(model)
    prepared = recipe.data.preprocess
    made = recipe.data.synthesize is not None
    calibration = (
        data.awaited(recipe.data.calibration, prepared, channels)
        if made
        else data.load_images(recipe.data.calibration, prepared, channels, recipe.folder)
    )
    recover = tune.with_steps(recover, len(calibration))
    shape = calibration.shape
    target = Target(
        backend=recipe.target.backend,
        batch=recipe.target.batch,
        input_shape=shape,
        precision=recipe.target.precision,
        device=recipe.target.device,
        threads=recipe.target.threads,
        options=tuple(sorted((name, _word(value)) for name, value in recipe.target.options.items())),
    )
    selected = selection.select(target)
    if recipe.target.backend == selection.AUTO:
        # A resumed run builds with the backend that it was begun with.
        named = dataclasses.replace(recipe.target, backend=selected.names[0])
        recipe = dataclasses.replace(recipe, target=named)
    original = graph.trace(model, shape)
    shown = graph.inspect(original, shape)
    if made:
        calibration = _drawn(recipe, calibration, original, shown)
    evaluation, validation = _held_out(recipe, calibration, channels, shown.classes)
    data.check_classes(calibration, shown.classes, recipe.data.calibration.source)
    if calibration.labels is None:
        _check_labels(recipe, method, recover)
    given = recipe.data.validation
    if validation is not None and given is not None and validation.labels is None and method.NEEDS_LABELS:
        raise UsageError(
            f"{recipe.path}: [method] name = {recipe.method_name!r}: needs labelled validation images, and "
            f"{given.source} has no labels; give labels, or leave [data] validation out"
        )
    try:
        method.check(shown, calibration, recipe.budget, config, recover, validation)
    except UsageError as error:
        raise UsageError(f"{recipe.path}: {error}") from None
    benches = tuple(
        Workbench(
            plugins.backend(name),
            dataclasses.replace(target, backend=name),
            calibration,
            recipe.export.quantize,
            recipe.run.seed,
        )
        for name in selected.names
    )
    _check_precisions(recipe, benches)
    return Setup(
        recipe=recipe,
        method=method,
        config=config,
        recover=recover,
        benches=benches,
        selected=selected,
        device=device,
        original=original,
        graph=shown,
        model_digest=models.weights_digest(original),
        calibration=calibration,
        evaluation=evaluation,
        validation=validation,
    )


def _drawn(
    recipe: recipes.Recipe, awaited: data.ImageSet, original: fx.GraphModule, shown: ModelGraph
) -> data.ImageSet:
    """The images to be synthesised with their labels; UsageError where the network gives none."""
    settings, spec = recipe.data.synthesize, recipe.data.calibration
    assert settings is not None
    try:
        synthesis.normalisations(original)
    except UsageError as error:
        raise UsageError(f"{recipe.path}: [data.calibration] {error}") from None
    if settings.competition and not shown.units:
        raise UsageError(
            f"{recipe.path}: [data.synthesize] competition = {settings.competition}: needs a network with a "
            "block that can be dropped, to compete with; set 0"
        )
    if not spec.labels:
        return awaited
    return data.labelled(awaited, synthesis.even_labels(len(awaited), shown.classes, spec.seed))


def _held_out(
    recipe: recipes.Recipe, calibration: data.ImageSet, channels: int, classes: int
) -> tuple[data.ImageSet, data.ImageSet | None]:
    """The evaluation images, and the validation images if any; UsageError where they do not fit."""

    def loaded(name: str, spec: data.DataSpec) -> data.ImageSet:
        images = data.load_images(spec, recipe.data.preprocess, channels, recipe.folder, classes=classes)
        if images.shape != calibration.shape:
            raise UsageError(
                f"{recipe.path}: [data] {name}: images are {images.shape}, calibration images "
                f"{calibration.shape}; give [data.preprocess] size"
            )
        return images

    def disjoint(name: str, images: data.ImageSet, other: str, others: data.ImageSet) -> None:
        # Synthesised images are not there yet, and nobody's photographs.
        awaited = others is calibration and recipe.data.synthesize is not None
        shared = 0 if awaited else data.overlap(others, images)
        if shared:
            raise UsageError(
                f"{recipe.path}: [data]: {shared} {name} images are also {other} images; the accuracy "
                "would flatter the result: give disjoint sets"
            )

    evaluation = loaded("evaluation", recipe.data.evaluation)
    disjoint("evaluation", evaluation, "calibration", calibration)
    if recipe.data.validation is None:
        return evaluation, None
    validation = loaded("validation", recipe.data.validation)
    disjoint("validation", validation, "calibration", calibration)
    disjoint("validation", validation, "evaluation", evaluation)
    return evaluation, validation


def _recovery_of(recipe: recipes.Recipe, method: Method) -> Tune:
    """What ``[recover]`` departs from: the recovery of the method that it names, else of the running one."""
    if recipe.recover_name is None:
        return method.RECOVER
    try:
        return plugins.method(recipe.recover_name).RECOVER
    except UsageError as error:
        # The lookup takes a method's name to stand where it mostly does.
        raise UsageError(f"{recipe.path}: {str(error).replace('[method]', '[recover]', 1)}") from None


def _check_labels(recipe: recipes.Recipe, method: Method, recover: Tune) -> None:
    """UsageError where the method or the recovery learns from labels; only for images without any."""
    if method.NEEDS_LABELS:
        who, otherwise = f"[method] name = {recipe.method_name!r}", ""
    elif recover.loss == "labels":
        named = recipe.recover_name is not None and "loss" not in recipe.recover
        who = f"[recover] name = {recipe.recover_name!r}" if named else '[recover] loss = "labels"'
        otherwise = ", or leave [recover] name out" if named else ', or set [recover] loss = "mimic"'
    else:
        return
    images = recipe.data.calibration
    mend = (
        "give a folder with a folder for each class, or an .npz file with labels"
        if images.labels
        else "set [data.calibration] labels = true"
    )
    raise UsageError(
        f"{recipe.path}: {who}: needs labelled calibration images, and {images.source} has no labels"
        f"{'' if images.labels else ' (labels = false)'}; {mend}{otherwise}"
    )


def _word(value: str | float) -> str:
    """An option as backends take it; truth values in TOML's spelling."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_precisions(recipe: recipes.Recipe, benches: tuple[Workbench, ...]) -> None:
    """UsageError for a precision to ship that no backend of the recipe runs."""
    offered = [bench.backend.precisions(bench.target.device) for bench in benches]
    for wanted in recipe.export.precisions or ():
        if not any(wanted in precisions for precisions in offered):
            runs = ", ".join(dict.fromkeys(name for precisions in offered for name in precisions))
            names = ", ".join(bench.target.backend for bench in benches)
            raise UsageError(
                f'{recipe.path}: [export] precisions: "{wanted}" does not run on {names} '
                f"({recipe.target.device}); it runs {runs}"
            )
