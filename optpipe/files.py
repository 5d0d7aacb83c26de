"""Files that are either the old ones or the whole new ones."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
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
    temporary = _temporary(path.parent, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with interruption.temporary(temporary):
            yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise write_failure(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def copied(source: Path, path: Path, scratch: Path, *, links: bool = False) -> None:
    """The whole of a file or folder at another place, or what was there before.

    It is made in the folder ``scratch``, where the two are on one disk: what a killed process leaves of it
    lies where its owner looks. With ``links`` a file is linked where the disk can: for files that are
    replaced, never written to. A folder's files are copied, since engines may be built anew in their places.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _place(source, path, scratch, links=links)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _place(source, path, path.parent, links=False)
    except OSError as error:
        raise write_failure(error, path) from error


def _place(source: Path, path: Path, scratch: Path, *, links: bool) -> None:
    temporary = _temporary(scratch, path.name)
    try:
        with interruption.temporary(temporary):
            if source.is_dir():
                # Who borrows a stage says itself when it is done.
                shutil.copytree(
                    source, temporary, ignore=shutil.ignore_patterns("result.json", "failure.json")
                )
                shutil.rmtree(path, ignore_errors=True)
            elif not (links and _linked(source, temporary)):
                shutil.copyfile(source, temporary)
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _linked(source: Path, path: Path) -> bool:
    try:
        os.link(source, path)
    except OSError:  # a disk without links
        return False
    return True


def append_line(path: Path, line: str) -> None:
    """Add a line to a file's end, all of it or nothing.

    A line that a killed process or a power cut left unfinished stays what it is, and ends here.

    Raises:
        RunError: the disk is full or the file cannot be written.
    """
    try:
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
            content = ("\n" if torn else "").encode() + line.encode() + b"\n"
            try:
                left = memoryview(content)
                while left:
                    left = left[file.write(left) :]
            except OSError:
                os.truncate(file.fileno(), end)
                raise
    except OSError as error:
        raise write_failure(error, path) from error


def _temporary(folder: Path, name: str) -> Path:
    """A name that nobody else takes, not on another machine either, which counts its own processes."""
    return folder / f".{name}.{secrets.token_hex(6)}.tmp"


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_failure(error: OSError, path: Path) -> RunError:
    """What a user is told of a file that could not be written."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return RunError(f"{path}: the disk is full; free some space and run again: it goes on from here")
    return RunError(f"{path}: cannot be written: {error.strerror or error}")
