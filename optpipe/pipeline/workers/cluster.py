"""Workers on a Ray cluster, all of which see the run's folder under the same path.

Ray places them, tells when one dies and carries the places of requests to them, no tensor. Timing stays
with the process that drives the search: start it on the machine that is the target.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from optpipe import errors
from optpipe.errors import MissingError, OptpipeError, RunError
from optpipe.lab.pool import Done
from optpipe.pipeline.workers.replica import Assignment, Replica
from optpipe.types import Emit, Event

TRIES = 3
"""How many workers may die over one request before it is given up."""
LEAVE_S = 5.0
"""How long workers have to remove what they keep of their own."""
ASK_AGAIN_S = 2.0
"""How long to wait for an answer before looking whether the cluster has room for more workers."""


def installed() -> Any:
    """The module ray. MissingError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise MissingError(
            '[run] workers = "ray": the package ray is not installed; pip install "optpipe[ray]"'
        ) from None
    return ray


def join(address: str) -> Any:
    """The module ray, joined to the cluster at ``address``.

    Raises:
        MissingError: Ray is not installed, or no cluster listens there.
    """
    ray = installed()
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingError(
            f'[run] address = "{address}": no Ray cluster answers there: {one_line(error)}; begin one with '
            "ray start --head, on one of its machines"
        ) from None
    return ray


def _knock(address: str) -> None:
    """OSError where nobody listens at HOST:PORT: Ray itself would wait there for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def refuse_small(ray: Any, needs: Mapping[str, float]) -> int:
    """How many workers a cluster can hold that take ``needs``; RunError where it cannot hold a single one."""
    whole = ray.cluster_resources()
    room = min(int(whole.get(name, 0.0) / need) for name, need in needs.items() if need)
    if not room:
        there, asked = (
            f"{have.get('CPU', 0.0):g} cores and {have.get('GPU', 0.0):g} GPUs" for have in (whole, needs)
        )
        raise RunError(
            f"[run] workers: the cluster has {there}, and a worker takes {asked}; set worker_cpus and "
            "worker_gpus"
        )
    return room


class Remote:
    """What Ray runs on a node: a replica that is made with its first request."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._replica: Replica | None = None

    def here(self) -> bool:
        """Answers once the worker has its place in the cluster."""
        return True

    def compute(self, batch: int, place: int) -> tuple[str, str, str]:
        """Answer a request; returns the node's name, and the kind and text of an error, empty if none."""
        node = socket.gethostname()
        try:
            self._replica = self._replica or Replica(self._assignment, _tell_nobody)
            self._replica.compute(batch, place)
        except OptpipeError as error:
            return node, type(error).__name__, str(error)
        return node, "", ""

    def leave(self) -> None:
        """Remove what it keeps of its own, before it ends."""
        if self._replica is not None:
            self._replica.close()
            self._replica = None


def _tell_nobody(event: Event) -> None:
    """A worker's progress stays with it; what it has answered is told by the driver."""


class RayPool:
    """As many workers as the cluster has room for, and more as it grows."""

    least = 1
    """The cluster's machines are larger than the driver's, or else it would not be asked."""

    def __init__(self, assignment: Assignment, address: str, cpus: int, gpus: float, emit: Emit) -> None:
        """Join the cluster at ``address``; each worker takes ``cpus`` cores and ``gpus`` GPUs of it.

        Raises:
            MissingError: Ray is not installed, or no cluster listens there.
        """
        ray = join(address)
        self._ray: Any = ray
        self._emit = emit
        self._needs = {"CPU": float(cpus), "GPU": float(gpus)}
        self._assignment = ray.put(assignment)
        self._kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Remote)
        self._workers: list[Any] = []
        self._coming: dict[Any, Any] = {}

    def compute(self, batch: int, wanted: Sequence[int], done: Done) -> None:
        """As :class:`~optpipe.lab.pool.Pool` says."""
        waiting, deaths = deque(wanted), Counter[int]()
        running: dict[Any, tuple[Any, int]] = {}
        while waiting or running:
            busy = [worker for worker, _ in running.values()]
            self._staff(len(waiting) + len(busy))
            for worker in self._workers:
                if waiting and worker not in busy:
                    place = waiting.popleft()
                    running[worker.compute.remote(batch, place)] = worker, place
            ready, _ = self._ray.wait([*running, *self._coming], timeout=ASK_AGAIN_S)
            for reference in ready:
                if reference in self._coming:
                    self._welcome(reference)
                    continue
                worker, place = running.pop(reference)
                try:
                    node, kind, said = self._ray.get(reference)
                except self._ray.exceptions.RayActorError as error:
                    self._workers.remove(worker)
                    deaths[place] += 1
                    self._mourn(deaths[place], error)
                    waiting.appendleft(place)
                    continue
                if kind:
                    raise getattr(errors, kind, RunError)(f"{node}: {said}")
                done(place, f"a worker on {node}")

    def close(self) -> None:
        """As :class:`~optpipe.lab.pool.Pool` says."""
        if self._workers:
            # Who is at a request hears this too late, and leaves its folder to the machine's own cleaning.
            leaving = [worker.leave.remote() for worker in self._workers]
            self._ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_S)
        for worker in (*self._workers, *self._coming.values()):
            self._ray.kill(worker)
        self._workers.clear()
        self._coming.clear()
        self._ray.shutdown()

    def _staff(self, count: int) -> None:
        """Ask for as many workers as the cluster can hold; RunError where it cannot hold a single one.

        Whether a worker has its place is known when it comes: others may use the cluster too.
        """
        room = refuse_small(self._ray, self._needs)
        while len(self._workers) + len(self._coming) < min(count, room):
            worker: Any = self._kind.remote(self._assignment)
            self._coming[worker.here.remote()] = worker

    def _welcome(self, reference: Any) -> None:
        """Take a worker on that has its place, unless it died on the way."""
        worker = self._coming.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._emit(Event("warning", "workers", f"one did not come: {one_line(error)}"))
        else:
            self._workers.append(worker)

    def _mourn(self, deaths: int, error: BaseException) -> None:
        self._emit(
            Event("warning", "workers", f"one died; another takes its request over: {one_line(error)}")
        )
        if deaths >= TRIES:
            raise RunError(f"[run] workers: {deaths} workers died over one request: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """What an error of Ray says, which may be pages."""
    return " ".join(str(error).split())[:200]
