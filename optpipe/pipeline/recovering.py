"""The training that recovers a run's chosen network, in one process or in each of several."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optpipe import graph, store, tune
from optpipe.lab import begin
from optpipe.pipeline import memory
from optpipe.preparation import Setup
from optpipe.types import Choice, Emit, Plan

if TYPE_CHECKING:
    from torch import fx


def key_of(setup: Setup, choice: Choice) -> str:
    """What a recovery's checkpoint and bank belong to: those of another plan or schedule are not taken up.

    How many devices train is no part of it: a recovery may go on with others.
    """
    return store.digest(
        choice.plan,
        choice.recover,
        choice.start,
        *choice.interim,
        setup.recipe.run.seed,
        setup.calibration.digest,
    )[:16]


def candidate_of(setup: Setup, opened: store.Run, choice: Choice) -> fx.GraphModule:
    """The chosen network before its recovery."""
    shape = setup.target.input_shape
    begun, left = begin(setup.original, choice.start, choice.plan, shape, opened)
    candidate = graph.apply(begun, left, shape)
    if choice.recover.rescale and left.keep_channels:
        candidate = graph.rescale(begun, left, shape, candidate)
    return candidate


def teachers_of(setup: Setup, opened: store.Run, choice: Choice, emit: Emit) -> tuple[Plan, ...]:
    """The plans of the networks that teach; none where nobody does."""
    return memory.teachers_of(setup, _taught_by(setup, opened, choice), choice, emit)


def train(
    setup: Setup,
    opened: store.Run,
    choice: Choice,
    teachers: Sequence[Plan],
    emit: Emit,
    *,
    peers: tune.Peers = tune.ALONE,
    most: int | None = None,
) -> tune.Trained:
    """Train the pruned network as the choice says, at its resolution, and store its weights.

    Goes on from the last checkpoint. ``teachers`` are those of :func:`teachers_of`. Each of several ``peers``
    calls this, and the first one writes; ``most`` images are taken at once.
    """
    folder, key = opened.stage_folder("recover"), key_of(setup, choice)
    built = memory.bank_of(
        setup,
        folder / f"bank-{key}",
        _taught_by(setup, opened, choice),
        choice,
        emit,
        plans=teachers,
        peers=peers,
    )
    candidate = candidate_of(setup, opened, choice)
    trained = tune.train(
        candidate,
        setup.original,
        setup.at(choice.plan).calibration(),
        choice.recover,
        seed=setup.recipe.run.seed,
        checkpoint=store.DiskCheckpoint(
            folder / f"checkpoint-{key}.safetensors", setup.recipe.run.checkpoint_every
        ),
        emit=emit,
        device=setup.device,
        teachers=built,
        peers=peers,
        most=most,
    )
    if peers.rank == 0:
        store.save_tensors(folder / store.WEIGHTS, candidate.state_dict())
        # On large sets the bank is the largest thing in a run, and it has served.
        shutil.rmtree(folder / f"bank-{key}", ignore_errors=True)
    return trained


def _taught_by(setup: Setup, opened: store.Run, choice: Choice) -> fx.GraphModule:
    """The network that the teachers' plans are applied to."""
    # A part of what a method made itself is no network that can teach: units may be masked in it.
    own = choice.start is not None and bool(choice.start.part)
    narrowed = choice.start is not None and choice.start.plan != Plan()
    if own or narrowed:
        return setup.original
    return begin(setup.original, choice.start, choice.plan, setup.target.input_shape, opened)[0]
