"""Calibration images made from the original alone, kept in the run batch by batch."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optpipe import data, files, graph, store, synthesis, timing, tune
from optpipe.errors import UsageError
from optpipe.preparation import Setup
from optpipe.report.contact import contact_sheet
from optpipe.types import Emit, Event, Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import fx

SHEET = "figures/synthesized.png"
"""Where the images are shown, seen from the report."""


def synthesized(setup: Setup, opened: store.Run, emit: Emit) -> Setup:
    """The setup with its calibration images; those that the run has already are not made again.

    Nothing changes where the recipe's calibration images come from elsewhere.

    Raises:
        UsageError: the run holds images that were made from another network.
        RunError: the images came to nothing, or the disk is full.
    """
    if setup.recipe.data.synthesize is None:
        return setup
    spec, shape = setup.recipe.data.calibration, setup.target.input_shape
    path = opened.folder / data.SYNTHESIZED
    made_of = _made_of(setup)
    if not opened.has(path):
        opened.borrow("synthesized", f"{made_of}.npz", path)
    images = _made(setup, path, made_of, emit)
    opened.lend("synthesized", f"{made_of}.npz", path)
    files.write_atomically(opened.folder / SHEET, contact_sheet(images))
    kept = data.made(spec, opened.folder)
    return setup.with_calibration(data.load_images(kept, setup.recipe.data.preprocess, shape[0]))


def _made(setup: Setup, path: Path, made_of: str, emit: Emit) -> NDArray[np.uint8]:
    """All the images (N, H, W, C), as they are in the file at ``path`` from then on."""
    settings, preprocess = setup.recipe.data.synthesize, setup.recipe.data.preprocess
    assert settings is not None
    spec = setup.recipe.data.calibration
    labels = synthesis.even_labels(len(setup.calibration), setup.graph.classes, spec.seed)
    wanted = synthesis.Wanted(
        labels,
        setup.target.input_shape,
        preprocess.mean,
        preprocess.std,
        spec.seed,
        halved=not setup.graph.fixed_size,
    )
    images = _kept(path, made_of)
    parts = synthesis.split(len(labels), settings.batch)
    first = 0 if images is None else [part.stop for part in parts].index(len(images)) + 1
    if images is not None and first == len(parts):
        return images
    total = settings.steps * len(parts)

    def told(done: int, loss: float) -> None:
        emit(Event("progress", "synthesis", f"loss {loss:.4g}", done, total))

    watch, device = timing.Stopwatch(), tune.usable(setup.device)
    emit(Event("note", "synthesis", f"{len(labels)} images from the original in {len(parts)} batches"))
    student = _student(setup) if settings.competition else None
    half = tune.native_bf16(device)
    settled = synthesis.settled(setup.original, wanted, settings, device=device, half=half)
    if settled != settings:
        emit(Event("note", "synthesis", f'jitter = "{settled.jitter}" comes nearest to its statistics'))
    for batch in synthesis.synthesize(
        setup.original, wanted, settled, first=first, device=device, student=student, half=half, told=told
    ):
        images = batch if images is None else np.concatenate([images, batch])
        with files.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images, labels=labels[: len(images)], made_of=np.array(made_of))
    assert images is not None
    emit(Event("note", "synthesis", f"took {watch.seconds:.1f} s", seconds=watch.seconds))
    return images


def _made_of(setup: Setup) -> str:
    """All that the images depend on, in a word."""
    recipe = setup.recipe
    what = (
        setup.model_digest,
        setup.target.input_shape,
        recipe.data.preprocess,
        recipe.data.synthesize,
        recipe.data.calibration.seed,
        recipe.data.calibration.count,
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _kept(path: Path, made_of: str) -> NDArray[np.uint8] | None:
    """The images that are there already, whole batches; None before the first."""
    if not path.exists():
        return None
    try:
        # Given a path, numpy leaves the file open when it turns out to be no .npz.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            images: NDArray[np.uint8] = file["images"]
            same = str(file["made_of"]) == made_of
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: cannot be read ({error}); start anew with --fresh") from None
    if not same:
        raise UsageError(
            f"{path}: these images were made from another network; name another folder with --out, or move "
            "that run aside with --fresh"
        )
    return images


def _student(setup: Setup) -> fx.GraphModule:
    """What competes: the original without the droppable block of fewest MACs, as it is without training."""
    cheapest = min(setup.graph.units, key=lambda block: block.macs)
    return graph.apply(setup.original, Plan(drop_blocks=(cheapest.name,)), setup.target.input_shape)
