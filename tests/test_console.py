from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Iterable

import pytest

from optpipe.console import EventConsole
from optpipe.console.panel import clock_text
from optpipe.console.watched import Left, Watched
from optpipe.types import Event

STAGE = Event("stage", "analyze", "started", 2, 6)
WARNING = Event("warning", "baseline", "moved +40.0% since the run began")


def shown(events: Iterable[Event], capsys: pytest.CaptureFixture[str], *, quiet: bool = False) -> list[str]:
    """The lines on stderr; nothing may reach stdout."""
    with EventConsole(quiet) as console:
        for event in events:
            console.show(event)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\x1b" not in captured.err
    return captured.err.splitlines()


def progress(name: str, total: int) -> list[Event]:
    return [Event("progress", name, f"loss {step}", step, total) for step in range(1, total + 1)]


def test_without_a_terminal_each_event_is_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        STAGE,
        Event("note", "engine", "built 0123456789ab"),
        Event("begin", "without layer1.0", "", 1, 9),
        Event("trial", "without layer1.0", "computed", 1, 9, 2.34),
        Event("trial", "without layer1.1", "reused", 2, 9),
        WARNING,
        Event("stage", "analyze", "finished", 2, 6, 61.26),
    ]
    assert shown(events, capsys) == [
        "[2/6] analyze: started",
        "  engine: built 0123456789ab",
        "  1/9 without layer1.0: computed 2.3 s",
        "  2/9 without layer1.1: reused",
        "warning: baseline: moved +40.0% since the run began",
        "[2/6] analyze: finished in 61.3 s",
    ]


def test_quiet_shows_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    events = [STAGE, Event("trial", "a", "computed", 1, 9), *progress("recover", 20), WARNING]
    assert shown(events, capsys, quiet=True) == ["warning: baseline: moved +40.0% since the run began"]


def test_progress_without_a_terminal_is_a_line_at_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(progress("recover", 200), capsys)
    assert lines[0] == "  recover 1/200 loss 1"
    assert lines[1:] == [f"  recover {step}/200 loss {step}" for step in range(20, 201, 20)]


def test_progress_of_another_name_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown([*progress("first", 1), *progress("second", 1)], capsys)
    assert lines == ["  first 1/1 loss 1", "  second 1/1 loss 1"]


def test_progress_without_a_known_end_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown([Event("progress", "recover", "loss 1")], capsys) == []


def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither markup nor emoji codes nor the terminal's width change what a path or a name says."""
    detail = "/runs/[red]mine[/red]/:warning:/" + "x" * 300
    assert shown([Event("note", "path", detail)], capsys) == [f"  path: {detail}"]


RATIO = (("key", "0" * 64), ("ratio", 0.876), ("ratio_low", 0.835), ("ratio_high", 0.935))


class Terminal(io.StringIO):
    """A terminal that rich writes to; its last panel is what a person sees."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True

    @property
    def panel(self) -> list[str]:
        """The lines of the panel that was drawn last, frame included."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.getvalue())
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", text)  # a line is overwritten
        lines = [line for line in text.split("\n") if line]
        top = max(number for number, line in enumerate(lines) if "optpipe" in line)
        end = next(number for number in range(top + 1, len(lines)) if lines[number][0] in "╰+")
        return lines[top : end + 1]

    def says(self, text: str) -> bool:
        """Whether a line of the panel holds the text."""
        return any(text in line for line in self.panel)


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def terminal_of(
    patch: pytest.MonkeyPatch, columns: int = 100, *, term: str = "xterm", encoding: str = "utf-8"
) -> Terminal:
    """stderr as a terminal of so many columns."""
    terminal = Terminal(encoding)
    patch.setattr(sys, "stderr", terminal)
    patch.setenv("TERM", term)
    patch.setenv("COLUMNS", str(columns))
    patch.setenv("LINES", "24")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        patch.delenv(name, raising=False)
    return terminal


def test_on_a_terminal_one_panel_says_where_the_run_is(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    terminal = terminal_of(monkeypatch)
    with EventConsole(clock=clock) as console:
        console.show(STAGE)
        assert terminal.panel[1].split("  ")[:3] == ["│ ✓ ingest", "▶ analyze", "· prune"]
        assert terminal.says("0:00 passed; left in this stage: unknown")
        # A name that would be markup, were it taken for it.
        console.show(Event("begin", "without layer1[/0]", "", 1, 7))
        assert terminal.says("candidate 1 of 7 without layer1[/0]")
        clock.now = 10.0
        console.show(Event("trial", "without layer1[/0]", "computed", 1, 7, 10.0, RATIO))
        console.show(Event("begin", "without layer1.1", "", 2, 7))
        assert terminal.says("candidate 2 of 7 without layer1.1")
        assert terminal.says("latency   -12.4% (-16.5% to -6.5%) without layer1[/0]")
        assert terminal.says("0:10 passed; left in this stage: at least 1:00")
        console.show(Event("stage", "analyze", "finished", 2, 6, 10.0))
        console.show(Event("stage", "recover", "started", 4, 6))
        for event in progress("training", 4):
            clock.now += 5.0
            console.show(event)
        assert terminal.says("4/4 loss 4")
        assert terminal.says("latency   -12.4%"), "a saving stays until the next is measured"
        assert not terminal.says("candidate")
        assert len(terminal.panel) <= 7
    text = terminal.getvalue()
    assert "[2/6] analyze: started\n" in text
    assert "  1/7 without" not in text, "a panel takes the place of lines"
    assert "[2/6] analyze: finished in 10.0 s\n" in text
    assert text.endswith("\x1b[2K"), "the panel is gone at the end"
    assert "\x1b[?25h" in text, "and the cursor is there again"


def test_warnings_and_notes_scroll_above_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with EventConsole() as console:
        for event in (STAGE, WARNING, Event("note", "engine", "built 0123456789ab")):
            console.show(event)
        text = terminal.getvalue()
        assert "warning: baseline: moved +40.0% since the run began\n" in text
        assert "  engine: built 0123456789ab\n" in text
        assert text.rindex("built") < text.rindex("optpipe")


def test_no_thread_draws_while_engines_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_of(monkeypatch)
    before = threading.active_count()
    with EventConsole() as console:
        console.show(STAGE)
        assert threading.active_count() == before


def test_quick_steps_are_not_each_drawn_but_the_last_is(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    terminal = terminal_of(monkeypatch)
    with EventConsole(clock=clock) as console:
        for event in progress("training", 1000):
            clock.now += 0.001
            console.show(event)
        assert terminal.says("1000/1000 loss 1000")
        assert terminal.getvalue().count("optpipe") < 20


@pytest.mark.parametrize("columns", [20, 40, 75, 76, 200])
def test_the_panel_fits_any_width(monkeypatch: pytest.MonkeyPatch, clock: Clock, columns: int) -> None:
    terminal = terminal_of(monkeypatch, columns)
    with EventConsole(clock=clock) as console:
        console.show(STAGE)
        console.show(Event("trial", "without layer1.0", "computed", 1, 7, 10.0, RATIO))
        clock.now = 60.0
        console.show(Event("progress", "memory bank", "teacher-1", 1, 9))
        assert [len(line) for line in terminal.panel] == [min(columns - 2, 100)] * len(terminal.panel), (
            terminal.panel
        )
        assert len(terminal.panel) <= 7
        assert columns < 40 or terminal.says("▶ analyze")
        assert columns < 40 or terminal.says("-12.4% (")
        assert columns < 40 or terminal.says("1:00; > 1:00 left" if columns < 76 else "at least 1:00")


def test_a_terminal_without_unicode_gets_plain_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch, encoding="ascii")
    with EventConsole() as console:
        console.show(STAGE)
        assert terminal.says("+ ingest  > analyze  . prune")
        terminal.getvalue().encode("ascii")


def test_no_color_takes_the_colours_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with EventConsole() as console:
        console.show(STAGE)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.getvalue())


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch, term="dumb")
    with EventConsole() as console:
        console.show(STAGE)
        console.show(Event("trial", "without layer1.0", "computed", 1, 9, 2.34))
    assert terminal.getvalue().splitlines() == [
        "[2/6] analyze: started",
        "  1/9 without layer1.0: computed 2.3 s",
    ]


def test_quiet_draws_nothing_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with EventConsole(quiet=True) as console:
        for event in (STAGE, *progress("training", 9), WARNING):
            console.show(event)
    assert terminal.getvalue().splitlines() == ["warning: baseline: moved +40.0% since the run began"]


# ---------------------------------------------------------------- the time left


def watched(events: Iterable[tuple[float, Event]]) -> Watched:
    found = Watched(0.0)
    for now, event in events:
        found.see(event, now)
    return found


RECOVER = Event("stage", "recover", "started", 4, 6)


def test_a_recovery_is_as_long_as_its_training() -> None:
    training = progress("training", 10)
    found = watched([(0.0, RECOVER), (2.0, training[0]), (4.0, training[1]), (6.0, training[2])])
    assert found.left(6.0) == Left(14.0, bound=False)


def test_a_training_that_goes_on_from_a_checkpoint_counts_its_own_steps_alone() -> None:
    training = progress("training", 100)
    found = watched([(0.0, RECOVER), (1.0, training[59])])
    assert found.left(1.0) is None
    found.see(training[69], 2.0)
    assert found.left(2.0) == Left(3.0, bound=False)


def test_a_search_may_ask_for_more_than_the_batch() -> None:
    found = watched(
        [
            (0.0, STAGE),
            (0.0, Event("begin", "a", "", 1, 4)),
            (8.0, Event("trial", "a", "computed", 1, 4, 8.0)),
            (8.0, Event("begin", "b", "", 2, 4)),
        ]
    )
    assert found.left(11.0) == Left(8.0 - 3.0 + 2 * 8.0, bound=True)
    found.see(Event("begin", "c", "", 1, 2), 20.0)
    assert found.left(20.0) is None, "another batch may take another time"


def test_answers_from_the_store_tell_nothing_of_the_time() -> None:
    found = watched([(0.0, STAGE), (0.1, Event("trial", "a", "reused", 1, 4, 0.1))])
    assert found.left(0.1) is None


def test_a_command_without_stages_says_what_is_left_of_it(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    terminal = terminal_of(monkeypatch)
    with EventConsole(clock=clock) as console:
        for event in progress("landscape", 3)[:2]:
            clock.now += 10.0
            console.show(event)
        assert terminal.says("2/3 loss 2")
        assert terminal.says("0:20 passed; left: about 0:10")
        assert not terminal.says("ingest")


def test_a_stage_that_is_over_leaves_nothing() -> None:
    found = watched([(0.0, RECOVER), (1.0, progress("training", 2)[1])])
    found.see(Event("stage", "recover", "finished", 4, 6, 2.0), 2.0)
    assert found.left(2.0) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (65, "1:05"), (3723, "1:02:03")]
)
def test_a_clock_shows_minutes_and_hours(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text
