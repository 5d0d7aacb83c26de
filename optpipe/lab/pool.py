"""Who computes answers beside the process that drives a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from optpipe.lab.names import request_name
from optpipe.types import Emit, Event, Request

Done = Callable[[int, str], None]
"""Called with a request's place in its batch and the name of the worker that has answered it."""


class Pool(Protocol):
    """Workers that replay the same search against the same store, and so know every request by its place."""

    @property
    def least(self) -> int:
        """Fewer requests than these are not worth handing over."""

    def compute(self, batch: int, wanted: Sequence[int], done: Done) -> None:
        """Have these requests of a batch answered in the store; returns when all are.

        Raises:
            OptpipeError: a request failed, or every worker that tried it died.
        """

    def close(self) -> None:
        """End the workers at once; what they stored stays."""


def hand_over(
    pool: Pool, batch: int, requests: Sequence[Request], awaited: Sequence[bool], emit: Emit
) -> None:
    """Have a pool answer those requests of a batch that are ``awaited``, if they are worth it."""
    wanted = [place for place, waits in enumerate(awaited) if waits]
    if len(wanted) < pool.least:
        return
    count, answered = len(wanted), 0
    emit(Event("note", "workers", f"{count} requests are handed over"))

    def done(place: int, worker: str) -> None:
        nonlocal answered
        answered += 1
        emit(Event("trial", request_name(requests[place]), f"computed by {worker}", answered, count))

    pool.compute(batch, wanted, done)
