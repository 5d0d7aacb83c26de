"""Filters: a nested family of narrower networks, of which each that is tried is built."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from optpipe import graph
from optpipe.methods import _ladder as ladder
from optpipe.methods._meter import Meter, meter_of, refuse_met
from optpipe.methods.dllp import evidence, figures, tables
from optpipe.methods.dllp.family import Tried, family, largest
from optpipe.methods.dllp.particles import PART
from optpipe.methods.dllp.pressure import Pressure, Sized, Timed
from optpipe.methods.dllp.training import Frame, particles_of
from optpipe.types import Answer, Choice, Fitted, Plan, Request, Search, Start, Table


def narrowed(frame: Frame) -> Search:
    """The largest network of the family that meets the budget, and the other particles' beside it."""
    scene, config, masks = frame.scene, frame.config, frame.masks
    meter = meter_of(scene)
    refuse_met(scene)
    pressing = yield from _pressure(frame, meter)
    found: Fitted | None = None
    ranks = [masks.magnitudes(frame.model)]
    shown = ranks[0]
    if config.score == "posterior":
        (answer,) = yield [frame.gates(meter.allowed, pressing.pressure, pressing.depends)]
        found = cast(Fitted, answer)
        learnt = particles_of(found)
        ranks = [learnt.ranks(index, "filter") for index in range(frame.count)]
        shown = learnt.probabilities(0, "filter")
    members = family(masks, ranks[0], pressing.pressure, pressing.ladders)
    taken, tried = yield from largest(masks, ranks[0], members, meter, config.builds)
    fixed = [masks.highest(rank, taken.nested.counts) for rank in ranks]
    plans = [masks.plan(one) for one in fixed]
    last = found
    if frame.settle or last is None:
        (answer,) = yield [frame.settling(found, fixed)]
        last = cast(Fitted, answer)
    looked = yield from evidence.lossless(frame, found, last, fixed[0], plans[0])
    settled = particles_of(last).network(0)
    return Choice(
        plans[0],
        scene.recover,
        _reason(taken, meter, frame),
        (
            *pressing.tables,
            tables.tried(tried, taken, meter, config.score),
            looked,
            tables.units(masks, shown, fixed[0], config.score),
        ),
        start=Start(last.key, Plan(), PART.format(0)),
        figures=figures.all_of(frame, shown, fixed[0], settled),
        members=frame.members(last, plans),
    )


@dataclass(frozen=True, slots=True)
class _Pressing:
    """What presses units out, what it was measured to be, and the tables that show it."""

    pressure: Pressure
    depends: str
    ladders: tuple[ladder.Ladder, ...] = ()
    tables: tuple[Table, ...] = ()


def _pressure(frame: Frame, meter: Meter) -> Generator[Sequence[Request], Sequence[Answer], _Pressing]:
    """Measured latency, MACs or parameters, as the budget and ``cost`` say."""
    shown, widths = frame.scene.graph, frame.masks.widths
    costs = graph.Costs(frame.model, shown.input_shape, widths)
    if meter.what == "parameters":
        return _Pressing(Sized(costs, "parameters", shown.parameters), "parameters")
    by_macs = Sized(costs, "MACs", shown.macs)
    if meter.what == "MACs" or frame.config.cost == "macs":
        return _Pressing(by_macs, "MACs")
    ladders = yield from ladder.measure(widths, costs)
    table = ladder.table(widths.groups, ladders)
    timed = Timed(ladders)
    fewest = {group: one.lowest for one in ladders for group in one.groups}
    lowest = torch.tensor([fewest[index] for index in range(len(widths.groups))], dtype=torch.float64)
    if timed.cost(lowest) > meter.allowed:
        # The counts that are clearly faster do not reach the budget: any count may have to serve.
        return _Pressing(by_macs, "MACs", tables=(table,))
    points = [(one.groups, one.shares, [(rung.count, rung.saving) for rung in one.rungs]) for one in ladders]
    return _Pressing(timed, repr(points), ladders, (table,))


def _reason(taken: Tried, meter: Meter, frame: Frame) -> str:
    kept, whole = sum(taken.nested.counts), sum(shape.numel() for shape in frame.masks.shapes)
    reading = taken.reading
    threshold = f"{taken.nested.threshold:.3g}"
    posterior = frame.config.score == "posterior"
    by = f"theta (log-odds {threshold})" if posterior else f"magnitude of {threshold}"
    return (
        f"{kept} of {whole} channels are above a threshold on {by}: "
        f"{reading.ratio:.1%} of the {meter.what} ({reading.low:.1%} to {reading.high:.1%}), "
        f"{meter.allowed:.1%} allowed"
    )
