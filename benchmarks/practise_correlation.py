"""Figs. 9 and 12 of PRACTISE's paper: what criteria say of blocks, and what is left once they are recovered.

Every droppable block is dropped alone, scored by each criterion on the calibration images, and recovered. Then
several are dropped, in the order of recoverability alone (nothing is timed here), and either the adaptors around
them are trained or all layers are. Errors after recovery are of images that nothing has seen: feature error and
disagreement with the original on 1,000 held-out training images, and top-1 error on the test images. Nothing is
chosen by any of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import fx

from benchmarks import practise_correlation_tables as tables
from benchmarks import runs
from benchmarks.practise_correlation_tables import Alone, Correlated, Error, Scale, Several
from optpipe import data, graph, preparation, store, tune
from optpipe import recipe as recipes
from optpipe.errors import UsageError
from optpipe.files import write_atomically
from optpipe.methods import practise
from optpipe.timing import Stopwatch
from optpipe.types import Images, Plan, Tune

HELD_OUT = 1000
COUNTS = (1, 2, 3, 5, 8, 11)
EFFECTS: Mapping[str, graph.Effect] = {"l2": "features", "curl": "answers", "epsilon_resnet": "response"}
FAST = "recoverability"
EXACT = "recoverability, exact"


@dataclasses.dataclass(frozen=True, slots=True)
class Ground:
    """What all rows of one seed start from; ``scores`` are of the blocks that can be dropped, in order."""

    original: fx.GraphModule
    shape: tuple[int, int, int]
    calibration: Images
    evaluation: Images
    held_out: Images
    blocks: tuple[str, ...]
    scores: Mapping[str, tuple[float, ...]]
    recovery: Tune
    adaptors: Tune
    seed: int


def main(arguments: argparse.Namespace, steps: int) -> int:
    """Measure all seeds of one network, and write JSON, Markdown and figures after each row."""
    scale = Scale(
        arguments.network,
        arguments.recipe.name,
        steps,
        arguments.exact_steps,
        tuple(arguments.overrides),
        f"{runs.machine()}; torch {version('torch')}",
    )
    exact = f"-exact{arguments.exact_steps}" if arguments.exact_steps else ""
    path = arguments.out / f"practise_correlation-{arguments.network}-{steps}steps{exact}.json"
    found = resume(path, scale)
    if arguments.dry_run:
        print(f"{path}: seeds {arguments.seeds}, {steps} steps, no runs of their own")
        return 0
    for seed in arguments.seeds:
        found = measure(arguments, found, seed, lambda now: publish(path, now))
    print(tables.markdown(found))
    return 0


def resume(path: Path, scale: Scale) -> Correlated:
    """The rows that are there, if they were made at the same scale; else none."""
    with contextlib.suppress(FileNotFoundError, ValidationError):
        found = store.from_json(Correlated, path.read_bytes())
        if found.scale == scale:
            return found
    return Correlated(scale, "", (), ())


def publish(path: Path, found: Correlated) -> None:
    """Write all rows so far, and the figures where there are rows enough."""
    write_atomically(path, store.to_json(found))
    write_atomically(path.with_suffix(".md"), tables.markdown(found))
    for kind, drawn in tables.figures(found).items():
        write_atomically(path.with_name(f"{path.stem}-{kind}.svg"), drawn)


def measure(
    arguments: argparse.Namespace, found: Correlated, seed: int, publish: Callable[[Correlated], None]
) -> Correlated:
    """The record with the rows of a seed that were not there yet."""
    ground = ground_of(arguments, found.scale, seed)
    for number in range(len(ground.blocks)):
        if not any((row.seed, row.block) == (seed, ground.blocks[number]) for row in found.alone):
            found = _dated(found, alone=(*found.alone, drop_alone(ground, number, found.scale)))
            publish(found)
            print(f"seed {seed}, {tables.line(found.alone[-1])}", flush=True)
    for count in counts_of(len(ground.blocks)):
        if not any((row.seed, row.dropped) == (seed, count) for row in found.several):
            found = _dated(found, several=(*found.several, drop_several(ground, count)))
            publish(found)
            one = found.several[-1]
            print(
                f"seed {seed}, {count} dropped: test error {one.before.test:.1%}, adaptors "
                f"{one.adaptors.test:.1%}, all {one.trained.test:.1%}",
                flush=True,
            )
    return found


def _dated(
    found: Correlated,
    alone: tuple[Alone, ...] | None = None,
    several: tuple[Several, ...] | None = None,
) -> Correlated:
    return Correlated(
        found.scale,
        datetime.now(UTC).date().isoformat(),
        found.alone if alone is None else alone,
        found.several if several is None else several,
    )


def counts_of(droppable: int) -> tuple[int, ...]:
    """How many blocks are dropped together: all numbers of a short network, the paper's of a long one."""
    return COUNTS if droppable > COUNTS[-1] else tuple(range(1, droppable + 1))


def ground_of(arguments: argparse.Namespace, scale: Scale, seed: int) -> Ground:
    """The network, the images of this draw, and what each criterion that looks at no training says."""
    count = arguments.counts[0] if arguments.counts else 500
    sets = (
        *runs.NETWORKS[arguments.network],
        f"data.calibration.seed={seed}",
        f"data.calibration.count={count}",
        *arguments.overrides,
    )
    recipe = recipes.load(arguments.recipe, sets)
    if recipe.target.threads is not None:
        torch.set_num_threads(recipe.target.threads)
    setup = preparation.prepare(recipe)
    shape, blocks = setup.target.input_shape, tuple(block.name for block in setup.graph.droppable)
    if len(blocks) < 2:
        raise UsageError(f"{arguments.recipe}: the network has no two blocks that can be dropped")
    spec = dataclasses.replace(recipe.data.calibration, skip=len(setup.calibration), count=HELD_OUT)
    held_out = data.load_images(spec, recipe.data.preprocess, shape[0], recipe.folder)
    recovery = recipes.recovery(practise.RECOVER, {**recipe.recover, "steps": scale.steps}, arguments.recipe)
    images = practise.Config().fast_images
    asked = (setup.original, Plan(), blocks, setup.calibration, shape)
    scores = {FAST: graph.refit_errors(*asked, images)}
    scores |= {name: graph.removal_effects(*asked, effect) for name, effect in EFFECTS.items()}
    scores["random"] = tuple(float(place) for place in np.random.default_rng(seed).permutation(len(blocks)))
    scores["first"] = tuple(float(place) for place in range(len(blocks)))
    return Ground(
        setup.original,
        shape,
        setup.calibration,
        setup.evaluation,
        held_out,
        blocks,
        scores,
        tune.on_this_machine(recovery),
        Tune(steps=scale.steps, trainable="adaptors", batch_norm="eval"),
        seed,
    )


def drop_alone(ground: Ground, number: int, scale: Scale) -> Alone:
    """One block dropped: its scores, and its errors before and after recovery."""
    plan = Plan(drop_blocks=(ground.blocks[number],))
    scores = {name: values[number] for name, values in ground.scores.items()}
    if scale.exact_steps:
        adapted = graph.with_adaptors(ground.original, plan, ground.shape)
        _train(ground, adapted, dataclasses.replace(ground.adaptors, steps=scale.exact_steps))
        scores[EXACT] = tune.distance(adapted, ground.original, ground.calibration)
    candidate = graph.apply(ground.original, plan, ground.shape)
    before, watch = error_of(ground, candidate), Stopwatch()
    _train(ground, candidate, ground.recovery)
    return Alone(
        ground.seed, ground.blocks[number], scores, before, error_of(ground, candidate), watch.seconds
    )


def drop_several(ground: Ground, count: int) -> Several:
    """The ``count`` blocks of least recoverability dropped: adaptors trained around them, or all layers."""
    order = sorted(range(len(ground.blocks)), key=ground.scores[FAST].__getitem__)[:count]
    plan = Plan(drop_blocks=tuple(ground.blocks[number] for number in sorted(order)))
    candidate = graph.apply(ground.original, plan, ground.shape)
    before = error_of(ground, candidate)
    adapted = graph.with_adaptors(ground.original, plan, ground.shape)
    _train(ground, adapted, ground.adaptors)
    _train(ground, candidate, ground.recovery)
    return Several(
        ground.seed, count, plan.drop_blocks, before, error_of(ground, adapted), error_of(ground, candidate)
    )


def _train(ground: Ground, network: fx.GraphModule, how: Tune) -> None:
    tune.train(network, ground.original, ground.calibration, how, seed=ground.seed)


def error_of(ground: Ground, network: fx.GraphModule) -> Error:
    """How far a network is from the original on images that nothing has seen, and from the truth."""
    return Error(
        feature=tune.distance(network, ground.original, ground.held_out),
        disagreement=_apart(
            network, ground.held_out, tune.logits(ground.original, ground.held_out).argmax(1)
        ),
        test=_apart(network, ground.evaluation, ground.evaluation.labels),
    )


def _apart(network: fx.GraphModule, images: Images, wanted: torch.Tensor | None) -> float:
    assert wanted is not None
    return 1.0 - float((tune.logits(network, images).argmax(1) == wanted).float().mean())
