"""Shows a run's events: bars on a terminal, plain lines elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from optpipe.types import Event

# A progress line at every tenth of the way is enough where lines cannot be overwritten.
PLAIN_STEPS = 10


class EventConsole:
    """Renders events; use as a context manager and pass its ``show`` as the run's ``emit``."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(file=sys.stderr, highlight=False, emoji=False)
        self._live = self._console.is_terminal and not quiet
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._bar: TaskID | None = None
        self._bar_name = ""
        self._stage = ""
        self._last_tenth = ("", -1)

    def __enter__(self) -> EventConsole:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, event: Event) -> None:
        """Render one event."""
        if event.kind == "stage":
            self._stage = event.name
            self._end_bar()
            took = f" in {event.seconds:.1f} s" if event.seconds is not None else ""
            self._line(f"[{event.done}/{event.total}] {event.name}: {event.detail}{took}")
        elif event.kind == "warning":
            self._line(f"warning: {event.name}: {event.detail}", always=True)
        elif event.kind == "note":
            self._line(f"  {event.name}: {event.detail}")
        elif self._live:
            self._advance(event)
        elif event.kind == "trial":
            took = f" {event.seconds:.1f} s" if event.seconds is not None else ""
            self._line(f"  {event.done}/{event.total} {event.name}: {event.detail}{took}")
        else:
            self._tenths(event)

    def _advance(self, event: Event) -> None:
        """Move the bar; a new batch of trials (its count begins anew) gets a new bar."""
        name = self._stage if event.kind == "trial" else event.name
        if self._bar is None or self._bar_name != name or (event.done == 1 and event.kind == "trial"):
            self._end_bar()
            self._bar, self._bar_name = self._bars.add_task(name, total=event.total), name
        text = f"{name}: {event.name}" if event.kind == "trial" else f"{name} {event.detail}"
        self._bars.update(self._bar, completed=event.done or 0, total=event.total, description=text[:60])

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        self._last_tenth = ("", -1)

    def _tenths(self, event: Event) -> None:
        if not event.total or event.done is None:
            return
        tenth = (event.name, event.done * PLAIN_STEPS // event.total)
        if tenth != self._last_tenth:
            self._last_tenth = tenth
            self._line(f"  {event.name} {event.done}/{event.total} {event.detail}")

    def _line(self, text: str, *, always: bool = False) -> None:
        if always or not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)
