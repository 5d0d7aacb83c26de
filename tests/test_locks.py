"""Locks by files: who waits, who is told, and what becomes of a file that is removed."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from optpipe import locks


def test_a_held_file_is_refused_or_waited_for(tmp_path: Path) -> None:
    path, told = tmp_path / "lock", list[str]()
    had = threading.Event()

    def wait() -> None:
        with locks.held(path, on_wait=lambda: told.append("waits")):
            had.set()

    with locks.held(path):
        with pytest.raises(BlockingIOError), locks.held(path):
            pytest.fail("two have it")
        other = threading.Thread(target=wait)
        other.start()
        assert not had.wait(0.2)
    assert had.wait(10)
    other.join()
    assert told == ["waits"]


def test_many_hold_it_together_and_none_beside_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        locks.held(path, shared=True),
        locks.held(path, shared=True),
        pytest.raises(BlockingIOError),
        locks.held(path),
    ):
        pytest.fail("one alone has it beside others")
    with locks.held(path), pytest.raises(BlockingIOError), locks.held(path, shared=True):
        pytest.fail("one has it beside one alone")


def test_a_file_that_is_removed_while_it_is_waited_for_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    waits, had, goes = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        with locks.held(path, on_wait=waits.set):
            had.set()
            goes.wait(10)

    other = threading.Thread(target=wait)
    with locks.held(path):
        other.start()
        assert waits.wait(10)
        path.unlink()
    assert had.wait(10)
    with pytest.raises(BlockingIOError), locks.held(path):
        pytest.fail("two have it: one the file of before, one the new one")
    goes.set()
    other.join()
    with locks.held(path):
        pass


def test_the_holder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert locks.holder(path) is None
    with locks.held(path):
        assert locks.holder(path) == os.getpid()
    assert locks.holder(path) is None


def test_a_file_for_all_is_open_to_all_and_no_link_is_followed(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with locks.held(tmp_path / "all", for_all=True), locks.held(tmp_path / "own"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "all").stat().st_mode) == 0o666
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locks.held(tmp_path / "link", for_all=True):
        pytest.fail("it follows a link")
    assert not (tmp_path / "elsewhere").exists()


def test_who_asks_to_be_told_is_told_and_nobody_else() -> None:
    inner, outer = list[str](), list[str]()
    locks.say("to nobody")
    with locks.telling(outer.append):
        locks.say("one")
        with locks.telling(inner.append):
            locks.say("two")
        locks.say("three")
    locks.say("to nobody")
    assert (outer, inner) == (["one", "three"], ["two"])
