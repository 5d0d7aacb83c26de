"""Three dimensions at once: depth, width and resolution (Wang et al., "Accelerate CNNs from Three Dimensions:
A Comprehensive Pruning Framework").

How much accuracy each dimension costs is learnt by pruning and fine-tuning along each alone (Algorithm 1).
A product of one polynomial in each (Eqs 7 and 10) predicts the accuracy of every (d, w, r); the one of the
highest that meets the budget (Eq. 3) is then made of the original: the blocks go that add least to what a
linear probe can tell, the channels of the smallest batch-norm scales in every layer at one ratio, and the
images are smaller (Section 3.3).

What the budget counts is what networks cost as they are built. Where each dimension alone meets it is found
by building; a smooth surface is fitted to all that was built, in place of d w^2 r^2 (Eq. 4); the optimum on
it is built too, and sought again on a corrected surface until it meets the budget. Which ratios of channels
the target executes well is measured. ``cost = "formula"`` takes this back.

Deliberate deviations. The lower end of each dimension is where it alone meets the budget, measured, and not
T or its root. The optimum is sought among networks that can be built; the constrained solver (Eq. 8) and a
dense grid say where it lies when depth, width and resolution are continuous. Accuracies are taken on the
recipe's validation images, or else on images held out of the calibration set, which the original may know by
heart: that flatters what leaves its weights alone, the resolution. The point (1, 1, 1) is fine-tuned for a
round like the others. The result is made of the nearest network that was trained on the way, not of the
original (``begin``). Blocks are ordered by the skill that a linear probe gains, not by its accuracy. The
predictor is kept from falling where less is taken out (``monotone``).
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from optpipe import graph
from optpipe.errors import RunError, UsageError
from optpipe.methods._meter import Meter, Reading, meter_of, refuse_sparsity
from optpipe.methods.three_d import ends, figures, importance, predictor, tables
from optpipe.methods.three_d.collect import Collection, Made, collect, halfway, stops, tuning
from optpipe.methods.three_d.config import DIMENSIONS, Config
from optpipe.methods.three_d.ends import Axis, Costed
from optpipe.methods.three_d.images import Split, parts_of
from optpipe.methods.three_d.settle import settle
from optpipe.methods.three_d.space import Level, Space, combined, default_step, sizes_below
from optpipe.types import (
    Answer,
    Budget,
    Choice,
    Figure,
    Images,
    Interim,
    ModelGraph,
    Plan,
    Request,
    Scene,
    Search,
    Table,
    Trial,
    Tune,
)

if TYPE_CHECKING:
    from torch import fx

__all__ = ["NEEDS_LABELS", "RECOVER", "Config", "check", "search"]

NEEDS_LABELS = True

RECOVER = Tune(
    steps=0,
    epochs=80,
    batch=128,
    lr=0.01,
    nesterov=True,
    weight_decay=1e-4,
    schedule="cosine",
    loss="labels",
    trainable="all",
    augment="shift",
    autocast="auto",
)

_NO_WIDTHS = graph.WidthMap((), (), (), (), ())


def check(
    shown: ModelGraph,
    calibration: Images,
    budget: Budget,
    config: Config,
    recover: Tune,
    validation: Images | None = None,
) -> None:
    """UsageError for what no search can be made of: settings, a budget, a network, images."""
    _check_settings(config)
    _check_budget(budget, config)
    without = [dimension for dimension in DIMENSIONS if dimension in config.dimensions]
    for dimension in config.dimensions:
        reason = _why_not(shown, dimension)
        if reason:
            without.remove(dimension)
            left = ", ".join(f'"{name}"' for name in without)
            mend = f"; set [method] dimensions = [{left}]" if left else ""
            raise UsageError(f"[method] three_d: {reason}{mend}")
    if recover.loss != "labels":
        raise UsageError(
            f'[recover] loss = "{recover.loss}": three_d trains on labels, since features of other widths '
            "and sizes do not compare; leave it out"
        )
    assert calibration.labels is not None
    if validation is not None:
        return
    for label, count in enumerate(np.bincount(calibration.labels.numpy(), minlength=shown.classes)):
        if count < 2:
            raise UsageError(
                f"[data] calibration: class {label} has {count} images; three_d needs at least two of each, "
                "one of them to score: raise count, give images of that class, or [data] validation"
            )


def _check_settings(config: Config) -> None:
    if not config.dimensions or len(set(config.dimensions)) < len(config.dimensions):
        raise UsageError(
            f"[method] dimensions = {list(config.dimensions)}: name at least one of depth, width and "
            "resolution, each once"
        )
    for key, least in (("rounds", 1), ("rank", 1), ("degree", 1), ("corrections", 0)):
        if getattr(config, key) < least:
            raise UsageError(f"[method] {key} = {getattr(config, key)}: must be at least {least}")
    if config.epochs <= 0:
        raise UsageError(f"[method] epochs = {config.epochs:g}: must be above 0")
    if not 0 < config.validation < 1:
        raise UsageError(f"[method] validation = {config.validation:g}: must be above 0 and below 1")
    if config.resolution_step is not None and config.resolution_step < 1:
        raise UsageError(f"[method] resolution_step = {config.resolution_step}: must be at least 1")


def _check_budget(budget: Budget, config: Config) -> None:
    refuse_sparsity(budget, "three_d")
    if budget.drop_blocks is not None:
        raise UsageError(
            "[budget] drop_blocks: three_d weighs blocks against channels and pixels; give "
            "latency_reduction, latency_ms, macs_reduction or parameters_reduction"
        )
    if config.cost == "formula" and budget.macs_reduction is None:
        raise UsageError(
            '[method] cost = "formula": d w^2 r^2 stands for MACs; give [budget] macs_reduction, or set cost '
            '= "measured"'
        )
    if budget.parameters_reduction is not None and "resolution" in config.dimensions:
        raise UsageError(
            "[budget] parameters_reduction: smaller images leave every parameter; set [method] dimensions = "
            '["depth", "width"]'
        )


def _why_not(shown: ModelGraph, dimension: str) -> str:
    """Why a network cannot be pruned along a dimension; "" where it can."""
    if dimension == "depth" and not shown.units:
        return "the network has no block that can be dropped (`optpipe inspect` says why not for each)"
    if dimension == "width" and not any(group.prunable for group in shown.groups):
        return "the network has no channel group that can be narrowed (`optpipe inspect` says why not)"
    if dimension == "resolution" and shown.fixed_size:
        return f"the network takes images of one size: {shown.fixed_size}"
    return ""


def search(scene: Scene, config: Config) -> Search:
    """Learn what each dimension costs in accuracy, then take the best network that meets the budget.

    Raises:
        UsageError: what :func:`check` refuses, or a latency that the original meets already.
        RunError: no network meets the budget; says what can be reached.
    """
    check(scene.graph, scene.calibration, scene.budget, config, scene.recover, scene.validation)
    meter = meter_of(scene)
    if meter.allowed >= 1:
        raise UsageError(
            f"[budget] latency_ms = {scene.budget.latency_ms}: the original takes "
            f"{scene.baseline.median_ms:.3f} ms already; lower it"
        )
    parts = parts_of(scene, config.validation)
    space, probes = yield from _survey(scene, config, parts)
    axes = yield from _axes(space, meter, config)
    shown = [tables.ratios(space, axis) for axis in axes if axis.dimension == "width" and axis.costed]
    open_axes = [axis for axis in axes if axis.choices]
    if len(open_axes) > 1:
        found = yield from _together(scene, space, open_axes, parts, meter, config)
    else:
        found = _alone(space, axes, open_axes, meter)
    plan = found.made.plan
    if probes:
        shown.insert(0, tables.blocks(space, probes, plan))
    return Choice(
        plan,
        scene.recover,
        _reason(space, axes, found, meter),
        (*shown, *found.tables),
        start=found.made.start,
        interim=(Interim(Plan()), Interim(plan)),
        figures=found.figures,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """The network that was chosen, how it is made, its cost, and what the report shows of the way to it."""

    level: Level
    made: Made
    reading: Reading
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


def _survey(
    scene: Scene, config: Config, parts: Split
) -> Generator[Sequence[Request], Sequence[Answer], tuple[Space, tuple[graph.UnitScore, ...]]]:
    """What can be taken out of the original, and how important each part of it is."""
    shape = scene.graph.input_shape
    units = [block.name for block in scene.graph.units] if "depth" in config.dimensions else []
    widths = graph.width_map(scene.model, shape) if "width" in config.dimensions else _NO_WIDTHS
    probes: tuple[graph.UnitScore, ...] = ()
    if units:
        network = cast("fx.GraphModule", scene.model)
        probes = yield from importance.probe(scene, network, "the original", units, parts)
    space = Space(
        input_shape=shape,
        blocks=len(scene.graph.blocks),
        units=tuple(units),
        order=tuple(one.name for one in probes),
        widths=widths,
        scores=graph.channel_scales(scene.model, widths),
        sizes=_sizes(scene, config),
    )
    return space, probes


def _sizes(scene: Scene, config: Config) -> tuple[tuple[int, int], ...]:
    """The sizes of images below the original's that it takes.

    Raises:
        UsageError: there are none.
    """
    if "resolution" not in config.dimensions:
        return ()
    shape = scene.graph.input_shape
    step = config.resolution_step or default_step(shape[1])
    taken = graph.sizes_taken(scene.model, shape, sizes_below(shape[1:], step))
    if not taken:
        raise UsageError(
            f"[method] resolution_step = {step}: no multiple of it is below the images' {shape[1]} pixels "
            "and taken by the network; lower it"
        )
    return taken


def _axes(
    space: Space, meter: Meter, config: Config
) -> Generator[Sequence[Request], Sequence[Answer], tuple[Axis, ...]]:
    """Each dimension that is searched, down to where it alone meets the budget."""
    found: list[Axis] = []
    for dimension in (one for one in DIMENSIONS if one in config.dimensions):
        if config.cost == "formula" and len(config.dimensions) > 1:
            found.append(ends.by_formula(space, dimension, meter.allowed))
        elif dimension == "width" and config.widths == "measured" and meter.what == "latency":
            found.append((yield from ends.widths(space, meter)))
        else:
            found.append((yield from ends.find(space, dimension, meter)))
    return tuple(found)


def _alone(space: Space, axes: Sequence[Axis], open_axes: Sequence[Axis], meter: Meter) -> _Found:
    """The mildest network along the only dimension; there is nothing to weigh up, and nothing to train."""
    if not open_axes:
        raise RunError(
            "no ratio of channels is clearly faster than more channels: narrowing saves no time here"
        )
    (axis,) = open_axes
    reading = next(one.reading for one in axis.costed if one.level == axis.end)
    if not axis.meets:
        closed = [other.dimension for other in axes if other is not axis]
        also = f", and {closed[0]} saves no time here" if closed else ""
        raise RunError(
            f"no network meets the budget: the most that {axis.dimension} alone can do leaves "
            f"{reading.ratio:.1%} of the {meter.what}, {meter.allowed:.1%} is allowed{also}; lower the "
            "budget, or add dimensions"
        )
    return _Found(axis.end, Made(space.plan(axis.end), None), reading)


def _together(
    scene: Scene, space: Space, axes: Sequence[Axis], parts: Split, meter: Meter, config: Config
) -> Generator[Sequence[Request], Sequence[Answer], _Found]:
    """The optimum of several dimensions: points, predictor, cost surface, and what was built."""
    known = yield from _costs(space, axes, meter, config)
    making = Collection(scene, space, parts, tuning(scene.recover, config.epochs, len(parts.fit)))
    points, trained = yield from collect(making, axes, config)
    begun = trained if config.begin == "nearest" else ()
    shares = np.array([point.share for point in points])
    accuracies = np.array([point.quality.value for point in points])
    fitted = predictor.fit(shares, accuracies, config.rank, config.degree, scene.seed, config.monotone)
    choices = _choices(axes, known)
    make = partial(making.towards, begun)
    settled = yield from settle(space, axes, fitted, choices, meter, config, make)
    shown = [
        tables.optima(settled, meter),
        tables.points(points, known, meter),
        tables.predictors(points, config),
    ]
    if config.cost == "measured":
        shown.append(tables.surface(space, settled, meter))
    drawn = (figures.accuracy(points, fitted), figures.equal_cost(settled, fitted, axes, meter))
    chosen = settled.chosen
    return _Found(chosen.level, chosen.made, chosen.reading, tuple(shown), drawn)


def _costs(
    space: Space, axes: Sequence[Axis], meter: Meter, config: Config
) -> Generator[Sequence[Request], Sequence[Answer], list[Costed]]:
    """What networks cost along the axes, at the stops of the trainings, and between the axes."""
    known = {space.whole: Reading(1.0, 1.0, 1.0)}
    known |= {one.level: one.reading for axis in axes for one in axis.costed}
    if config.cost == "measured":
        wanted = [level for axis in axes for level in stops(space, axis, config.rounds)]
        wanted += between(axes)
        if config.inside:
            wanted += halfway(space, axes, config.rounds)
        asked = [level for level in dict.fromkeys(wanted) if level not in known]
        trials = cast("Sequence[Trial]", (yield [meter.ask(space.plan(level)) for level in asked]))
        known |= {level: meter.read(trial) for level, trial in zip(asked, trials, strict=True)}
    return [Costed(level, reading) for level, reading in known.items()]


def between(axes: Sequence[Axis]) -> list[Level]:
    """Networks inside, for the cost surface: each two dimensions half way down, all of them a third and half.

    Where each alone meets the budget at its end, these lie about where together they do.
    """
    found = [combined([_part(axis, 1 / 2) for axis in pair]) for pair in itertools.combinations(axes, 2)]
    if len(axes) > 2:
        found += [combined([_part(axis, share) for axis in axes]) for share in (1 / 3, 1 / 2)]
    return found


def _part(axis: Axis, share: float) -> Level:
    """The choice that lies so far down an axis."""
    return axis.choices[min(len(axis.choices) - 1, int(share * len(axis.choices)))]


def _choices(axes: Sequence[Axis], known: Sequence[Costed]) -> list[Costed]:
    """Those that lie on the surface: at a width that does not pay, the cost lies above it."""
    ratios = {1.0}
    for axis in axes:
        if axis.dimension == "width":
            ratios |= {level.ratio for level in axis.choices}
    return [one for one in known if one.level.ratio in ratios]


def _reason(space: Space, axes: Sequence[Axis], found: _Found, meter: Meter) -> str:
    level = found.level
    d, w, r = space.share(level)
    saved = f"{1 - found.reading.ratio:.1%} of the {meter.what}"
    if meter.what == "latency":
        saved += f" ({1 - found.reading.high:.1%} to {1 - found.reading.low:.1%}), measured"
    height, width = level.size
    reason = (
        f"d = {d:.3g}, w = {w:.3g}, r = {r:.3g}: {level.dropped} of {space.blocks} blocks dropped, what can "
        f"be narrowed at {w:.3g} of its channels, images of {height}x{width}. Saves {saved}"
    )
    closed = [axis.dimension for axis in axes if not axis.choices]
    return reason + (f". No ratio of channels saves time here, so the {closed[0]} is whole" if closed else "")
