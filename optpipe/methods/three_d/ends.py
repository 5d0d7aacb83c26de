"""How far each dimension alone must go to meet the budget, and what its networks cost on the way."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

from optpipe.methods._meter import Meter, Reading
from optpipe.methods.three_d import cost as cost_model
from optpipe.methods.three_d.config import Dimension
from optpipe.methods.three_d.space import Level, Space
from optpipe.types import Answer, Request, Trial


@dataclass(frozen=True, slots=True)
class Costed:
    """A network that can be built, and what it costs."""

    level: Level
    reading: Reading


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension from the mildest network down to the first that meets the budget alone.

    ``levels`` are all that lie between, ``choices`` those of them that the result may have; ``costed`` are
    those whose cost was taken, mildest first. Where even the strongest misses the budget, ``meets`` is False
    and the last level is the strongest.
    """

    dimension: Dimension
    levels: tuple[Level, ...]
    choices: tuple[Level, ...]
    costed: tuple[Costed, ...]
    meets: bool

    @property
    def end(self) -> Level:
        """The lower end: no optimum lies beyond it."""
        return self.levels[-1]


def find(
    space: Space, dimension: Dimension, meter: Meter
) -> Generator[Sequence[Request], Sequence[Answer], Axis]:
    """The axis of a dimension, by bisection: a network costs no more than one that has less taken out.

    Where noise breaks that rule the end found is one of several that the noise leaves open.
    """
    levels = space.levels(dimension)
    costs: dict[int, Reading] = {}
    low, high = 0, len(levels) - 1
    while True:
        middle = (low + high) // 2 if high in costs else high
        costs[middle] = yield from cost(space, levels[middle], meter)
        if middle == high and not meter.meets(costs[high]):
            break  # only the strongest is ever asked without being known to meet it
        if meter.meets(costs[middle]):
            high = middle
        else:
            low = middle + 1
        if low == high and high in costs:
            break
    costed = tuple(Costed(levels[index], costs[index]) for index in sorted(costs) if index <= high)
    within = levels[: high + 1]
    return Axis(dimension, within, within, costed, meter.meets(costs[high]))


def widths(space: Space, meter: Meter) -> Generator[Sequence[Request], Sequence[Answer], Axis]:
    """The axis of the width with every ratio measured, and only those that pay as its choices.

    Engines work in blocks of channels: a ratio pays where it is clearly faster than every larger one.
    """
    levels = space.levels("width")
    trials = yield [meter.ask(space.plan(level)) for level in levels]
    costed = tuple(
        Costed(level, meter.read(cast(Trial, trial))) for level, trial in zip(levels, trials, strict=True)
    )
    paying = clearly_lower(costed)
    meeting = [one.level for one in paying if meter.meets(one.reading)]
    end = meeting[0] if meeting else levels[-1]
    within = levels[: levels.index(end) + 1]
    choices = tuple(one.level for one in paying if one.level in within)
    return Axis("width", within, choices, costed, bool(meeting))


def by_formula(space: Space, dimension: Dimension, allowed: float) -> Axis:
    """The axis down to where d w^2 r^2 is what is allowed: T, or its root (Algorithm 1)."""
    levels = space.levels(dimension)
    costs = cost_model.formula()([space.share(level) for level in levels])
    meeting = [index for index, ratio in enumerate(costs) if ratio <= allowed + 1e-9]
    within = levels[: meeting[0] + 1] if meeting else levels
    return Axis(dimension, within, within, (), bool(meeting))


def clearly_lower(costed: Sequence[Costed]) -> tuple[Costed, ...]:
    """Those that are cheaper than every one before them by more than the intervals."""
    found: list[Costed] = []
    best = 1.0
    for one in costed:
        if one.reading.high < best:
            found.append(one)
            best = one.reading.low
    return tuple(found)


def cost(space: Space, level: Level, meter: Meter) -> Generator[Sequence[Request], Sequence[Answer], Reading]:
    """What one network costs."""
    (answer,) = yield [meter.ask(space.plan(level))]
    return meter.read(cast(Trial, answer))
