"""One process measures at a time on a device."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def device_lock(device: str, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep every other process from measuring on ``device`` meanwhile.

    Waits while another process holds the lock, after calling ``on_wait`` once; the system releases it when
    its holder dies. Not re-entrant: taken twice in one process, it waits for itself.
    """
    import fcntl

    name = re.sub(r"[^A-Za-z0-9]+", "-", device)
    path = Path(tempfile.gettempdir()) / f"optpipe-{name}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        descriptor = os.open(path, os.O_RDONLY)  # another user's file: enough to lock it
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock
