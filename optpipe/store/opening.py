"""A run's folder is opened: held by one process, of this recipe, and without what a killed one left."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from optpipe import interruption, locks
from optpipe.errors import UsageError
from optpipe.files import write_atomically
from optpipe.shared import SharedStore
from optpipe.store.names import RECIPE, SHARED
from optpipe.store.run import Run

ABANDONED_S = 24 * 3600.0
"""How old a temporary file in a cache is before whoever wrote it is held for dead."""


@contextlib.contextmanager
def open_run(
    folder: Path,
    recipe_toml: str,
    *,
    fresh: bool,
    cache: Path | None,
    lends: bool = False,
    shared: str = "",
) -> Iterator[Run]:
    """Open a run folder, new or to be resumed, and hold it.

    ``fresh`` moves an earlier run aside instead of resuming it; nothing is deleted. ``lends`` is for the runs
    of a sweep, which have each other's files by the cache. ``shared`` is the address of a
    :class:`~optpipe.shared.SharedStore`, where answers lie for workers on other machines too.

    Raises:
        UsageError: the folder holds another run or other files, or another process runs in it.
    """
    folder = folder.resolve()
    if not folder.name:
        raise UsageError(f"{folder}: cannot hold a run; name another folder with --out")
    with locked(folder):
        refuse_other(folder, None if fresh else recipe_toml)
        if fresh:
            move_aside(folder)
        for temporary in list(folder.rglob(".*.tmp")):
            _remove(temporary)
        if cache is not None:
            _sweep(cache)
        recorded = folder / RECIPE
        if not recorded.exists():
            write_atomically(recorded, recipe_toml)
        with interruption.in_folder(folder):
            yield Run(folder, cache, lends=lends, shared=_shared(folder, shared) if shared else None)


def _shared(folder: Path, address: str) -> SharedStore:
    """Where the run in a folder has its shared files: under a name that no run has or had but this one."""
    path = folder / SHARED
    if not path.exists():
        write_atomically(path, secrets.token_hex(16))
    return SharedStore(address, path.read_text(encoding="utf-8").strip())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which need not be there yet, for this process alone.

    Raises:
        UsageError: another process holds it, or its parent cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made: {error.strerror}") from None
    path = folder.with_name(f".{folder.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(path))
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another optpipe is running in this folder; wait for it or name another --out"
            ) from None
        except OSError as error:
            raise UsageError(f"{folder}: cannot be written: {error.strerror}") from None
        yield


def refuse_other(folder: Path, recipe_toml: str | None) -> None:
    """UsageError where a folder holds something else than a run of this recipe, or of any if it is None."""
    _refuse_foreign(folder)
    recorded = folder / RECIPE
    if recipe_toml is not None and recorded.exists():
        try:
            text = recorded.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{recorded}: cannot be read: {error}; move the run aside with --fresh"
            ) from None
        _refuse_other_recipe(folder, text, recipe_toml)


def _refuse_foreign(folder: Path) -> None:
    if folder.is_file():
        raise UsageError(f"{folder}: is a file; name a folder with --out")
    if not folder.exists() or (folder / RECIPE).exists():
        return
    # A process killed while it wrote the very first file leaves its temporary file alone in the folder.
    if not all(path.name.startswith(f".{RECIPE}.") for path in folder.iterdir()):
        raise UsageError(f"{folder}: holds files that are no optpipe run; name another folder with --out")


def _refuse_other_recipe(folder: Path, recorded: str, wanted: str) -> None:
    try:
        there = tomllib.loads(recorded)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{folder / RECIPE}: is not valid TOML: {error}; move the run aside with --fresh"
        ) from None
    differs = _difference(there, tomllib.loads(wanted))
    if differs:
        raise UsageError(
            f"{folder}: holds another run (it differs in {', '.join(differs[:3])}); "
            "name another folder with --out, or move that run aside with --fresh"
        )


def _difference(a: Mapping[str, object], b: Mapping[str, object], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += _difference(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}: {left!r} there, {right!r} here")
    return found


def move_aside(folder: Path) -> None:
    """Give a folder another name, if it is there."""
    if not folder.exists():
        return
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(old)


def _sweep(cache: Path) -> None:
    """Take out of a cache what killed processes had half written; others may be writing in it now."""
    for temporary in list(cache.glob("*/.*.tmp")):
        with contextlib.suppress(OSError):
            if time.time() - temporary.stat(follow_symlinks=False).st_mtime > ABANDONED_S:
                _remove(temporary)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
