"""What the search shows in the report, as tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optpipe import graph
from optpipe.methods._meter import Meter
from optpipe.methods.three_d.collect import Point
from optpipe.methods.three_d.comparison import comparison, left_out
from optpipe.methods.three_d.config import Config
from optpipe.methods.three_d.cost import fit_cost
from optpipe.methods.three_d.ends import Axis, Costed
from optpipe.methods.three_d.measured import fit_measured
from optpipe.methods.three_d.optimum import Candidate
from optpipe.methods.three_d.settle import Settled
from optpipe.methods.three_d.space import Level, Space, counts
from optpipe.types import Cell, Plan, Table


def blocks(space: Space, scores: Sequence[graph.UnitScore], plan: Plan) -> Table:
    """Every unit that can be dropped: what the probes tell before and behind it."""
    of = {one.name: one for one in scores}
    rows: list[tuple[Cell, ...]] = []
    for name in space.units:
        one = of[name]
        verdict = "dropped" if name in plan.drop_blocks else "kept"
        rank = space.order.index(name) + 1
        rows.append((name, one.before, one.after, one.importance, one.gain, rank, verdict))
    columns = (
        "block", "accuracy before", "accuracy after", "gain in accuracy", "gain in skill", "goes as number",
        "verdict",
    )  # fmt: skip
    return Table("Discrimination of blocks", columns, tuple(rows))


def ratios(space: Space, axis: Axis) -> Table:
    """Every ratio of channels that was measured, and whether the result may have it."""
    rows: list[tuple[Cell, ...]] = []
    most = max(range(len(space.widths.groups)), key=lambda index: space.widths.groups[index].channels)
    for one in axis.costed:
        ratio, reading = one.level.ratio, one.reading
        verdict = "beyond the budget: not needed"
        if one.level in axis.levels:
            taken = one.level in axis.choices
            verdict = "may be taken" if taken else "passed over: not clearly faster than more channels"
        widest = f"{counts(space.widths, ratio)[most]} of {space.widths.groups[most].channels}"
        rows.append((ratio, widest, 1 - reading.ratio, 1 - reading.high, 1 - reading.low, verdict))
    columns = ("ratio", "widest layers keep", "measured saving", "low", "high", "verdict")
    return Table("Ratios of channels on this target", columns, tuple(rows))


def points(found: Sequence[Point], costed: Sequence[Costed], meter: Meter) -> Table:
    """The points of the accuracy predictor (Algorithm 1), each with what its network costs."""
    of = {one.level: one.reading for one in costed}
    rows: list[tuple[Cell, ...]] = []
    for point in found:
        reading = of.get(point.level)
        quality = point.quality
        rows.append(
            (
                " and ".join(point.dimensions) or "none",
                point.rounds,
                *point.share,
                *_built(point.level),
                quality.value,
                quality.ci95[0],
                quality.ci95[1],
                None if reading is None else reading.ratio,
            )
        )
    columns = (
        "pruned along", "rounds", "d", "w", "r", "blocks dropped", "size", "accuracy", "low", "high",
        f"{meter.what} left",
    )  # fmt: skip
    return Table("Accuracy along each dimension", columns, tuple(rows))


def predictors(found: Sequence[Point], config: Config) -> Table:
    """The predictor beside full polynomials on the same points (Table 4)."""
    shares = np.array([point.share for point in found])
    values = np.array([point.quality.value for point in found])
    rows: list[tuple[Cell, ...]] = [
        (row.kind, row.degree, row.ridge, row.train_error, row.left_out_error)
        for row in comparison(shares, values, config.rank, config.degree, monotone=config.monotone)
    ]
    columns = ("predictor", "degree", "ridge", "error on the points", "error on points left out")
    return Table("Accuracy predictors", columns, tuple(rows))


def surface(space: Space, settled: Settled, meter: Meter) -> Table:
    """The cost at every network that was built or counted, beside the smooth fit and what the others tell.

    The surface that the optimum is sought on is exact along the axes: its own errors there say nothing.
    """
    shares = np.array([space.share(one.level) for one in settled.costed])
    values = np.array([one.reading.ratio for one in settled.costed])
    fitted = fit_cost(shares, values)(shares)
    others = left_out(fit_measured, shares, values)
    rows: list[tuple[Cell, ...]] = []
    for one, share, own, left in zip(settled.costed, shares, fitted, others, strict=True):
        reading = one.reading
        rows.append(
            (
                *(float(x) for x in share),
                *_built(one.level),
                reading.ratio,
                reading.low,
                reading.high,
                float(own) / reading.ratio - 1,
                float(left) / reading.ratio - 1,
            )
        )
    columns = (
        "d", "w", "r", "blocks dropped", "size", f"{meter.what} left", "low", "high", "smooth fit off by",
        "left out, off by",
    )  # fmt: skip
    return Table(f"The surface of the {meter.what}", columns, tuple(rows))


def optima(settled: Settled, meter: Meter) -> Table:
    """The optimum as the solver and as the grid found it, and each network that was then built."""
    best = settled.optimum
    agree = "agrees with the grid" if best.agree else "does not agree with the grid"
    rows: list[tuple[Cell, ...]] = []
    if best.solver is not None:
        rows.append(("solver", *_continuous(best.solver), agree))
    rows.append(("dense grid", *_continuous(best.grid), "" if best.solver else "the solver found nothing"))
    for number, one in enumerate(settled.attempts):
        verdict = "meets the budget" if one.meets else "misses the budget"
        if one is settled.chosen:
            verdict = "chosen"
        rows.append(
            (
                "built" if number == 0 else f"built, correction {number}",
                *one.candidate.point,
                *_built(one.level),
                one.candidate.value,
                one.candidate.cost,
                one.reading.ratio,
                one.off,
                one.reading.high,
                verdict,
            )
        )
    columns = (
        "network", "d", "w", "r", "blocks dropped", "size", "predicted accuracy", f"predicted {meter.what}",
        f"{meter.what} left", "off by", "high", "verdict",
    )  # fmt: skip
    return Table("The optimum, predicted and built", columns, tuple(rows))


def _continuous(one: Candidate) -> tuple[Cell, ...]:
    """The cells of a point that no network lies at."""
    return (*one.point, None, None, one.value, one.cost, None, None, None)


def _built(level: Level) -> tuple[int, str]:
    return level.dropped, f"{level.size[0]}x{level.size[1]}"
