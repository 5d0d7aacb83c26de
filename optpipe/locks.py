"""Files by which processes keep out of each other's way; the system releases a lock when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

Tell = Callable[[str], None]

_tell: ContextVar[Tell | None] = ContextVar("optpipe_waits", default=None)


@contextlib.contextmanager
def telling(tell: Tell) -> Iterator[None]:
    """Meanwhile whoever waits for a lock in this thread says so in a line."""
    before = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(before)


def say(line: str) -> None:
    """Tell whoever asked to be told by :func:`telling`; nobody by default."""
    tell = _tell.get()
    if tell is not None:
        tell(line)


@contextlib.contextmanager
def held(
    path: Path, *, on_wait: Callable[[], None] | None = None, shared: bool = False, for_all: bool = False
) -> Iterator[None]:
    """Hold the file at ``path``, made where there is none; ``shared`` with others that hold it so.

    Waits while another process holds it, after calling ``on_wait`` once. ``for_all`` is for a file that
    other users lock too, in a folder where anybody may put one.

    Raises:
        BlockingIOError: another process holds it, and there is no ``on_wait``.
        OSError: the file can be neither made nor read.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    descriptor = _open(path, for_all=for_all)
    try:
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    raise
                on_wait()
                on_wait = _nothing
                fcntl.flock(descriptor, kind)
            if _is_at(descriptor, path):
                break
            # It was removed meanwhile, and whoever comes next locks another file.
            again = _open(path, for_all=for_all)
            os.close(descriptor)
            descriptor = again
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def holder(path: Path) -> int | None:
    """The process that holds the file's lock, as far as the system tells."""
    try:
        found = path.stat()
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        # 1: FLOCK  ADVISORY  WRITE 1234 fd:00:5678 0 EOF; those that wait have an arrow
        words = line.split()
        if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(found.st_ino):
            return int(words[4]) or None
    return None


def _open(path: Path, *, for_all: bool) -> int:
    # A link that somebody put there would have a file made wherever it points.
    flags = os.O_NOFOLLOW if for_all else 0
    try:
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(path, flags | os.O_RDONLY)  # another user's file: enough to lock it
    if for_all:
        with contextlib.suppress(OSError):  # not ours
            os.fchmod(descriptor, 0o666)  # whatever the umask
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _nothing() -> None:
    """It was told already."""
