"""The folder of a run: what is done, what was answered, and what other runs and machines may have of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from optpipe import locks, seals
from optpipe.errors import OptpipeError, RunError
from optpipe.files import append_line, copied, write_atomically, write_failure
from optpipe.shared import SharedStore
from optpipe.store.answers import read_answer, source_of, to_sealed
from optpipe.store.names import EVENTS, STAGES, WEIGHTS
from optpipe.types import Event

T = TypeVar("T")


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
        with _lending(self.cache):
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
        with _lending(self.cache, shared=True):
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
        append_line(self.folder / EVENTS, json.dumps({"at": _now(), **record}, allow_nan=False))


@contextlib.contextmanager
def _lending(cache: Path, *, shared: bool = False) -> Iterator[None]:
    """Nobody takes a folder out of the cache, or ``shared`` puts one in, while another does.

    A folder that is replaced is gone for a moment, and one that is copied meanwhile is half of each.
    """
    path = cache / ".lending.lock"
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.held(path, on_wait=lambda: None, shared=shared))
        except OSError as error:
            raise write_failure(error, path) from error
        yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
