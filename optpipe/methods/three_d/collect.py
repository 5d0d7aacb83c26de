"""Accuracies along each dimension by iterative pruning and fine-tuning (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from optpipe import graph
from optpipe.methods.three_d import importance
from optpipe.methods.three_d.config import DIMENSIONS, Dimension
from optpipe.methods.three_d.ends import Axis
from optpipe.methods.three_d.space import Kept, Level, Share, Space, counts
from optpipe.types import (
    Answer,
    Images,
    Plan,
    Quality,
    Request,
    Scene,
    Start,
    Train,
    Trained,
    Tune,
)


@dataclass(frozen=True, slots=True)
class Split:
    """The calibration images that trainings see, and those on which their accuracy is taken."""

    fit: tuple[int, ...]
    score: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """A network that was fine-tuned, where it lies, what it scored; ``dimension`` is None at (1, 1, 1)."""

    dimension: Dimension | None
    round: int
    level: Level
    share: Share
    plan: Plan
    quality: Quality


def split(images: Images, share: float, seed: int) -> Split:
    """That share of the images of each class to score, at least one of each, drawn by the seed."""
    assert images.labels is not None
    labels = images.labels.numpy()
    rng = np.random.default_rng(seed)
    fit: list[int] = []
    score: list[int] = []
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label)).tolist()
        count = min(max(1, round(share * len(own))), len(own) - 1)
        score += own[:count]
        fit += own[count:]
    return Split(tuple(sorted(fit)), tuple(sorted(score)))


def tuning(recover: Tune, epochs: float, images: int) -> Tune:
    """The fine-tuning of a round: the recovery's own, for so many epochs, without teachers."""
    steps = max(1, math.ceil(epochs * images / min(recover.batch, images) - 1e-9))
    return replace(recover, epochs=epochs, steps=steps, teachers="none")


@dataclass(slots=True)
class Walk:
    """One dimension on its way down: the network where it stands."""

    dimension: Dimension
    levels: tuple[Level, ...]
    plan: Plan
    last: Trained | None = None

    @property
    def start(self) -> Start | None:
        """Where the next training starts."""
        return None if self.last is None else Start(self.last.key, self.plan)


def collect(
    scene: Scene, space: Space, axes: Sequence[Axis], parts: Split, rounds: int, epochs: float
) -> Generator[Sequence[Request], Sequence[Answer], tuple[Point, ...]]:
    """The points (d, w, r, accuracy) along every axis, and at (1, 1, 1).

    A round prunes and trains the network of the round before along each dimension; the dimensions' requests
    of a round are one batch, for they do not depend on each other. Deliberate deviation: the original is
    fine-tuned for a round too, since short trainings on few images cost accuracy by themselves, which no
    dimension is to be blamed for.
    """
    walks = [Walk(axis.dimension, stops(space, axis, rounds), Plan()) for axis in axes]
    tune = tuning(scene.recover, epochs, len(parts.fit))
    points: list[Point] = []
    for number in range(max(len(walk.levels) for walk in walks)):
        going = [walk for walk in walks if number < len(walk.levels)]
        plans: list[Plan] = []
        for walk in going:
            plans.append((yield from _next(scene, space, walk, walk.levels[number], parts)))
        asks = [
            Train(plan, tune, parts.fit, walk.start, parts.score)
            for walk, plan in zip(going, plans, strict=True)
        ]
        original = [Train(Plan(), tune, parts.fit, None, parts.score)] if number == 0 else []
        answers = cast("Sequence[Trained]", (yield [*original, *asks]))
        if original:
            points.append(_point(space, None, 0, space.whole, Plan(), answers[0]))
        for walk, plan, trained in zip(going, plans, answers[len(original) :], strict=True):
            walk.plan, walk.last = plan, trained
            level = walk.levels[number]
            points.append(_point(space, walk.dimension, number + 1, level, plan, trained))
    return tuple(points)


def stops(space: Space, axis: Axis, rounds: int) -> tuple[Level, ...]:
    """The levels of an axis next to ``rounds`` even steps from 1 to its end, each once (Algorithm 1)."""
    along = DIMENSIONS.index(axis.dimension)
    shares = [space.share(level)[along] for level in axis.levels]
    wanted = [1 - number * (1 - shares[-1]) / rounds for number in range(1, rounds + 1)]
    nearest = {min(range(len(shares)), key=lambda index: abs(shares[index] - x)) for x in wanted}
    return tuple(axis.levels[index] for index in sorted(nearest))


def _point(
    space: Space, dimension: Dimension | None, number: int, level: Level, plan: Plan, trained: Trained
) -> Point:
    assert trained.quality is not None
    return Point(dimension, number, level, space.share(level), plan, trained.quality)


def _next(
    scene: Scene, space: Space, walk: Walk, level: Level, parts: Split
) -> Generator[Sequence[Request], Sequence[Answer], Plan]:
    """The plan of a walk's next network, what goes being least important where the walk stands."""
    if walk.last is None:
        return space.plan(level)
    if walk.dimension == "resolution":
        return Plan(input_hw=space.size_of(level))
    if walk.dimension == "width":
        return Plan(keep_channels=_narrower(space, walk, level))
    gone = set(walk.plan.drop_blocks)
    left = [name for name in space.units if name not in gone]
    scores = yield from importance.probe(scene, walk.last.network, walk.last.digest, left, parts)
    more = {one.name for one in scores[: level.dropped - len(gone)]}
    return Plan(space.in_order(gone | more))


def _narrower(space: Space, walk: Walk, level: Level) -> Kept:
    """Of the channels that the network still has, those of the largest scales there."""
    assert walk.last is not None
    before = dict(walk.plan.keep_channels)
    narrowed = graph.width_map(walk.last.network, space.input_shape)
    scores = dict(
        zip(
            [group.name for group in narrowed.groups],
            graph.channel_scales(walk.last.network, narrowed),
            strict=True,
        )
    )
    found = []
    wanted = counts(space.widths, level.ratio)
    for group, blocks, count in zip(space.widths.groups, space.widths.blocks, wanted, strict=True):
        standing = before.get(group.name, tuple(range(group.channels)))
        # A group of a single channel in each run can no longer be narrowed, and is then not among them.
        if count < len(standing) and group.name in scores:
            places = graph.keep_largest(scores[group.name], count, blocks)
            standing = tuple(standing[place] for place in places)
        if len(standing) < group.channels:
            found.append((group.name, standing))
    return tuple(found)
