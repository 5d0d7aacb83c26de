"""A run made from a network and images that a program holds, in the recipe's words."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from optpipe import data, models, preparation
from optpipe import recipe as recipes
from optpipe.api import inputs
from optpipe.api.inputs import Images, Labels
from optpipe.api.result import Result
from optpipe.api.running import folder_of, take
from optpipe.errors import UsageError
from optpipe.types import Emit

if TYPE_CHECKING:
    from torch import nn

Table = Mapping[str, object]

EVALUATION_SHARE = 0.2
"""Of the calibration images, held out to score with where no others are given."""


def optimize(
    model: nn.Module | str,
    calibration: Images,
    evaluation: Images | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int] | None = None,
    resize: Literal["squash", "crop"] = "squash",
    labels: Labels | None = None,
    evaluation_labels: Labels | None = None,
    architecture: str | None = None,
    weights: str | Path | None = None,
    classes: int | None = None,
    in_channels: int | None = None,
    method: str = "practise",
    latency_reduction: float = 0.22,
    target: str = "auto",
    tables: Mapping[str, Table] | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    gpu: bool = False,
    on_event: Emit | None = None,
) -> Result:
    """Make a trained network faster on this machine, from a handful of images.

    >>> import numpy as np, optpipe
    >>> from optpipe import zoo
    >>> from safetensors.torch import load_file
    >>> network = zoo.build("resnet20_cifar", classes=10, in_channels=1)  # any trained nn.Module
    >>> keys = network.load_state_dict(load_file("recipes/weights/resnet20_digits.safetensors"))
    >>> digits = np.load("calibration_data/digits_calibration.npz")["images"]  # uint8 (200, 8, 8)
    >>> result = optpipe.optimize(
    ...     network,
    ...     digits[:64],
    ...     "calibration_data/digits_evaluation.npz",
    ...     mean=[0.5],
    ...     std=[0.5],
    ...     size=(32, 32),
    ...     tables={
    ...         "budget": {"drop_blocks": 1},  # in the place of latency_reduction
    ...         "method": {"criterion": "l2"},
    ...         "target": {"batch": 16, "threads": 1},
    ...         "recover": {"steps": 4},  # so few only to be quick: 300 do
    ...         "export": {"precisions": ["fp32"]},
    ...         "timing": {"budget_s": 0.1, "final_budget_s": 0.2},
    ...     },
    ...     out="runs/from-python",
    ... )
    >>> len(result.report.plan.drop_blocks)
    1
    >>> result.model(result.preprocess(digits[0][..., None])[None]).shape
    torch.Size([1, 10])
    >>> result.engine.name
    'model.onnx'
    >>> again = optpipe.load("runs/from-python", model=network)  # in another program, say

    **Network.** ``model`` is a module or, as in a recipe, a name, with ``weights``, ``classes`` and
    ``in_channels``. A module is copied and never changed; it must hold fp32 weights and be traceable by
    torch.fx, as any model of a recipe.

    A run stores no code: an optimized network is *its architecture by name, a plan, and safetensors*. Say
    which name makes yours, ``architecture="torchvision:resnet18"``, "zoo:NAME" or "package.module:function"
    (with ``classes`` and ``in_channels`` as it takes them), and the run is one of a recipe like any other: it
    is checked that the name, with your module's weights, computes what the module does. Without a name the
    run itself, its resumption, the engines, ``optpipe report``, ``gate``, ``compare``, ``verify``, ``bench``
    and ``rebuild`` all work, and ``Result.model`` does; but ``optpipe.load(run)`` in another program needs
    the architecture again (``model=module``), and ``optpipe landscape`` and ``optpipe run`` with the run's
    own recipe.toml cannot be had.

    **Images.** ``calibration`` and ``evaluation`` are uint8 arrays (N, H, W, C) or (N, H, W), or what a
    recipe takes: a folder, an .npz, "module:function", or "synthesize". ``labels`` and ``evaluation_labels``
    (N,) go with arrays. Without ``evaluation`` a fifth of the calibration images is held out to score with,
    and the network learns from the rest. Without evaluation labels the quality is the agreement with the
    original. ``size`` (H, W), ``resize``, ``mean`` and ``std`` are ``[data.preprocess]``: what the network
    was trained with.

    **The rest** is the recipe's: ``tables`` holds its tables by name, and each key given there counts;
    ``[budget]`` stands in the place of ``latency_reduction``. ``target`` is the backend's name. ``out``,
    ``fresh``, ``gpu`` and ``on_event`` are as in :func:`optpipe.run`.

    Arrays and weights are written to ``OUT.inputs/``, named by their contents: the run refers to them, and
    the same call with the same network and images goes on with the same run, or reads it back.

    Returns:
        The finished run; ``print`` it for a summary.

    Raises:
        UsageError: an argument, the network, or the images cannot be used as given, or the folder holds
            another run.
        MissingError: this machine cannot run the target.
        RunError: a stage failed, or no network meets the budget.
    """
    module = None if isinstance(model, str) else inputs.copied(model)
    given = tables or {}
    held_out = evaluation is None
    others: Images = calibration if evaluation is None else evaluation
    if held_out and evaluation_labels is not None:
        raise UsageError("evaluation_labels: there are no evaluation images that they belong to")
    raw: dict[str, object] = {
        "model": _named(model, architecture, weights, classes, in_channels),
        "data": {
            "calibration": {"source": inputs.checked_images("calibration", calibration, labels)},
            "evaluation": {"source": inputs.checked_images("evaluation", others, evaluation_labels)},
            "preprocess": {"mean": [*mean], "std": [*std], "resize": resize}
            | ({} if size is None else {"size": [*size]}),
        },
        "target": {"backend": target} | ({"device": "cuda"} if gpu else {}),
        "method": {"name": method},
        "budget": {} if "budget" in given else {"latency_reduction": latency_reduction},
    }
    recipe = recipes.from_tables(_merged(raw, given), Path.cwd() / "<optimize>")
    folder = folder_of(recipe, out)
    beside = folder.resolve().with_name(f"{folder.resolve().name}.inputs")
    images = recipe.data
    if isinstance(calibration, np.ndarray):
        source = inputs.written_images(beside, "calibration", calibration, labels)
        images = replace(images, calibration=replace(images.calibration, source=source))
    if isinstance(evaluation, np.ndarray):
        source = inputs.written_images(beside, "evaluation", evaluation, evaluation_labels)
        images = replace(images, evaluation=replace(images.evaluation, source=source))
    if module is not None:
        recipe = replace(recipe, model=replace(recipe.model, weights=inputs.written_weights(beside, module)))
    if held_out:
        network = models.load_model(recipe.model, recipe.folder) if module is None else module
        images = _split(images, network, recipe.folder)
    live = architecture is None and module is not None
    setup = preparation.prepare(replace(recipe, data=images), module if live else None)
    if module is not None and architecture is not None:
        inputs.check_same(architecture, setup.original, module, setup.evaluation)
    report = take(setup, folder, fresh=fresh, on_event=on_event).report
    return Result(folder, report, module if live else None)


def _named(
    model: nn.Module | str,
    architecture: str | None,
    weights: str | Path | None,
    classes: int | None,
    in_channels: int | None,
) -> dict[str, object]:
    """The recipe's ``[model]``; a module's weights are not in it yet."""
    sizes = {"classes": classes, "in_channels": in_channels}
    table: dict[str, object] = {key: value for key, value in sizes.items() if value is not None}
    if isinstance(model, str):
        if architecture is not None:
            raise UsageError(f'architecture = "{architecture}": model = "{model}" is a name already')
        return {"name": model, **table} | ({} if weights is None else {"weights": str(weights)})
    if weights is not None:
        raise UsageError(f"weights = {str(weights)!r}: a module has its own; load them into it")
    if architecture is None and table:
        raise UsageError(f"{' and '.join(table)}: a module has its own; they go with a name")
    return {"name": architecture or f"{models.LIVE}:{type(model).__name__}", **table}


def _merged(base: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """``base`` with the keys of nested tables replaced by those given; neither is changed."""
    merged = dict(base)
    for key, value in given.items():
        own = base.get(key)
        both = isinstance(own, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(own, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return merged


def _split(images: recipes.DataTable, network: nn.Module, search_folder: Path) -> recipes.DataTable:
    """The calibration images in two parts, the second to score with."""
    spec = images.calibration
    if spec.source == data.SYNTHESIZE:
        raise UsageError("evaluation: images that are synthesised cannot be scored with; give images")
    count = inputs.count_images(spec, models.input_channels(network), search_folder)
    held_out = max(1, round(count * EVALUATION_SHARE))
    if count < 2:
        raise UsageError(f"calibration: {count} images cannot be split; give evaluation images")
    learnt = replace(spec, count=count - held_out)
    scored = replace(spec, count=held_out, skip=spec.skip + count - held_out)
    return replace(images, calibration=learnt, evaluation=scored)
