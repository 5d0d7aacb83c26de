"""The panel that a terminal shows while a run is at work. Pure: from what was watched to what is drawn."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from optpipe import store
from optpipe.console.watched import Left, Saving, Watched

NARROW = 74
"""Columns of the panel below which the stages that do not run are shown by their marks alone."""
WIDEST = 100
ECHO = len("^C")
"""Columns left free behind the panel: a terminal shows there that Ctrl-C was pressed, and not below it."""
MARKS = {"done": ("✓", "+"), "running": ("▶", ">"), "to come": ("·", ".")}
STYLES = {"done": "green", "running": "bold cyan", "to come": "dim"}


class Panel:
    """A view of what was watched at the time ``now``."""

    def __init__(self, watched: Watched, now: float) -> None:
        self._watched = watched
        self._now = now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A frame of at most seven lines, none of them wrapped."""
        watched, width = self._watched, min(options.max_width - ECHO, WIDEST)
        rows = Table.grid(padding=(0, 1, 0, 0), expand=True)
        rows.add_column(no_wrap=True, style="dim", min_width=9)
        rows.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        lines: list[Text | Table] = []
        if watched.stage:
            lines.append(self._stage_line(width, ascii_only=options.ascii_only))
        if watched.of:
            rows.add_row("candidate", _line(f"{watched.number} of {watched.of}  {watched.candidate}"))
        if watched.saving is not None:
            rows.add_row("latency", _line(saving_text(watched.saving)))
        if watched.bar is not None:
            bar = watched.bar
            cells = Table.grid(padding=(0, 1, 0, 0), expand=True)
            cells.add_column(width=8 if width < NARROW else 24)
            cells.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
            cells.add_row(
                ProgressBar(total=bar.total, completed=bar.done),
                _line(f"{bar.done}/{bar.total} {bar.detail}"),
            )
            rows.add_row(bar.name, cells)
        rows.add_row("time", _line(self._time(width)))
        yield Frame(Group(*lines, rows), title="optpipe", title_align="left", border_style="dim", width=width)

    def _stage_line(self, width: int, *, ascii_only: bool) -> Text:
        watched = self._watched
        line = Text(no_wrap=True, overflow="ellipsis")
        for number, name in enumerate(store.STAGES, start=1):
            state = "done" if number < watched.stage or not watched.running else "running"
            state = "to come" if number > watched.stage else state
            mark = MARKS[state][1 if ascii_only else 0]
            shown = f"{mark} {name}" if width >= NARROW or state == "running" else mark
            line.append(shown, STYLES[state]).append("  " if width >= NARROW else " ")
        return line

    def _time(self, width: int) -> str:
        passed = clock_text(self._now - self._watched.began)
        left = self._watched.left(self._now)
        if width >= NARROW:
            where = " in this stage" if self._watched.stage else ""
            return f"{passed} passed; left{where}: {left_text(left)}"
        return f"{passed}; {short_text(left)} left"


def _line(text: str) -> Text:
    return Text(" ".join(text.split()), no_wrap=True, overflow="ellipsis")


def saving_text(saving: Saving) -> str:
    """The latency against the original's, as reports say it: "-34.4% (-34.8% to -33.9%) without layer1.0"."""
    low, high = saving.ci95
    return f"{saving.ratio - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%}) {saving.name}"


def left_text(left: Left | None) -> str:
    """ "about 1:05", "at least 1:05" where more may follow, "unknown"."""
    if left is None:
        return "unknown"
    return f"{'at least' if left.bound else 'about'} {clock_text(left.seconds)}"


def short_text(left: Left | None) -> str:
    """ "~ 1:05", "> 1:05" where more may follow, "?"."""
    return "?" if left is None else f"{'>' if left.bound else '~'} {clock_text(left.seconds)}"


def clock_text(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: "0:07", "1:02:03"."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
