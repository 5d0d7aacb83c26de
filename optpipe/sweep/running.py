"""One run of a sweep after the other; one that fails is told of, and does not end it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optpipe import interruption, pipeline, store, timing
from optpipe.errors import OptpipeError, lacks_memory
from optpipe.sweep.planning import Entry, Sweep
from optpipe.sweep.summary import State
from optpipe.types import Emit, Event


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run: it has a report, or ``failed`` says in a line why not, and ``trace`` where.

    ``state`` is "not yet" for a run that was not come to. ``seconds`` is the wall time of this sitting.
    """

    entry: Entry
    state: State
    seconds: float = 0.0
    failed: str = ""
    trace: str = ""


@contextlib.contextmanager
def begun(sweep: Sweep, *, fresh: bool) -> Iterator[None]:
    """Hold the sweep's folder; with ``fresh`` what runs had from each other is moved aside.

    Raises:
        UsageError: another sweep runs in the folder, or it cannot be made.
    """
    with store.locked(sweep.out.resolve()):
        if fresh:
            store.move_aside(sweep.cache)
        yield


def take(entry: Entry, sweep: Sweep, *, fresh: bool, emit: Emit) -> Outcome:
    """Take one run to its end, from where it was; what goes wrong in it is its outcome.

    A failure is no answer: when the sweep is given again the run is tried again.
    """
    place = sweep.entries.index(entry) + 1
    emit(Event("note", "sweep", f"run {place} of {len(sweep.entries)}: {entry.name}"))
    watch = timing.Stopwatch()
    try:
        pipeline.run(entry.setup, entry.folder, fresh=fresh, emit=emit, shared=sweep.cache)
    except Exception as error:  # memory that ran out, say, is no reason to lose the other runs
        if interruption.has_come():
            raise
        told = str(error)
        if not isinstance(error, OptpipeError):
            told = f"unexpected {type(error).__name__}: {' '.join(told.split())[:300]}"
            if lacks_memory(error):
                told = "this takes more memory than there is"
        return Outcome(entry, "failed", watch.seconds, told, traceback.format_exc())
    return Outcome(entry, "finished", watch.seconds)


def waiting(sweep: Sweep, done: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """The outcomes with those of the runs that were not come to."""
    seen = {outcome.entry.name for outcome in done}
    rest = [Outcome(entry, "not yet") for entry in sweep.entries if entry.name not in seen]
    return (*done, *rest)
