"""One ratio for all groups, found by building: the widest network that meets the budget."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from optpipe import graph
from optpipe.errors import RunError
from optpipe.methods import _ladder as ladder
from optpipe.methods import _nested
from optpipe.methods._meter import Meter, meter_of, refuse_met
from optpipe.methods._norms import of_weights
from optpipe.methods.filters import tables
from optpipe.methods.filters.config import Config, Criterion
from optpipe.methods.filters.family import Uniform, family
from optpipe.methods.filters.limits import Scope, check, scope
from optpipe.types import Answer, Choice, Plan, Request, Scene, Search

Scores = Sequence[Sequence[float]]
"""Of each group one number for each channel, low where it may go."""


def search(scene: Scene, config: Config) -> Search:
    """Take the same share of filters out of every group, the smallest share whose network meets the budget.

    Raises:
        UsageError: what :func:`check` refuses, a style that finds nothing to narrow, or a latency that the
            original meets already.
        RunError: not even the narrowest network meets the budget.
    """
    check(scene.graph, scene.calibration, scene.budget, config, scene.recover)
    refuse_met(scene)
    meter, found = meter_of(scene), scope(scene, config)
    widths = found.widths
    costs = graph.Costs(scene.model, scene.graph.input_shape, widths)
    ladders: tuple[ladder.Ladder, ...] = ()
    if config.rounding == "engine" and meter.what == "latency":
        ladders = yield from ladder.measure(widths, costs)
    members = family(widths, costs, meter, ladders)
    if not members:
        raise RunError("no ratio narrows any group: each of them has one channel, or one for each run")
    scores = scores_of(config.criterion, scene, widths)
    taken, tried = yield from _tried(widths, scores, members, meter, config)
    chosen = members[taken.index]
    shown = [tables.tried(widths, members, tried, taken, meter, scene.graph)]
    shown.append(tables.kept(scene.graph.groups, widths, scores, chosen.counts, config.criterion))
    if ladders:
        shown.append(ladder.table(widths.groups, ladders))
    return Choice(taken.plan, scene.recover, _reason(chosen, taken, meter, config, found), tuple(shown))


def scores_of(criterion: Criterion, scene: Scene, widths: graph.WidthMap) -> Scores:
    """The scores of every group's channels, from the original's weights alone."""
    if criterion == "batch_norm":
        return graph.channel_scales(scene.model, widths)
    every = [range(group.channels) for group in widths.groups]
    return [one.tolist() for one in of_weights(criterion, scene.model, widths.groups, every, scene.seed)]


def _tried(
    widths: graph.WidthMap, scores: Scores, members: Sequence[Uniform], meter: Meter, config: Config
) -> Generator[Sequence[Request], Sequence[Answer], tuple[_nested.Tried, tuple[_nested.Tried, ...]]]:
    """The widest member that meets the budget as it is built, and all that were built."""

    def plan_of(index: int) -> Plan:
        return Plan(
            keep_channels=tuple(
                (group.name, graph.keep_largest(values, count, runs))
                for group, values, count, runs in zip(
                    widths.groups, scores, members[index].counts, widths.blocks, strict=True
                )
                if count < group.channels
            )
        )

    mend = "lower the budget, or raise [method] builds"
    if config.style == "normal":
        mend += ', or narrow the residual streams too ([method] style = "residual")'
    return (
        yield from _nested.largest([one.predicted for one in members], plan_of, meter, config.builds, mend)
    )


def _reason(chosen: Uniform, taken: _nested.Tried, meter: Meter, config: Config, found: Scope) -> str:
    groups, reading = found.widths.groups, taken.reading
    every = sum(group.channels for group in groups)
    reason = (
        f"a ratio of {chosen.ratio:.2%} by {config.criterion} leaves {sum(chosen.counts)} of {every} "
        f"channels in {len(groups)} groups: {reading.ratio:.1%} of the {meter.what} ({reading.low:.1%} to "
        f"{reading.high:.1%}), {meter.allowed:.1%} allowed"
    )
    if found.held:
        first = found.held[0]
        reason += f"; of the residual streams {len(found.held)} stay whole ({first.name}: {first.why_not})"
    return reason
