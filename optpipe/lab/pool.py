"""Who computes answers beside the process that drives a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

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
