"""Ctrl-C and SIGTERM: a program that ends within two seconds, whatever it is at.

Python acts on a signal between two of its own instructions, and building an engine or importing a library
is one instruction that may take minutes. So a thread, which sleeps until a signal comes, ends the process
where the main thread has not ended it in time. What is finished is on the disk by then: files are replaced
whole or not at all. A second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

GRACE_S = 1.0
"""How long the main thread has to end by itself, of the two seconds."""

_STOP = 0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


@dataclass(slots=True)
class _State:
    """What this process is at. A process has one, as it has one handler of a signal."""

    folder: Path | None = None
    watch: Watch | None = None
    temporaries: set[Path] = field(default_factory=set)


_state = _State()


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Meanwhile the process works in a run's folder, as :func:`folder` tells; after an interrupt too."""
    _state.folder = folder
    try:
        yield
    except Exception:
        if _state.watch is None or _state.watch.signal is None:
            _state.folder = None
        raise
    _state.folder = None


def folder() -> Path | None:
    """The folder of the run that is at work; None outside of one."""
    return _state.folder


def has_come() -> bool:
    """Whether a signal has come, whatever a library made of the KeyboardInterrupt."""
    return _state.watch is not None and _state.watch.signal is not None


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[None]:
    """Meanwhile a file or folder may be there that goes with the process."""
    _state.temporaries.add(path)
    try:
        yield
    finally:
        _state.temporaries.discard(path)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder that goes on leaving, and with the process."""
    # Not TemporaryDirectory, which recurses without end over what it has no permission to remove.
    path = Path(tempfile.mkdtemp(prefix="optpipe-"))
    try:
        with temporary(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """Meanwhile a signal raises nothing; it does on leaving. Yields whether one has come.

    For work that must be whole, such as a step of a training, and takes less than a second: what takes
    longer than the grace is ended all the same.
    """
    watch = _state.watch
    if watch is None:
        yield lambda: False
        return
    watch.holds += 1
    try:
        yield lambda: watch.signal is not None
    finally:
        watch.holds -= 1
    if watch.signal is not None and not watch.holds:
        raise KeyboardInterrupt


class Watch:
    """Turns the first SIGINT or SIGTERM into a KeyboardInterrupt, and ends the process if that is not enough.

    A context manager, for the main thread; elsewhere it does nothing, nor with a signal that the process
    ignores. ``last_words`` makes the line that is written to stderr where the process is ended here.
    """

    def __init__(self, last_words: Callable[[], str]) -> None:
        self.signal: int | None = None
        self.holds = 0
        self._last_words = last_words
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._thread: threading.Thread | None = None

    @property
    def exit_code(self) -> int:
        """What shells call the end by this signal: 130 or 143."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> Watch:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._raise)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._hush
        self._thread = threading.Thread(target=self._wait, name="optpipe interruption", daemon=True)
        self._thread.start()
        self._outer, _state.watch = _state.watch, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        _state.watch = self._outer
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._unraisable
        os.write(self._writing, bytes([_STOP]))
        self._thread.join()
        self._thread = None
        os.close(self._reading)
        os.close(self._writing)

    def end(self) -> NoReturn:
        """End the process at once, after the main thread has put away what it had at hand.

        Leaving by way of the interpreter, the libraries take a second or more to take themselves apart.
        """
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        _end_children()
        os._exit(self.exit_code)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if not self.holds:
            raise KeyboardInterrupt

    def _hush(self, told: sys.UnraisableHookArgs) -> None:
        """Python tells of an interrupt that a destructor swallowed; the thread ends the process then."""
        if not issubclass(told.exc_type, KeyboardInterrupt):
            self._unraisable(told)

    def _wait(self) -> None:
        """The thread: sleeps until a signal comes, then gives the main thread its time."""
        first: int | None = None
        end = 0.0
        while True:
            left = None if first is None else max(end - time.monotonic(), 0.0)
            ready, _, _ = select.select([self._reading], [], [], left)
            if not ready:
                assert first is not None
                self._end(first)
            for number in os.read(self._reading, 64):
                if number == _STOP:
                    return
                if number not in self._before:
                    continue
                if first is not None:
                    self._end(first)
                first, end = number, time.monotonic() + GRACE_S

    def _end(self, number: int) -> None:
        """End the process here and now, leaving no temporary file, no child and no hidden cursor."""
        self.signal = self.signal or number
        threading.Timer(
            0.4, os._exit, (128 + number,)
        ).start()  # should one of these wait for the main thread
        try:
            text = "\n" + self._last_words() + "\n"
            if os.isatty(2):
                text = _SHOW_CURSOR + text
            os.write(2, text.encode())
            for path in tuple(_state.temporaries):
                shutil.rmtree(path, ignore_errors=True)  # of a folder
                path.unlink(missing_ok=True)
            _end_children()
        finally:
            os._exit(128 + number)


def _end_children() -> None:
    """Ask the processes that this one started, and that still run, to end."""
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                os.kill(int(child), signal.SIGTERM)
