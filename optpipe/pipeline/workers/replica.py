"""One worker: a replica of the search that answers single requests of it into the shared store."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optpipe import preparation, store, tune
from optpipe.errors import RunError
from optpipe.pipeline.laboratory import laboratory
from optpipe.pipeline.synthesizing import synthesized
from optpipe.preparation import Setup
from optpipe.recipe import Recipe
from optpipe.results import Ingested
from optpipe.shared import SharedStore
from optpipe.types import Emit, Fingerprint, Request, Search


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker must know to replay a search: plain data, small, the same for all workers.

    ``fingerprint`` is of the machine that times, whose latencies the search has seen. ``device`` and
    ``native_bf16`` are what the driver's torch computes with: on others the same request has other keys.
    ``shared`` is the run's name at ``[run] store``; with it ``folder`` and ``cache`` are the driver's alone.
    """

    recipe: Recipe
    folder: Path
    cache: Path | None
    shared: str
    fingerprint: Fingerprint
    model_digest: str
    calibration_digest: str
    device: str
    native_bf16: bool

    @classmethod
    def of(cls, setup: Setup, opened: store.Run, ingested: Ingested) -> Assignment:
        """That of a prepared run, whose backend is chosen already."""
        recipe = setup.recipe
        target = dataclasses.replace(recipe.target, backend=setup.target.backend)
        return cls(
            recipe=dataclasses.replace(recipe, target=target),
            folder=opened.folder,
            cache=opened.cache,
            shared="" if opened.shared is None else opened.shared.run,
            fingerprint=ingested.latency.fingerprint,
            model_digest=setup.model_digest,
            calibration_digest=setup.calibration.digest,
            device=setup.device,
            native_bf16=tune.native_bf16(setup.device),
        )


class Replica:
    """The search of an assignment, replayed as far as the last batch that was asked for."""

    def __init__(self, assignment: Assignment, emit: Emit) -> None:
        """Load the model and the images.

        Raises:
            OptpipeError: they are not there, or this machine would compute something else.
        """
        self._assignment = assignment
        self._emit = emit
        self._own = contextlib.ExitStack()
        self._opened = self._own.enter_context(opened_by(assignment))
        self._setup = prepared(assignment, self._opened, emit)
        self._begin()

    def close(self) -> None:
        """Remove what it keeps of its own."""
        self._own.close()

    def _begin(self) -> None:
        self._opened.has(self._opened.stage_folder("ingest") / "result.json")
        ingested = self._opened.stage_result("ingest", Ingested)
        if ingested is None:
            raise RunError(f"{self._assignment.folder}: is not ingested, so there is nothing to work for")
        self._lab, scene = laboratory(
            self._setup, self._opened, ingested, self._emit, measured_by=self._assignment.fingerprint
        )
        self._search: Search = self._setup.method.search(scene, self._setup.config)
        self._batch = 0
        self._requests: Sequence[Request] = next(self._search)

    def compute(self, batch: int, place: int) -> None:
        """Answer the request at ``place`` of a batch into the store.

        Raises:
            OptpipeError: it failed, or an answer of an earlier batch is missing.
        """
        if batch < self._batch:
            self._begin()
        while self._batch < batch:
            self._requests = self._search.send(self._lab.answer(self._requests))
            self._batch += 1
        self._lab.compute(self._requests[place])


@contextlib.contextmanager
def opened_by(assignment: Assignment) -> Iterator[store.Run]:
    """A worker's run: in the folder that all see, or in one of its own that fills from the store.

    Raises:
        RunError: it does not see the folder.
    """
    if assignment.shared:
        shared = SharedStore(assignment.recipe.run.store, assignment.shared)
        with tempfile.TemporaryDirectory(prefix="optpipe-worker-") as folder:
            yield store.Run(Path(folder), None, shared=shared)
        return
    if not (assignment.folder / store.RECIPE).is_file():
        raise RunError(
            f"{assignment.folder}: this worker does not see the run's folder; a run with workers on other "
            "machines needs a folder that all of them share (--out), or an address that they reach ([run] "
            "store)"
        )
    yield store.Run(assignment.folder, assignment.cache)


def prepared(assignment: Assignment, opened: store.Run, emit: Emit) -> Setup:
    """The setup of an assignment, as it is for the driver, with images that are to be made from the run.

    Raises:
        OptpipeError: the model or the images are not there, or this machine would compute something else.
    """
    setup = synthesized(preparation.prepare(assignment.recipe), opened, emit)
    _refuse_other(setup, assignment)
    return setup


def _refuse_other(setup: Setup, assignment: Assignment) -> None:
    here = {
        "model": (setup.model_digest, assignment.model_digest),
        "calibration images": (setup.calibration.digest, assignment.calibration_digest),
        "device to train on": (setup.device, assignment.device),
        "support of bfloat16": (tune.native_bf16(setup.device), assignment.native_bf16),
    }
    for name, (found, wanted) in here.items():
        if found != wanted:
            raise RunError(
                f"{assignment.recipe.path}: this worker has another {name} ({found}) than the run "
                f"({wanted}), and would compute something else"
            )
