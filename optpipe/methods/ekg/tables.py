"""What EKG's search shows in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optpipe import graph
from optpipe.methods.ekg.reward import Facts, Kept
from optpipe.types import Cell, ChannelGroup, Latency, Table


@dataclass(frozen=True, slots=True)
class Taken:
    """An accepted step: the network it started from (``kept``, ``facts``), the group it narrowed, what came.

    ``macs`` and ``parameters`` are fractions of the original's after the step. ``group`` is None for the
    chosen network itself, which makes no further step.
    """

    facts: Facts
    group: int | None
    kept: Kept
    before: int
    after: int
    reward: float
    macs: float
    parameters: float
    latency: Latency | None


def step_table(groups: Sequence[ChannelGroup], steps: Sequence[Taken]) -> Table:
    """Step by step: what was narrowed, what its MACs predicted, and what the engine measured."""
    rows: list[tuple[Cell, ...]] = []
    before: Latency | None = None
    macs = 1.0
    for number, step in enumerate(steps, start=1):
        assert step.group is not None
        latency = step.latency
        saving = low = high = None
        if latency is not None and latency.ratio_to_original is not None and latency.ratio_ci95 is not None:
            saving = 1.0 - latency.ratio_to_original
            low, high = 1.0 - latency.ratio_ci95[1], 1.0 - latency.ratio_ci95[0]
        rows.append(
            (
                number,
                groups[step.group].name,
                step.before,
                step.after,
                len(step.facts.candidates),
                step.reward,
                1.0 - step.macs,
                saving,
                low,
                high,
                verdict(macs - step.macs, before, latency, first=number == 1),
            )
        )
        before, macs = latency, step.macs
    columns = (
        "step", "group", "channels before", "after", "candidates", "reward", "MACs saved", "measured saving",
        "low", "high", "this step",
    )  # fmt: skip
    return Table("Predicted and measured saving, step by step", columns, tuple(rows))


def verdict(macs: float, before: Latency | None, after: Latency | None, *, first: bool) -> str | None:
    """What a step bought that removed the share ``macs`` of the MACs; None where it was not timed.

    ``before`` is None at the first step, whose network is the original's.
    """
    if after is None or (before is None and not first):
        return None
    low_before, high_before = (1.0, 1.0) if before is None else _interval(before)
    low_after, high_after = _interval(after)
    if high_after < low_before:
        return "saves time"
    # The most that the two intervals allow, against what the MACs promised.
    if high_before - low_after < macs / 4:
        return "buys no time: removes MACs alone"
    return "within the noise"


def _interval(latency: Latency) -> tuple[float, float]:
    assert latency.ratio_ci95 is not None
    return latency.ratio_ci95


def width_table(every: Sequence[ChannelGroup], widths: graph.WidthMap, kept: Kept) -> Table:
    """Every channel group: how many channels it had and keeps, or why it stays whole."""
    rows: list[tuple[Cell, ...]] = []
    counts = {group.name: len(channels) for group, channels in zip(widths.groups, kept, strict=True)}
    reasons = {group.name: group.why_not for group in widths.fixed}
    for group in every:
        if group.name in counts:
            count = counts[group.name]
            verdict = "narrowed" if count < group.channels else "whole"
            rows.append((group.name, len(group.layers), group.channels, count, verdict))
        else:
            rows.append((group.name, len(group.layers), group.channels, group.channels, reasons[group.name]))
    return Table("Widths", ("group", "layers", "channels", "kept", "verdict"), tuple(rows))
