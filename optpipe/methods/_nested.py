"""The largest network of a nested family that meets the budget as it is built, found with few builds."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

from optpipe.errors import RunError
from optpipe.methods._meter import Meter, Reading
from optpipe.types import Answer, Plan, Request, Trial


@dataclass(frozen=True, slots=True)
class Tried:
    """The member of this index, as it was built or counted."""

    index: int
    plan: Plan
    trial: Trial
    reading: Reading
    meets: bool


def largest(
    predicted: Sequence[float], plan_of: Callable[[int], Plan], meter: Meter, builds: int, mend: str
) -> Generator[Sequence[Request], Sequence[Answer], tuple[Tried, tuple[Tried, ...]]]:
    """The largest member that meets the budget as it is built, and all that were tried, largest first.

    ``predicted`` are the costs of all members, at least one, falling. The search begins where the cost is
    predicted to meet the budget, goes on in growing strides until one member meets it and a larger one does
    not, and halves what is between them.

    Raises:
        RunError: not even the smallest meets it, or none of those that were tried; ends with ``mend``.
    """
    tried: dict[int, Tried] = {}

    def attempt(index: int) -> Generator[Sequence[Request], Sequence[Answer], bool]:
        plan = plan_of(index)
        (answer,) = yield [meter.ask(plan)]
        trial = cast(Trial, answer)
        reading = meter.read(trial)
        tried[index] = Tried(index, plan, trial, reading, meter.meets(reading))
        return tried[index].meets

    last = len(predicted) - 1
    at = next((index for index, cost in enumerate(predicted) if cost <= meter.allowed), last)
    meets = yield from attempt(at)
    above, below = (-1, at) if meets else (at, len(predicted))  # the last too large, the first small enough
    stride = 1
    while len(tried) < builds and below - above > 1:
        if below == len(predicted):
            at = min(last, above + stride)
        elif above == -1:
            at = max(0, below - stride)
        else:
            at = (above + below) // 2
        stride *= 2
        if (yield from attempt(at)):
            below = at
        else:
            above = at
    order = tuple(tried[index] for index in sorted(tried))
    if below == len(predicted):
        least = min(order, key=lambda one: one.reading.high)
        reading, which = least.reading, "" if last in tried else "that was tried "
        raise RunError(
            f"no network of the family meets the budget: the smallest {which}leaves "
            f"{reading.ratio:.1%} ({reading.low:.1%} to {reading.high:.1%}) of the "
            f"{meter.what}, {meter.allowed:.1%} is allowed; {mend}"
        )
    return tried[below], order
