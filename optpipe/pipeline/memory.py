"""The teachers of a recovery: which networks on the way to the chosen one, and their bank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F

from optpipe import bank, data, graph, tune
from optpipe.preparation import Setup
from optpipe.types import Choice, Emit, Event, Interim, Plan

if TYPE_CHECKING:
    from torch import fx

# Images on which networks are compared whose loss the search did not measure.
COMPARED = 512


def bank_of(
    setup: Setup,
    folder: Path,
    start: fx.GraphModule,
    choice: Choice,
    emit: Emit,
    *,
    plans: Sequence[Plan] | None = None,
    peers: tune.Peers = tune.ALONE,
) -> bank.MemoryBank | None:
    """The memory bank that the choice's recovery asks for, built now unless it is there; None if it does not.

    ``start`` is the network that the interim plans are applied to, ``plans`` those of :func:`teachers_of`
    where they are known. Each teacher sees the images at its own plan's resolution, whatever the student's
    is.
    """
    plans = teachers_of(setup, start, choice, emit) if plans is None else plans
    if not plans:
        return None
    shape = setup.target.input_shape
    networks = [partial(graph.apply, start, plan, shape) for plan in plans]
    # One set at a time: they are large, and teachers of one resolution mostly follow each other.
    at_shape = lru_cache(maxsize=1)(partial(data.resized, setup.calibration))
    half = tune.on_this_machine(choice.recover, setup.device).autocast == "bf16"
    return bank.build(
        folder,
        networks,
        setup.calibration,
        classes=setup.graph.classes,
        device=setup.device,
        half=half,
        emit=emit,
        resized=lambda number: at_shape(graph.image_shape(plans[number], shape)[1:]),
        peers=peers,
    )


def teachers_of(setup: Setup, start: fx.GraphModule, choice: Choice, emit: Emit) -> tuple[Plan, ...]:
    """The plans of the networks that the choice's recovery learns from; none where it learns from none."""
    tuning = choice.recover
    if tuning.loss != "labels" or tuning.teachers == "none":
        return ()
    return (Plan(),) if tuning.teachers == "single" else tuple(spaced(setup, start, choice, emit))


def spaced(setup: Setup, start: fx.GraphModule, choice: Choice, emit: Emit) -> list[Plan]:
    """The plans of the networks on the way whose losses are evenly spaced (EKG, Eq. 11), the original last.

    Where a method left none, the original is the only teacher.
    """
    interim = choice.interim
    if not interim:
        return [Plan()]
    losses = [one.loss for one in interim]
    if any(loss is None for loss in losses):
        emit(Event("note", "memory bank", f"comparing {len(interim)} networks"))
        losses = _losses(setup, start, interim, emit)
    known = [loss for loss in losses if loss is not None]
    return [interim[index].plan for index in bank.spaced(known, choice.recover.bank)]


def _losses(
    setup: Setup, start: fx.GraphModule, interim: Sequence[Interim], emit: Emit
) -> list[float | None]:
    """The cross-entropy of each network on the first images of the calibration set, by batch statistics.

    Each takes them at its own plan's resolution.
    """
    images = data.part(setup.calibration, range(min(COMPARED, len(setup.calibration))))
    assert images.labels is not None, "a recovery with labels was refused where there are none"
    shape = setup.target.input_shape
    found: list[float | None] = []
    for one in interim:
        network = graph.apply(start, one.plan, shape)
        own = data.resized(images, graph.image_shape(one.plan, shape)[1:])
        logits = tune.logits(network, own, setup.device, batch_norm="batch", emit=emit)
        found.append(float(F.cross_entropy(logits, images.labels)))
    return found
