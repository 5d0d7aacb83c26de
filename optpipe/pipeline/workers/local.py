"""Worker processes on this machine.

Each is a fresh interpreter at the other end of a socket pair, which nobody else can reach. It dies with
the process that began it, and one that dies is replaced: its request is given to another.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

from optpipe import errors
from optpipe.errors import OptpipeError, RunError
from optpipe.lab.pool import Done
from optpipe.pipeline.workers.child import Child, died
from optpipe.pipeline.workers.replica import Assignment
from optpipe.types import Emit, Event

TRIES = 3
"""How many workers may die over one request before it is given up."""


class _Worker:
    """One process, and the request that it is at."""

    def __init__(self, name: str, assignment: Assignment, threads: int) -> None:
        self.name = name
        self.place: int | None = None
        self._child = Child("optpipe.pipeline.workers.process", {"OMP_NUM_THREADS": str(threads)})
        self.connection: Connection = self._child.connection
        self.connection.send(assignment)

    def give(self, batch: int, place: int) -> None:
        """Have it answer a request."""
        self.connection.send((batch, place))
        self.place = place

    def end(self) -> int:
        """End it now; returns its exit code."""
        return self._child.end()


class LocalPool:
    """A number of processes on this machine, each with its share of the cores."""

    least = 2
    """A single request is answered by the driver itself, which has all cores."""

    def __init__(self, assignment: Assignment, count: int, emit: Emit) -> None:
        self._assignment = assignment
        self._count = count
        self._emit = emit
        self._threads = max(1, (os.cpu_count() or 1) // count)
        self._workers: list[_Worker] = []
        self._begun = 0

    def compute(self, batch: int, wanted: Sequence[int], done: Done) -> None:
        """As :class:`~optpipe.lab.pool.Pool` says."""
        waiting, deaths = deque(wanted), Counter[int]()
        while waiting or self._busy():
            self._staff(min(self._count, len(waiting) + len(self._busy())))
            for worker in tuple(self._workers):
                if waiting and worker.place is None:
                    try:
                        worker.give(batch, waiting[0])
                    except OSError:  # it died while it had nothing to do
                        self._bury(worker)
                    else:
                        waiting.popleft()
            if not self._busy():
                continue
            for ready in wait([worker.connection for worker in self._workers]):
                worker = next(one for one in self._workers if one.connection is ready)
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    place = self._bury(worker)
                    if place is not None:
                        deaths[place] += 1
                        self._refuse_endless(deaths[place])
                        waiting.appendleft(place)
                    continue
                self._hear(worker, message, done)

    def close(self) -> None:
        """As :class:`~optpipe.lab.pool.Pool` says."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.place is not None]

    def _staff(self, count: int) -> None:
        while len(self._workers) < count:
            self._begun += 1
            self._workers.append(_Worker(f"worker {self._begun}", self._assignment, self._threads))

    def _bury(self, worker: _Worker) -> int | None:
        """Take a dead worker out; returns the request that it was at."""
        self._workers.remove(worker)
        self._emit(Event("warning", worker.name, f"died ({died(worker.end())}); another takes its place"))
        return worker.place

    def _refuse_endless(self, deaths: int) -> None:
        if deaths >= TRIES:
            raise RunError(
                f"[run] workers: {deaths} workers died over one request, perhaps for want of memory; take "
                'fewer workers, or workers = "serial"'
            )

    def _hear(self, worker: _Worker, message: tuple[object, ...], done: Done) -> None:
        match message:
            case ("event", Event() as event):
                if event.kind in {"progress", "warning"}:
                    self._emit(event)
            case ("done",):
                assert worker.place is not None
                place, worker.place = worker.place, None
                done(place, worker.name)
            case ("failed", str(kind), str(said)):
                known = getattr(errors, kind, None)
                error: OptpipeError = (
                    known(said)
                    if isinstance(known, type) and issubclass(known, OptpipeError)
                    else RunError(f"{worker.name}: {kind}: {said}")
                )
                raise error
            case _:
                raise RunError(f"{worker.name}: said {message!r}, which means nothing")
