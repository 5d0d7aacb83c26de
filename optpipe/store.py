"""Run folders: atomic writes, full-digest keys, resume, and one process at a time.

A file that is written last, through a temporary file, fsync and ``os.replace``, says by its existence that
its stage or trial is done. Whatever else a killed process left behind is overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import secrets
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

from optpipe import interruption, seals
from optpipe.errors import OptpipeError, RunError, UsageError
from optpipe.files import append_line, copied, write_atomically
from optpipe.shared import SharedStore
from optpipe.tensors import DiskCheckpoint, load_tensors, save_tensors
from optpipe.types import Event

if TYPE_CHECKING:
    pass

__all__ = [
    "CACHE",
    "RECIPE",
    "SHARED",
    "STAGES",
    "WEIGHTS",
    "DiskCheckpoint",
    "Run",
    "digest",
    "file_sha256",
    "from_json",
    "load_tensors",
    "locked",
    "move_aside",
    "open_run",
    "read_answer",
    "refuse_other",
    "save_tensors",
    "source_of",
    "to_json",
    "to_sealed",
]

T = TypeVar("T")

RECIPE = "recipe.toml"
_EVENTS = "events.jsonl"
CACHE = ".optpipe-cache"
SHARED = "shared-name"
WEIGHTS = "weights.safetensors"
_MADE_FROM = "made_from"
STAGES = ("ingest", "analyze", "prune", "recover", "export", "benchmark")


def to_json(value: object) -> str:
    """A frozen dataclass as indented JSON."""
    assert dataclasses.is_dataclass(value) and not isinstance(value, type)
    return json.dumps(dataclasses.asdict(value), indent=1, allow_nan=False) + "\n"


def to_sealed(value: object, made_from: str | None = None) -> str:
    """The same with a seal, by which :func:`from_json` sees whether it was damaged.

    ``made_from`` is the digest of what the value hangs on, for :func:`source_of`.
    """
    text = to_json(value)
    if made_from is not None:
        text = json.dumps({**json.loads(text), _MADE_FROM: made_from}, indent=1) + "\n"
    return seals.sealed(text)


def source_of(path: Path) -> str | None:
    """The digest of what a whole file of :func:`to_sealed` was made from; None where it does not say."""
    source = json.loads(path.read_bytes()).get(_MADE_FROM)
    return None if source is None else str(source)


def from_json(cls: type[T], text: str | bytes) -> T:
    """The dataclass that :func:`to_json` or :func:`to_sealed` wrote.

    Raises:
        ValueError: the text is no such value, or not as it was sealed.
    """
    seals.check(text.encode() if isinstance(text, str) else text)
    return TypeAdapter(cls).validate_json(text)


def digest(*parts: object) -> str:
    """sha256 over parts: dataclasses, strings, numbers, tuples and None."""

    def plain(part: object) -> object:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return dataclasses.asdict(part)
        return part

    text = json.dumps([plain(part) for part in parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Run:
    """The folder of one run, held by one process.

    Use :func:`open_run`; the lock is released when the context ends or the process dies.
    """

    def __init__(
        self,
        folder: Path,
        cache: Path | None,
        *,
        lends: bool = False,
        shared: SharedStore | None = None,
    ) -> None:
        """``cache`` holds the answers of other runs; with ``lends`` it holds their files too.

        ``shared`` is where this run's answers lie for those of its workers that do not see the folder.
        """
        self.folder = folder
        self.cache = cache
        self.shared = shared
        self.lends = lends

    def stage_folder(self, stage: str) -> Path:
        """The folder of a stage, numbered in the order of the pipeline."""
        return self.folder / f"{STAGES.index(stage) + 1:02d}-{stage}"

    def stage_result(self, stage: str, cls: type[T], made_from: str | None = None) -> T | None:
        """What a finished stage left; None if it is not done (or was done by another version, or is damaged).

        Nor is it done where it was made from something else than ``made_from``; None leaves that open.
        """
        path = self.stage_folder(stage) / "result.json"
        result = read_answer(path, cls)
        if result is None or made_from is None:
            return result
        # An older optpipe did not say what a result was made from.
        return result if source_of(path) in {None, made_from} else None

    def finish_stage(self, stage: str, result: object, made_from: str | None = None) -> None:
        """Store a stage's result, and the digest of what it was made from; from now on it is done."""
        folder = self.stage_folder(stage)
        write_atomically(folder / "result.json", to_sealed(result, made_from))
        with contextlib.suppress(OSError):
            (folder / "failure.json").unlink(missing_ok=True)

    def fail_stage(self, stage: str, error: BaseException) -> None:
        """Record a failure beside the stage; it is never taken for an answer."""
        kind = type(error).__name__
        text = json.dumps({"error": kind, "message": str(error), "at": _now()})
        with contextlib.suppress(OptpipeError):
            write_atomically(self.stage_folder(stage) / "failure.json", text + "\n")

    def trial_folder(self, key: str) -> Path:
        """The folder of a trial or step."""
        return self.folder / "trials" / key

    def weights(self, key: str) -> Path:
        """Where the weights of a trained candidate are."""
        return self.trial_folder(key) / WEIGHTS

    def engine_folder(self, key: str) -> Path:
        """The folder of an engine: trials of equal structure on one target share it."""
        return self.folder / "engines" / key

    def answer(self, room: str, key: str, name: str, cls: type[T]) -> tuple[T, bool] | None:
        """A stored answer and whether it came from another run's cache; None if there is none."""
        path = self.folder / room / key / name
        own = read_answer(path, cls)
        if own is None and self._take(path):
            own = read_answer(path, cls)
        if own is not None:
            return own, False
        if self.cache is None:
            return None
        cached = read_answer(self.cache / room / f"{key}-{name}", cls)
        return (cached, True) if cached is not None else None

    def store_answer(self, room: str, key: str, name: str, value: object) -> None:
        """Store an answer in the run and, for other runs, in the cache."""
        path = self.folder / room / key / name
        write_atomically(path, to_sealed(value))
        self.give(path)
        if self.cache is not None:
            # By way of this run's folder, where what a killed process leaves half written is cleared.
            copied(path, self.cache / room / f"{key}-{name}", self.folder)

    def has(self, path: Path) -> bool:
        """Whether a file of the run is there, now if a worker on another machine has given it."""
        return path.exists() or self._take(path)

    def has_tensors(self, path: Path) -> bool:
        """As :meth:`has`, of a safetensors file, which must hold what was written to it."""
        return seals.is_whole(path) or (self._take(path) and seals.is_whole(path))

    def give(self, path: Path) -> None:
        """Let workers and driver on other machines have a file of the run, which never changes again."""
        if self.shared is not None:
            self.shared.give(path.relative_to(self.folder).as_posix(), path)

    def _take(self, path: Path) -> bool:
        return self.shared is not None and self.shared.take(path.relative_to(self.folder).as_posix(), path)

    def lend(self, room: str, key: str, path: Path, *, anew: bool = False) -> None:
        """Let the other runs of a sweep have a file or folder of this run, which never changes again.

        The first that is lent under a key stays, unless another is lent ``anew``. Nothing happens outside a
        sweep.
        """
        if self.cache is None or not self.lends:
            return
        target = self.cache / room / key
        if anew or not target.exists():
            copied(path, target, self.folder, links=True)

    def borrow(self, room: str, key: str, path: Path) -> bool:
        """Take a file or folder that another run of a sweep has lent; whether there is one.

        It is this run's own from then on, whatever becomes of the cache.
        """
        if self.cache is None or not self.lends:
            return False
        source = self.cache / room / key
        if not source.exists():
            return False
        try:
            copied(source, path, self.folder, links=True)
        except RunError:  # what cannot be read is not lent, and what cannot be written will be told of
            return False
        return True

    def borrow_tensors(self, room: str, key: str, path: Path) -> bool:
        """Take tensors that another run of a sweep has lent; those that were damaged are withdrawn."""
        if not self.borrow(room, key, path):
            return False
        whole = seals.is_whole(path)
        if not whole:
            self.withdraw(room, key)
        return whole

    def withdraw(self, room: str, key: str) -> None:
        """Take back what was lent and is damaged, so that a whole one can take its place."""
        if self.cache is None or not self.lends:
            return
        lent = self.cache / room / key
        with contextlib.suppress(OSError):
            if lent.is_dir():
                shutil.rmtree(lent)
            else:
                lent.unlink(missing_ok=True)

    def emit(self, event: Event) -> None:
        """Append an event to events.jsonl."""
        values = dataclasses.asdict(event)
        record = {key: value for key, value in values.items() if value not in (None, "", ())}
        record["fields"] = dict(event.fields)
        append_line(self.folder / _EVENTS, json.dumps({"at": _now(), **record}, allow_nan=False))


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
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
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
    try:
        lock = path.open("a")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another optpipe is running in this folder; wait for it or name another --out"
            ) from None
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


def read_answer(path: Path, cls: type[T]) -> T | None:
    """What a file holds; None where there is none, or it is damaged or of another version.

    Raises:
        RunError: the file is there and cannot be read.
    """
    try:
        return from_json(cls, path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read: {error.strerror or error}; mend or remove it and run again"
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
