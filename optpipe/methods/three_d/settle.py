"""From the predictor to a network that was built and meets the budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from optpipe.errors import RunError
from optpipe.methods._meter import Meter, Reading
from optpipe.methods.three_d import cost, optimum
from optpipe.methods.three_d.collect import Made
from optpipe.methods.three_d.config import DIMENSIONS, Config
from optpipe.methods.three_d.ends import Axis, Costed
from optpipe.methods.three_d.measured import MeasuredSurface, fit_measured
from optpipe.methods.three_d.points import Smooth
from optpipe.methods.three_d.predictor import Predictor
from optpipe.methods.three_d.space import Level, Share, Space
from optpipe.types import Answer, Request, Trial

Making = Callable[[Level], Generator[Sequence[Request], Sequence[Answer], Made]]
"""How a network of a level is made."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A network that was taken for the best, what was predicted of it, and what building it showed."""

    level: Level
    made: Made
    candidate: optimum.Candidate
    reading: Reading
    meets: bool

    @property
    def off(self) -> float:
        """The measured cost over the predicted one, less 1."""
        return self.reading.ratio / self.candidate.cost - 1


@dataclass(frozen=True, slots=True)
class Settled:
    """Where the corrections ended.

    ``surface`` is the cost surface that the last attempt was predicted by, ``optimum`` the continuous one on
    it within ``lower`` to 1, ``costed`` all networks that it was fitted to.
    """

    attempts: tuple[Attempt, ...]
    chosen: Attempt
    surface: Smooth
    optimum: optimum.Optimum
    lower: Share
    costed: tuple[Costed, ...]


def settle(
    space: Space,
    axes: Sequence[Axis],
    predictor: Predictor,
    costed: Sequence[Costed],
    meter: Meter,
    config: Config,
    making: Making,
) -> Generator[Sequence[Request], Sequence[Answer], Settled]:
    """Seek the optimum, build it, and seek again on a corrected surface until it costs what is allowed.

    A correction refits the surface with what was measured, and scales it to be exact there: the next optimum
    is mostly near. It ends where none is predicted to be better than one that met the budget. Of those that
    did, the one of the highest predicted accuracy is chosen.

    Raises:
        RunError: after the last correction none met the budget.
    """
    known = list(costed)
    attempts: list[Attempt] = []
    factor = 1.0
    # The whole interval must be within the budget, so the middle is sought as far below it as is usual here.
    aim = meter.allowed - _half_width(known)
    while True:
        surface = replace(surface_of(space, known, config), factor=factor)
        best = _best(space, axes, predictor, surface, aim, attempts)
        if best is None or len(attempts) > config.corrections:
            break
        level, candidate = best
        made = yield from making(level)
        (answer,) = yield [meter.ask(made.plan)]
        reading = meter.read(cast(Trial, answer))
        meets = meter.meets(reading) or config.cost == "formula"
        attempts.append(Attempt(level, made, candidate, reading, meets))
        if config.cost == "formula":
            break
        known.append(Costed(level, reading))
        factor = reading.ratio / float(surface_of(space, known, config)([candidate.point])[0])
        if not meets and reading.ratio <= meter.allowed:  # only the interval reaches beyond
            aim -= reading.high - meter.allowed
    meeting = [one for one in attempts if one.meets]
    if not meeting:
        raise RunError(_missed(attempts, meter, config))
    chosen = max(meeting, key=lambda one: one.candidate.value)
    lower = _lower(space, axes)
    found = optimum.optimise(predictor, surface, aim, lower, tuple(axis.dimension for axis in axes))
    return Settled(tuple(attempts), chosen, surface, found, lower, tuple(known))


def surface_of(space: Space, known: Sequence[Costed], config: Config) -> MeasuredSurface:
    """The cost surface of networks whose costs are known."""
    if config.cost == "formula":
        return MeasuredSurface(cost.formula())
    points = np.array([space.share(one.level) for one in known])
    return fit_measured(points, np.array([one.reading.ratio for one in known]))


def _half_width(known: Sequence[Costed]) -> float:
    return float(np.median([(one.reading.high - one.reading.low) / 2 for one in known])) if known else 0.0


def _lower(space: Space, axes: Sequence[Axis]) -> Share:
    low = [1.0, 1.0, 1.0]
    for axis in axes:
        along = DIMENSIONS.index(axis.dimension)
        low[along] = space.share(axis.end)[along]
    return (low[0], low[1], low[2])


def _best(
    space: Space,
    axes: Sequence[Axis],
    predictor: Predictor,
    surface: Smooth,
    aim: float,
    attempts: Sequence[Attempt],
) -> tuple[Level, optimum.Candidate] | None:
    """The network of the highest predicted accuracy that can be built and is predicted to meet the budget.

    None where it is predicted to be no better than one that was built and met it. Raises RunError where none
    was, and none is predicted to.
    """
    of = {axis.dimension: axis.choices for axis in axes}
    dropped = [0, *(level.dropped for level in of.get("depth", ()))]
    ratios = [1.0, *(level.ratio for level in of.get("width", ()))]
    sizes = [space.whole.size, *(level.size for level in of.get("resolution", ()))]
    every = (Level(*one) for one in itertools.product(dropped, ratios, sizes))
    levels = {space.share(level): level for level in every}
    d, w, r = (sorted(set(shares)) for shares in zip(*levels, strict=True))
    tried = [one.level for one in attempts]
    standing = max((one.candidate.value for one in attempts if one.meets), default=None)
    try:
        candidates = optimum.realisable(predictor, surface, aim, (d, w, r))
    except RunError:
        if standing is None:
            raise
        return None
    for candidate in candidates:
        level = levels[candidate.point]
        if level not in tried and level != space.whole:
            better = standing is None or candidate.value > standing
            return (level, candidate) if better else None
    return None


def _missed(attempts: Sequence[Attempt], meter: Meter, config: Config) -> str:
    least = min(attempts, key=lambda one: one.reading.high)
    return (
        f"no network met the budget after {len(attempts) - 1} corrections: the nearest leaves "
        f"{least.reading.ratio:.1%} ({least.reading.low:.1%} to {least.reading.high:.1%}) of the "
        f"{meter.what}, {meter.allowed:.1%} is allowed; lower the budget, measure longer, or allow more than "
        f"{config.corrections} corrections"
    )
