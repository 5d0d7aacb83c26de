"""What a run would take with more workers, from how long each of its requests took in one process.

What is simulated is what ``[run] workers`` does: the requests of a batch that wait go to whoever is free, in
their order; the first that a worker is given makes it start; once all are answered, the driver times what is
to be timed, one engine after the other, and asks for the next batch. What it leaves out: the replay of
answered batches in each worker, and the time that a file takes from one machine to another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """Seconds of what a worker can do of a request, and of what only the target can: its timing."""

    name: str
    compute_s: float
    timing_s: float


Batch = tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """A recorded run. ``start_s`` is what a worker needs before it computes: interpreter, network, images.

    ``factor`` is what the seconds of computing were multiplied by where fewer steps were recorded than the
    recipe asks for, in the search and in the recovery.
    """

    name: str
    recorded: str
    factor: float
    start_s: float
    before_s: float
    batches: tuple[Batch, ...]
    recover_s: float
    after_s: float

    @property
    def compute_s(self) -> float:
        """Of all requests together."""
        return sum(request.compute_s for batch in self.batches for request in batch)

    @property
    def timing_s(self) -> float:
        """Of all requests together."""
        return sum(request.timing_s for batch in self.batches for request in batch)

    @property
    def rest_s(self) -> float:
        """What is no part of the search."""
        return self.before_s + self.recover_s + self.after_s


@dataclass(frozen=True, slots=True)
class Simulated:
    """Seconds of a search with so many workers, and what they went by on.

    ``queued_s`` is computing while a request of the batch waits for a worker, ``last_s`` computing once none
    does, ``start_s`` waiting for the first worker to be there. With ``meanwhile`` engines are timed while others compute;
    then these overlap and do not add up to ``search_s``.
    """

    workers: int
    meanwhile: bool
    search_s: float
    start_s: float
    queued_s: float
    last_s: float
    timing_s: float


def simulate(workload: Workload, workers: int, *, meanwhile: bool = False) -> Simulated:
    """The search of a workload with so many workers; 1 is the driver itself, which is there already."""
    started = 0
    search = start = queued = last = timed = 0.0
    for batch in workload.batches:
        waiting = [request.compute_s for request in batch if request.compute_s > 0]
        timing = sum(request.timing_s for request in batch)
        count = min(workers, len(waiting))
        fresh = 0 if workers == 1 else max(0, count - started)
        started += fresh
        free = [0.0] * (count - fresh) + [workload.start_s] * fresh
        taken, done = _computed(waiting, free)
        first = min(free, default=0.0)
        search += max(done, timing) if meanwhile else done + timing
        start += first
        queued += max(0.0, taken - first)
        last += done - max(taken, first)
        timed += timing
    return Simulated(workers, meanwhile, search, start, queued, last, timed)


def _computed(waiting: Sequence[float], free: Sequence[float]) -> tuple[float, float]:
    """When the last request is taken and when all are done; workers are free from these moments on.

    Whoever is free takes the next request. One that starts is taken to come with a request already.
    """
    ready, taken, done = list(free), 0.0, 0.0
    heapq.heapify(ready)
    for number, seconds in enumerate(waiting):
        begun = heapq.heappop(ready)
        taken = begun if number >= len(free) else 0.0
        done = max(done, begun + seconds)
        heapq.heappush(ready, begun + seconds)
    return taken, done


def bottleneck(workload: Workload, found: Simulated) -> str:
    """What most of a run's seconds go by on, with so many workers."""
    parts = {
        "computing that more workers would share": found.queued_s,
        "requests that are already on a worker": found.last_s,
        "workers that start": found.start_s,
        "timing on the one target": found.timing_s,
        "the recovery": workload.recover_s,
        "ingest, export and benchmark": workload.before_s + workload.after_s,
    }
    return max(parts, key=lambda part: parts[part])
