"""One process measures at a time on a device."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from optpipe import locks
from optpipe.errors import RunError


@contextlib.contextmanager
def device_lock(device: str, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep every other process from measuring on ``device`` meanwhile.

    Waits while another process holds the lock, after calling ``on_wait`` once, or else telling by
    :func:`optpipe.locks.say`; the system releases it when its holder dies. Not re-entrant: taken twice in
    one process, it waits for itself.

    Raises:
        RunError: the lock's file can be neither made nor read.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", device)
    with contextlib.ExitStack() as stack:
        try:
            path = Path(tempfile.gettempdir()) / f"optpipe-{name}.lock"
            stack.enter_context(
                locks.held(path, on_wait=on_wait or (lambda: _say(device, path)), for_all=True)
            )
        except OSError as error:
            where = error.filename or "the temporary folder"
            raise RunError(
                f"{where}: cannot be made or locked ({error.strerror or error}), and by this file processes "
                f"that measure on {device} keep out of each other's way; set TMPDIR to a folder that can be "
                "written"
            ) from None
        yield


def _say(device: str, path: Path) -> None:
    number = locks.holder(path)
    who = "another process" if number is None else f"process {number}"
    locks.say(f"waiting for {who}, which measures on {device}")
