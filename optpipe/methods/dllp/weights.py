"""Single weights, or two of each four: zeros in the file, as many as the budget asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx

from optpipe import graph
from optpipe.errors import UsageError
from optpipe.methods.dllp import evidence, figures, tables
from optpipe.methods.dllp.particles import PART
from optpipe.methods.dllp.pressure import Kept
from optpipe.methods.dllp.training import Frame, particles_of
from optpipe.types import Choice, Fitted, Plan, Search, Start


def thinned(frame: Frame) -> Search:
    """The network whose units of the lowest theta are zero, and the other particles' beside it."""
    config, masks = frame.config, frame.masks
    left = _left(frame)
    found: Fitted | None = None
    ranks = [masks.magnitudes(frame.model)]
    shown = ranks[0]
    if config.score == "posterior":
        pressure = (
            Kept(sum(shape.numel() for shape in masks.shapes)) if config.granularity == "weight" else None
        )
        (answer,) = yield [frame.gates(left, pressure, "kept")]
        found = cast(Fitted, answer)
        learnt = particles_of(found)
        ranks = [learnt.ranks(index, config.granularity) for index in range(frame.count)]
        shown = learnt.probabilities(0, config.granularity)
    fixed = [_sparse(masks, rank, left) for rank in ranks]
    last = found
    if frame.settle or last is None:
        (answer,) = yield [frame.settling(found, fixed)]
        last = cast(Fitted, answer)
    (answer,) = yield [frame.zeroed(last, fixed)]
    zeroed = cast(Fitted, answer)
    looked = yield from evidence.lossless(frame, found, last, fixed[0], None)
    network = cast("fx.GraphModule", zeroed.module.get_submodule("networks.0"))
    zeros = graph.sparsity(network)
    return Choice(
        Plan(),
        frame.scene.recover,
        f"{zeros:.1%} of the weights are zero ({config.granularity}); only an engine with a sparse path is "
        "faster for it",
        (looked, tables.units(masks, shown, fixed[0], config.score)),
        start=Start(zeroed.key, Plan(), PART.format(0)),
        figures=figures.all_of(frame, shown, fixed[0], particles_of(last).network(0)),
        members=frame.members(zeroed, [Plan()] * len(fixed)),
    )


def _left(frame: Frame) -> float:
    """The share of the units that stay where the budget's share of all weights is zero.

    Raises:
        UsageError: there are not so many units.
    """
    masks, wanted = frame.masks, frame.scene.budget.sparsity
    assert wanted is not None
    total = graph.weight_count(frame.model)
    units = sum(shape.numel() for shape in masks.shapes)
    two_of_four = frame.config.granularity == "2:4"
    most = units / total / (2 if two_of_four else 1)
    if wanted > most + 1e-9:
        raise UsageError(
            f"[budget] sparsity = {wanted}: {most:.4f} is the most that granularity = "
            f'"{frame.config.granularity}" can do here, where {units} of {total} weights are in layers that '
            "it takes from; lower it"
        )
    return 0.5 if two_of_four else 1.0 - wanted * total / units


def _sparse(masks: graph.Masks, ranks: Sequence[Tensor], left: float) -> list[Tensor]:
    """Which units stay: the share ``left`` of all, or two of each four."""
    if masks.granularity == "2:4":
        return [_two_of_four(values) for values in ranks]
    every = torch.cat([values.flatten() for values in ranks])
    count = int(left * len(every) + 1e-6)
    kept = torch.zeros(len(every), dtype=torch.bool)
    kept[every.argsort(descending=True, stable=True)[:count]] = True
    parts = torch.split(kept, [values.numel() for values in ranks])
    return [part.view(values.shape) for part, values in zip(parts, ranks, strict=True)]


def _two_of_four(values: Tensor) -> Tensor:
    fours = graph.fours(values)
    best = fours.argsort(dim=-1, descending=True, stable=True)[..., :2]
    kept = torch.zeros(fours.shape, dtype=torch.bool).scatter_(-1, best, value=True)
    return graph.from_fours(kept, values.shape)
