"""What the stages share: opening, timing and scoring engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np

from optpipe import building, data, files, store, timing
from optpipe.errors import RunError
from optpipe.preparation import Setup
from optpipe.results import Ingested
from optpipe.types import Backend, Engine, Latency, Session, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray


def build_original(setup: Setup, opened: store.Run) -> Engine:
    """The original's engine, built in the folder of its stage."""
    folder = opened.stage_folder("ingest")
    exported = building.export(setup.original, setup.bench, folder)
    # A builder times kernels too: nobody else measures meanwhile.
    with timing.device_lock(setup.target.device):
        return building.build(exported, setup.bench, folder).engine


def original(setup: Setup, opened: store.Run, ingested: Ingested) -> Engine:
    """The engine that the original was scored and timed on; built anew where the machine is another one.

    Nor is a file used that is not the one that was built.
    """
    path = opened.folder / ingested.engine
    here = setup.backend.fingerprint(setup.target) == ingested.latency.fingerprint
    if here and path.is_file() and store.file_sha256(path) == ingested.engine_sha256:
        return Engine(path, ingested.engine_sha256, build_s=0.0)
    return build_original(setup, opened)


def time_beside(setup: Setup, baseline: Session, result: Session) -> timing.PairedMeasurement:
    """Time a result in turn with the original."""
    clock = setup.recipe.timing
    with timing.device_lock(setup.target.device):
        return timing.paired(
            baseline,
            result,
            tolerance=clock.tolerance,
            budget_s=clock.final_budget_s,
            seed=setup.recipe.run.seed,
        )


@contextmanager
def session(backend: Backend, target: Target, engine: Engine) -> Iterator[Session]:
    """An open engine, closed at the end."""
    session = backend.load(engine, target)
    try:
        yield session
    finally:
        session.close()


def time_alone(setup: Setup, session: Session, tolerance: float = 0.0) -> Latency:
    """The original's latency by itself, to the recipe's tolerance or to one that is coarser."""
    clock = setup.recipe.timing
    with timing.device_lock(setup.target.device):
        measured = timing.single(
            session,
            tolerance=max(clock.tolerance, tolerance),
            budget_s=min(clock.budget_s, 3.0),
            seed=setup.recipe.run.seed,
        )
    return measured.latency(setup.backend.fingerprint(setup.target))


def logits(session: Session, images: data.ImageSet) -> NDArray[np.float32]:
    """An engine's logits (N, classes) of all images."""
    size = 256
    parts = [
        session.run(images.batch(slice(start, start + size)).numpy()) for start in range(0, len(images), size)
    ]
    return np.concatenate(parts)


def store_logits(opened: store.Run, found: NDArray[np.float32]) -> str:
    """Keep the original's logits on the evaluation images; returns the file's sha256."""
    path = opened.stage_folder("ingest") / "logits.npy"
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, found)
    return store.file_sha256(path)


def store_samples(opened: store.Run, name: str, measured: timing.PairedMeasurement) -> None:
    """Keep the raw times of a measurement beside the benchmark's result."""
    path = opened.stage_folder("benchmark") / name
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, measured.samples_ms)


def labels(images: data.ImageSet) -> NDArray[np.int64] | None:
    """The labels (N,) where there are any."""
    return None if images.labels is None else images.labels.numpy()


def reference(opened: store.Run) -> NDArray[np.float32]:
    """The original engine's logits on the evaluation images."""
    path = opened.stage_folder("ingest") / "logits.npy"
    try:
        return cast("NDArray[np.float32]", np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); start anew with --fresh") from error
