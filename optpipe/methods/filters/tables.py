"""The tables of a search by one ratio."""

from __future__ import annotations

from collections.abc import Sequence

from optpipe import graph
from optpipe.methods._meter import Meter
from optpipe.methods._nested import Tried
from optpipe.methods.filters.family import Uniform
from optpipe.types import Cell, ChannelGroup, ModelGraph, Table


def tried(
    widths: graph.WidthMap,
    members: Sequence[Uniform],
    every: Sequence[Tried],
    taken: Tried,
    meter: Meter,
    shown: ModelGraph,
) -> Table:
    """The networks that were built, widest first: what was predicted of each and what was measured."""
    rows: list[tuple[Cell, ...]] = []
    for one in every:
        member, latency = members[one.index], one.trial.latency
        verdict = "meets the budget" if one.meets else "does not meet the budget"
        rows.append(
            (
                member.ratio,
                _in_words(widths.groups, member.counts),
                1 - member.macs,
                1 - one.trial.parameters / shown.parameters,
                member.predicted,
                one.reading.ratio,
                one.reading.low,
                one.reading.high,
                None if latency is None else latency.median_ms,
                "taken: the widest that does" if one is taken else verdict,
            )
        )
    columns = (
        "ratio", "channels", "MACs saved", "parameters saved", f"predicted {meter.what} left",
        f"{meter.what} left", "low", "high", "latency (ms)", "verdict",
    )  # fmt: skip
    return Table("Ratios that were tried", columns, tuple(rows))


def kept(
    every: Sequence[ChannelGroup],
    widths: graph.WidthMap,
    scores: Sequence[Sequence[float]],
    counts: Sequence[int],
    criterion: str,
) -> Table:
    """Every channel group: how many channels it keeps, and where its scores were cut; or why it is whole."""
    rows: list[tuple[Cell, ...]] = []
    index_of = {group.name: index for index, group in enumerate(widths.groups)}
    reasons = {group.name: group.why_not for group in widths.fixed}
    for group in every:
        name, layers, channels = group.name, len(group.layers), group.channels
        if name not in index_of:
            rows.append((name, layers, channels, channels, None, None, reasons[name]))
            continue
        index = index_of[name]
        stay = set(graph.keep_largest(scores[index], counts[index], widths.blocks[index]))
        gone = [value for channel, value in enumerate(scores[index]) if channel not in stay]
        least = min(scores[index][channel] for channel in stay)
        verdict = "narrowed" if gone else "whole"
        rows.append((name, layers, channels, len(stay), least, max(gone, default=None), verdict))
    columns = (
        "group", "layers", "channels", "kept", f"lowest {criterion} kept", "highest removed", "verdict",
    )  # fmt: skip
    return Table("Filters", columns, tuple(rows))


def _in_words(groups: Sequence[ChannelGroup], counts: Sequence[int]) -> str:
    """Each width and what is left of it, "12 of 16, 24 of 32": once where groups agree."""
    pairs = (f"{count} of {group.channels}" for group, count in zip(groups, counts, strict=True))
    return ", ".join(dict.fromkeys(pairs))
