"""Accuracies along each dimension by iterative pruning and fine-tuning (Algorithm 1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from optpipe import graph
from optpipe.methods.three_d import importance
from optpipe.methods.three_d.config import DIMENSIONS, Config, Dimension
from optpipe.methods.three_d.ends import Axis
from optpipe.methods.three_d.images import Split
from optpipe.methods.three_d.space import Kept, Level, Share, Space, combined, counts
from optpipe.types import (
    Answer,
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
class Point:
    """A network that was fine-tuned, along which dimensions, in how many rounds, and what it scored."""

    dimensions: tuple[Dimension, ...]
    rounds: int
    level: Level
    share: Share
    plan: Plan
    quality: Quality


def tuning(recover: Tune, epochs: float, images: int) -> Tune:
    """The fine-tuning of a round: the recovery's own, for so many epochs.

    Where that has an ensemble of teachers the original alone speaks: no networks lead to the one at hand yet.
    """
    steps = max(1, math.ceil(epochs * images / min(recover.batch, images) - 1e-9))
    teachers: Literal["none", "single"] = "none" if recover.teachers == "none" else "single"
    return replace(recover, epochs=epochs, steps=steps, teachers=teachers)


@dataclass(frozen=True, slots=True)
class Stop:
    """A network that was trained on the way: where it lies, its plan, its weights, in how many rounds."""

    level: Level
    plan: Plan
    trained: Trained
    rounds: int


@dataclass(frozen=True, slots=True)
class Made:
    """How a network is made: its plan, and the training that it is made of; None is the original."""

    plan: Plan
    start: Start | None


@dataclass(frozen=True, slots=True)
class Walk:
    """One dimension on its way down: the levels to stop at, and the networks trained so far."""

    dimension: Dimension
    levels: tuple[Level, ...]
    done: list[Stop] = field(default_factory=list)

    @property
    def middle(self) -> Stop:
        """The network half way down."""
        return self.done[(len(self.done) - 1) // 2]


@dataclass(frozen=True, slots=True)
class Collection:
    """Makes the trainings of a search, and points of what they answer."""

    scene: Scene
    space: Space
    parts: Split
    tune: Tune

    def ask(self, plan: Plan, start: Stop | None) -> Train:
        """The training of a plan's network from where a stop's stands, scored."""
        begin = None if start is None else Start(start.trained.key, start.plan)
        return Train(plan, self.tune, self.parts.trained, begin, self.parts.score)

    def point(self, dimensions: Sequence[Dimension], stop: Stop) -> Point:
        """A training as a point for the predictor."""
        quality = stop.trained.quality
        assert quality is not None
        level = stop.level
        return Point(tuple(dimensions), stop.rounds, level, self.space.share(level), stop.plan, quality)

    def further(
        self, start: Stop | None, dimension: Dimension, level: Level
    ) -> Generator[Sequence[Request], Sequence[Answer], Plan]:
        """The plan that goes on along a dimension: what is least important where the network stands goes."""
        if start is None:
            return self.space.plan(level)
        if dimension == "resolution":
            return replace(start.plan, input_hw=self.space.size_of(level))
        if dimension == "width":
            return replace(start.plan, keep_channels=_narrower(self.space, start, level))
        gone = set(start.plan.drop_blocks)
        left = [name for name in self.space.units if name not in gone]
        trained = start.trained
        scores = yield from importance.probe(self.scene, trained.network, trained.digest, left, self.parts)
        more = {one.name for one in scores[: level.dropped - len(gone)]}
        return replace(start.plan, drop_blocks=self.space.in_order(gone | more))

    def towards(
        self, stops: Sequence[Stop], level: Level
    ) -> Generator[Sequence[Request], Sequence[Answer], Made]:
        """A network of this level: the nearest stop on the way to it, with the rest taken out of that.

        Of several stops equally near the one of most rounds; the original where none is on the way.
        """
        way = [stop for stop in stops if stop.level.is_within(level)]
        if not way:
            return Made(self.space.plan(level), None)
        end = sum(self.space.share(level))
        nearest = min(way, key=lambda stop: (sum(self.space.share(stop.level)) - end, -stop.rounds))
        reached = nearest
        for dimension in DIMENSIONS:
            if not level.equals(reached.level, dimension):
                plan = yield from self.further(reached, dimension, level)
                reached = replace(reached, plan=plan)
        return Made(reached.plan, Start(nearest.trained.key, nearest.plan))


def collect(
    making: Collection, axes: Sequence[Axis], config: Config
) -> Generator[Sequence[Request], Sequence[Answer], tuple[tuple[Point, ...], tuple[Stop, ...]]]:
    """The points (d, w, r, accuracy) on every axis, at (1, 1, 1), and between if wanted; all pruned networks.

    A round prunes and trains the network of the round before along each dimension; the dimensions' requests
    of a round are one batch, for they do not depend on each other. Deliberate deviations: the original is
    fine-tuned for a round too, since short trainings on few images cost accuracy by themselves, which no
    dimension is to be blamed for; and with ``config.inside`` the networks half way down go on half way down
    the next dimension, since points on the axes alone cannot tell a product from any other polynomial.
    """
    space = making.space
    walks = [Walk(axis.dimension, stops(space, axis, config.rounds)) for axis in axes]
    points: list[Point] = []
    for number in range(max(len(walk.levels) for walk in walks)):
        going = [walk for walk in walks if number < len(walk.levels)]
        asks: list[Train] = []
        for walk in going:
            start = walk.done[-1] if walk.done else None
            plan = yield from making.further(start, walk.dimension, walk.levels[number])
            asks.append(making.ask(plan, start))
        original = [making.ask(Plan(), None)] if number == 0 else []
        answers = cast("Sequence[Trained]", (yield [*original, *asks]))
        if original:
            whole = Stop(space.whole, Plan(), answers[0], 1)
            points.append(making.point((), whole))
        for walk, ask, trained in zip(going, asks, answers[len(original) :], strict=True):
            walk.done.append(Stop(walk.levels[number], ask.plan, trained, number + 1))
            points.append(making.point((walk.dimension,), walk.done[-1]))
    found = [stop for walk in walks for stop in walk.done]
    if config.inside:
        more = yield from _inside(making, walks)
        points += [making.point(dimensions, stop) for dimensions, stop in more]
        found += [stop for _, stop in more]
    return tuple(points), tuple(found)


def _inside(
    making: Collection, walks: Sequence[Walk]
) -> Generator[Sequence[Request], Sequence[Answer], list[tuple[tuple[Dimension, ...], Stop]]]:
    """Networks between each two axes, half way down both, and one between all three."""
    pairs = list(itertools.combinations(walks, 2))
    made: list[Stop] = []
    asks: list[tuple[Level, Train]] = []
    for one, other in pairs:
        level = combined([one.middle.level, other.middle.level])
        plan = yield from making.further(one.middle, other.dimension, level)
        asks.append((level, making.ask(plan, one.middle)))
    answers = cast("Sequence[Trained]", (yield [ask for _, ask in asks]))
    for (one, _), (level, ask), trained in zip(pairs, asks, answers, strict=True):
        made.append(Stop(level, ask.plan, trained, one.middle.rounds + 1))
    found: list[tuple[tuple[Dimension, ...], Stop]] = [
        ((one.dimension, other.dimension), stop) for (one, other), stop in zip(pairs, made, strict=True)
    ]
    if len(walks) > 2:
        start, last = made[0], walks[2]
        level = combined([start.level, last.middle.level])
        plan = yield from making.further(start, last.dimension, level)
        (answer,) = yield [making.ask(plan, start)]
        stop = Stop(level, plan, cast(Trained, answer), start.rounds + 1)
        found.append((tuple(walk.dimension for walk in walks), stop))
    return found


def stops(space: Space, axis: Axis, rounds: int) -> tuple[Level, ...]:
    """The levels of an axis next to ``rounds`` even steps from 1 to its end, each once (Algorithm 1)."""
    along = DIMENSIONS.index(axis.dimension)
    shares = [space.share(level)[along] for level in axis.levels]
    wanted = [1 - number * (1 - shares[-1]) / rounds for number in range(1, rounds + 1)]
    nearest = {min(range(len(shares)), key=lambda index: abs(shares[index] - x)) for x in wanted}
    return tuple(axis.levels[index] for index in sorted(nearest))


def halfway(space: Space, axes: Sequence[Axis], rounds: int) -> list[Level]:
    """Where the points between the axes lie."""
    middles = [found[(len(found) - 1) // 2] for found in (stops(space, axis, rounds) for axis in axes)]
    sizes = range(2, len(middles) + 1)
    return [combined(some) for size in sizes for some in itertools.combinations(middles, size)]


def _narrower(space: Space, start: Stop, level: Level) -> Kept:
    """Of the channels that a network still has, those of the largest scales there."""
    before, network = dict(start.plan.keep_channels), start.trained.network
    narrowed = graph.width_map(network, space.input_shape)
    names = [group.name for group in narrowed.groups]
    scores = dict(zip(names, graph.channel_scales(network, narrowed), strict=True))
    found = []
    wanted = counts(space.widths, level.ratio)
    for group, blocks, count in zip(space.widths.groups, space.widths.blocks, wanted, strict=True):
        standing = before.get(group.name, tuple(range(group.channels)))
        # A group that went with its block, or has one channel left in each run, is not among them.
        if count < len(standing) and group.name in scores:
            places = graph.keep_largest(scores[group.name], count, blocks)
            standing = tuple(standing[place] for place in places)
        if len(standing) < group.channels:
            found.append((group.name, standing))
    return tuple(found)
