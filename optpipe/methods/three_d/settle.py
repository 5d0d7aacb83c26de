"""From the predictor to a network that was built and meets the budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from optpipe.errors import RunError
from optpipe.methods.three_d import cost, optimum
from optpipe.methods.three_d.collect import Made
from optpipe.methods.three_d.config import DIMENSIONS, Config
from optpipe.methods.three_d.ends import Axis, Costed
from optpipe.methods.three_d.measured import MeasuredSurface, fit_measured
from optpipe.methods.three_d.meter import Meter, Reading
from optpipe.methods.three_d.points import Smooth
from optpipe.methods.three_d.predictor import Predictor
from optpipe.methods.three_d.space import Level, Share, Space
from optpipe.types import Answer, Request, Trial

Making = Callable[[Level], Generator[Sequence[Request], Sequence[Answer], Made]]
"""How a network of a level is made."""

CLOSE = 0.02
"""A network of which the cost is predicted as closely, relative to its own, needs no correction."""


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
    is mostly near. Of the networks that met the budget the one of the highest predicted accuracy is chosen.

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
        try:
            best = _best(space, axes, predictor, surface, aim, [one.level for one in attempts])
        except RunError:
            if not any(one.meets for one in attempts):
                raise
            best = None
        if best is None:
            break  # all that are predicted to meet it were built
        level, candidate = best
        made = yield from making(level)
        (answer,) = yield [meter.ask(made.plan)]
        reading = meter.read(cast(Trial, answer))
        meets = meter.meets(reading) or config.cost == "formula"
        attempt = Attempt(level, made, candidate, reading, meets)
        attempts.append(attempt)
        close = abs(attempt.off) <= CLOSE
        if config.cost == "formula" or (meets and close) or len(attempts) > config.corrections:
            break
        known.append(Costed(level, reading))
        refitted = surface_of(space, known, config)
        factor = reading.ratio / float(refitted([candidate.point])[0])
        if not meets and close:  # only the interval reaches beyond: aim a little lower
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
    tried: Sequence[Level],
) -> tuple[Level, optimum.Candidate] | None:
    """The network of the highest predicted accuracy that can be built and is predicted to meet the budget.

    None where all of them were tried.
    """
    of = {axis.dimension: axis.choices for axis in axes}
    dropped = [0, *(level.dropped for level in of.get("depth", ()))]
    ratios = [1.0, *(level.ratio for level in of.get("width", ()))]
    sizes = [space.whole.size, *(level.size for level in of.get("resolution", ()))]
    levels = {
        space.share(level): level
        for level in (Level(*one) for one in itertools.product(dropped, ratios, sizes))
    }
    d, w, r = (sorted(set(shares)) for shares in zip(*levels, strict=True))
    for candidate in optimum.realisable(predictor, surface, aim, (d, w, r)):
        level = levels[candidate.point]
        if level not in tried and level != space.whole:
            return level, candidate
    return None


def _missed(attempts: Sequence[Attempt], meter: Meter, config: Config) -> str:
    least = min(attempts, key=lambda one: one.reading.high)
    return (
        f"no network met the budget after {len(attempts) - 1} corrections: the nearest leaves "
        f"{least.reading.ratio:.1%} ({least.reading.low:.1%} to {least.reading.high:.1%}) of the "
        f"{meter.what}, {meter.allowed:.1%} is allowed; lower the budget, measure longer, or allow more than "
        f"{config.corrections} corrections"
    )
