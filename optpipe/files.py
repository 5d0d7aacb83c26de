"""Files that are either the old ones or the whole new ones."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from optpipe import interruption
from optpipe.errors import RunError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that it is either the old one or the whole new one, also after a power cut.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; on leaving it is synced and moved to ``path``, on an error removed.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    # Not the process number: machines that share a folder count their own.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with interruption.temporary(temporary):
            yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise write_failure(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_failure(error: OSError, path: Path) -> RunError:
    """What a user is told of a file that could not be written."""
    if error.errno == errno.ENOSPC:
        return RunError(f"{path}: the disk is full; free some space and run again: it goes on from here")
    return RunError(f"{path}: cannot be written: {error.strerror or error}")
