"""Shows a run's events: a panel on a terminal, plain lines elsewhere. Everything goes to stderr.

The panel is drawn when an event arrives and at no other time: no thread of it runs while an engine is
timed. Its clock stands still between events.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live

from optpipe.console.panel import Panel
from optpipe.console.watched import Watched
from optpipe.types import Event

# A progress line at every tenth of the way is enough where lines cannot be overwritten.
PLAIN_STEPS = 10
REDRAW_S = 0.1
"""Steps of a training that come faster than this are not each drawn."""


class EventConsole:
    """Renders events; use as a context manager and pass its ``show`` as the run's ``emit``.

    ``clock`` gives seconds.
    """

    def __init__(self, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet = quiet
        self._clock = clock
        self._console = Console(file=sys.stderr, highlight=False, emoji=False)
        self._drawn = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet
        self._watched = Watched(clock())
        self._live: Live | None = None
        self._drawn_at = float("-inf")
        self._last_tenth = ("", -1)

    def __enter__(self) -> EventConsole:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, event: Event) -> None:
        """Render one event."""
        now = self._clock()
        self._watched.see(event, now)
        if event.kind == "stage":
            self._last_tenth = ("", -1)
            took = f" in {event.seconds:.1f} s" if event.seconds is not None else ""
            self._line(f"[{event.done}/{event.total}] {event.name}: {event.detail}{took}")
        elif event.kind == "warning":
            self._line(f"warning: {event.name}: {event.detail}", always=True)
        elif event.kind == "note":
            self._line(f"  {event.name}: {event.detail}")
        elif self._drawn:
            self._draw(now, hurried=event.kind != "begin" and event.done != event.total)
            return
        elif event.kind == "trial":
            took = f" {event.seconds:.1f} s" if event.seconds is not None else ""
            self._line(f"  {event.done}/{event.total} {event.name}: {event.detail}{took}")
        elif event.kind == "progress":
            self._tenths(event)
        if self._drawn:
            self._draw(now)

    def _draw(self, now: float, *, hurried: bool = False) -> None:
        """Draw the panel anew; where ``hurried``, not if it was just drawn."""
        if not self._watched.begun or (hurried and now - self._drawn_at < REDRAW_S):
            return
        self._drawn_at = now
        panel = Panel(self._watched, now)
        if self._live is None:
            self._live = Live(panel, console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(panel, refresh=True)

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
