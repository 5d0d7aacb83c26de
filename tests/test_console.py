from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable

import pytest

from optpipe.console import EventConsole
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def shows(self, text: str) -> bool:
        """Whether the text appears; a bar is drawn ten times a second."""
        end = time.monotonic() + 10
        while text not in self.getvalue() and time.monotonic() < end:
            time.sleep(0.02)
        return text in self.getvalue()


def test_on_a_terminal_trials_move_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with EventConsole() as console:
        console.show(STAGE)
        for number in (1, 2):
            # A name that would be markup, were it taken for it.
            console.show(Event("trial", "without layer1[/0]", "computed", number, 2, 0.1))
        assert terminal.shows("analyze: without layer1[/0]")
        assert terminal.shows("2/2")
        for event in progress("recover", 10):
            console.show(event)
        assert terminal.shows("10/10")
        console.show(Event("stage", "analyze", "finished", 2, 6, 1.0))
    text = terminal.getvalue()
    assert "[2/6] analyze: started\n" in text
    assert "  1/2 without" not in text, "a bar takes the place of lines"
    assert "[2/6] analyze: finished in 1.0 s\n" in text
