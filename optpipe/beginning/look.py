"""What a network and its images are, as far as a first recipe must know. No image is decoded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optpipe import data, graph, models, plugins
from optpipe.data.sources import Source, open_source
from optpipe.errors import UsageError
from optpipe.models import ModelSpec
from optpipe.types import Budget, Images, Method, ModelGraph

if TYPE_CHECKING:
    from torch import nn

BUDGET = Budget(latency_reduction=0.2)
"""What a first recipe asks for, and methods are asked whether they can try."""

ORDER = ("practise", "filters", "ekg", "dllp", "three_d")
"""Of the methods that can work the first is picked: those that need no labels and train least come first."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_ZOO_SIZE = (32, 32)
_PHOTO_SIZE = (224, 224)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user names; all but the model may be left out. ``size`` is (H, W) of the network's images."""

    model: str
    weights: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    classes: int | None = None
    in_channels: int | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """How images become the network's input; ``guessed`` says what of it the user has to check."""

    preprocess: data.Preprocess
    guessed: str


@dataclass(frozen=True, slots=True)
class Found:
    """Images that a user named: ``source`` as the recipe has it, and each image's label where it has any.

    ``no_labels`` says why there are none that the network could learn from; "" where there are.
    """

    source: str
    count: int
    labels: data.Labels | None
    no_labels: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a method can work on this network with these images, and why or why not."""

    name: str
    works: bool
    reason: str
    needs_labels: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was found out. ``weights`` are as the recipe has them; ``published`` are torchvision's own."""

    asked: Asked
    weights: str | None
    published: tuple[str, ...]
    graph: ModelGraph
    batch_norms: int
    prepared: Prepared
    calibration: Found | None
    evaluation: Found | None
    verdicts: tuple[Verdict, ...]

    @property
    def chosen(self) -> Verdict:
        """The first method that can work."""
        return next(verdict for verdict in self.verdicts if verdict.works)


def look_at(asked: Asked, folder: Path) -> Seen:
    """Look at what a user names; ``folder`` is the recipe's, from which it will find everything again.

    Raises:
        UsageError: the network does not load or cannot be traced, images cannot be used, or no method works.
    """
    weights = None if asked.weights is None else _as_written(asked.weights, folder)
    # Whether published weights can be had is for the run to find out: nothing here hangs on their values.
    named = weights in _members(asked.model)
    file = None if named or asked.weights is None else _located(asked.weights)
    spec = ModelSpec(asked.model, file, asked.classes, asked.in_channels)
    model = models.load_model(spec, folder)
    channels = models.input_channels(model)
    calibration = _opened(asked.calibration, channels, folder)
    evaluation = _opened(asked.evaluation, channels, folder)
    prepared = _prepared(asked, channels, calibration or evaluation, named=named)
    data.check_preprocess(prepared.preprocess, channels)
    shown = _graph(model, asked, channels, prepared.preprocess)
    learnt = _found(asked.calibration, calibration, shown.classes, folder)
    verdicts = _verdicts(shown, prepared.preprocess, learnt)
    if not any(verdict.works for verdict in verdicts):
        reasons = "; ".join(f"{verdict.name}: {verdict.reason}" for verdict in verdicts)
        raise UsageError(f"{asked.model}: no method can work on it: {reasons}")
    return Seen(
        asked=asked,
        weights=weights,
        published=_published(asked.model),
        graph=shown,
        batch_norms=_batch_norms(model),
        prepared=prepared,
        calibration=learnt,
        evaluation=_found(asked.evaluation, evaluation, shown.classes, folder),
        verdicts=verdicts,
    )


# ---------------------------------------------------------------- the network


def _published(name: str) -> tuple[str, ...]:
    """The names of torchvision's own weights of a network, the latest last; none for any other."""
    return tuple(key for key in _members(name) if key is not None and key != "DEFAULT")


def _members(name: str) -> Mapping[str | None, Any]:
    source, _, architecture = name.partition(":")
    if source != "torchvision":
        return {}
    from torchvision.models import get_model_weights

    try:
        members: Mapping[str | None, Any] = get_model_weights(architecture).__members__
    except ValueError:  # loading the network says it better
        return {}
    return members


def _graph(model: nn.Module, asked: Asked, channels: int, preprocess: data.Preprocess) -> ModelGraph:
    assert preprocess.size is not None
    try:
        return graph.inspect(model, (channels, *preprocess.size))
    except UsageError as error:
        height, width = preprocess.size
        guess = "" if asked.size else f" (looked at with images of {height} x {width}: --size sets another)"
        raise UsageError(f"{asked.model}: {error}{guess}") from None


def _batch_norms(model: nn.Module) -> int:
    from torch import nn

    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


# ---------------------------------------------------------------- images


def _as_written(given: str, folder: Path) -> str:
    """A path as a recipe in ``folder`` finds it: relative where both lie in the working folder.

    What is no path, a name of weights or of a function, stays as it is.
    """
    path = Path(given).expanduser()
    if not path.exists():
        return given
    whole, here = path.resolve(), Path.cwd().resolve()
    if whole.is_relative_to(folder) or (whole.is_relative_to(here) and folder.is_relative_to(here)):
        return Path(os.path.relpath(whole, folder)).as_posix()
    return whole.as_posix()


def _opened(given: str | None, channels: int, folder: Path) -> Source | None:
    if given is None:
        return None
    return open_source(data.DataSpec(_located(given)), channels, folder)


def _located(given: str) -> str:
    """A path from wherever one looks: the recipe's folder may not be there yet."""
    path = Path(given).expanduser()
    return str(path.resolve()) if path.exists() else given


def _found(given: str | None, source: Source | None, classes: int, folder: Path) -> Found | None:
    if given is None or source is None:
        return None
    reason = _why_no_labels(source, classes)
    return Found(_as_written(given, folder), len(source.names), None if reason else source.labels, reason)


def _why_no_labels(source: Source, classes: int) -> str:
    """Why a source's labels cannot be those of a network of ``classes`` classes; "" where they can."""
    if source.labels is None:
        return "the images have no labels"
    if source.class_folders not in (None, classes):
        return f"there are {source.class_folders} class folders, the network has {classes} classes"
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= classes:
        return f"labels go from {low} to {high}, the network has {classes} classes"
    return ""


def _prepared(asked: Asked, channels: int, source: Source | None, *, named: bool) -> Prepared:
    """How the network's images are prepared: as torchvision does for its own weights, else as is likely."""
    members = _members(asked.model)
    member = members.get(asked.weights, members.get("DEFAULT"))
    if member is not None:
        preset = member.transforms()
        side = int(preset.crop_size[0])
        mean, std = tuple(map(float, preset.mean)), tuple(map(float, preset.std))
        guessed = "" if named else "as torchvision's own weights take images; are yours prepared so?"
        return Prepared(data.Preprocess(mean, std, asked.size or (side, side), "crop"), guessed)
    mean, std = _IMAGENET if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    size = asked.size or _likely_size(asked, source)
    what = "mean and std" if asked.size else "size, mean and std"
    return Prepared(data.Preprocess(mean, std, size), f"{what} are guessed: give those of the training")


def _likely_size(asked: Asked, source: Source | None) -> tuple[int, int]:
    """(H, W) of the images that a network was made for, as far as its name and its images tell."""
    if asked.model.startswith("zoo:"):
        return _ZOO_SIZE
    # Files of photographs have any size; arrays are mostly what the network was trained on.
    given = asked.calibration or asked.evaluation or ""
    first = source.read(0) if source is not None and not Path(given).expanduser().is_dir() else None
    return _PHOTO_SIZE if first is None else (first.shape[0], first.shape[1])


# ---------------------------------------------------------------- methods


def _verdicts(shown: ModelGraph, preprocess: data.Preprocess, found: Found | None) -> tuple[Verdict, ...]:
    known = plugins.names("methods")
    names = [name for name in ORDER if name in known] + [name for name in known if name not in ORDER]
    return tuple(_verdict(name, plugins.method(name), shown, preprocess, found) for name in names)


def _verdict(
    name: str, method: Method, shown: ModelGraph, preprocess: data.Preprocess, found: Found | None
) -> Verdict:
    """What the method itself says of the network and the images, or of labelled ones where none are given."""
    needs_labels = method.NEEDS_LABELS or method.RECOVER.loss == "labels"
    if needs_labels and found is not None and found.labels is None:
        return Verdict(name, False, f"needs labelled calibration images, and {found.no_labels}", needs_labels)
    try:
        config: object = method.Config()
        method.check(shown, _images(shown, preprocess, found), BUDGET, config, method.RECOVER)
    except UsageError as error:
        return Verdict(name, False, str(error).removeprefix(f"[method] {name}: "), needs_labels)
    return Verdict(name, True, _why(name, shown, needs_labels), needs_labels)


def _images(shown: ModelGraph, preprocess: data.Preprocess, found: Found | None) -> Images:
    """The calibration images with their labels and no pixels; two of each class where none are given."""
    labels = np.arange(2 * shown.classes, dtype=np.int64) % shown.classes
    count = len(labels) if found is None else found.count
    images = data.awaited(data.DataSpec("", count=count), preprocess, shown.input_shape[0])
    if found is not None:
        return images if found.labels is None else data.labelled(images, found.labels)
    return data.labelled(images, labels)


def _why(name: str, shown: ModelGraph, needs_labels: bool) -> str:
    """Why a method can work, in the network's numbers."""
    narrow = sum(group.prunable for group in shown.groups)
    groups = f"{narrow} of {len(shown.groups)} channel groups can be narrowed"
    reasons = {
        "practise": f"{len(shown.droppable)} residual blocks can be dropped",
        "filters": groups,
        "ekg": groups,
        "dllp": groups,
        "three_d": f"{len(shown.units)} blocks can be dropped, {groups}, and images can be smaller",
    }
    learns = (
        "needs labels, and trains for longer"
        if needs_labels
        else "a few hundred images are enough, without labels"
    )
    return f"{reasons.get(name, 'it refuses nothing here')}; {learns}"
