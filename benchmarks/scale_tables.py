"""What ``benchmarks.scale`` measured and simulated, as Markdown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.scale_simulation import Workload, bottleneck, simulate

WORKERS = (1, 8, 64, 256)


@dataclass(frozen=True, slots=True)
class Pair:
    """One batch of scoring requests by one process and by two workers, of one thread each, in turn.

    ``requests`` took ``serial_s`` seconds one after the other, and ``local_s`` from when they were handed
    over to the last answer, the workers' start with it. ``start_s`` of these went by before a worker computed.
    """

    network: str
    steps: int
    requests: int
    serial_s: float
    local_s: float
    start_s: float

    @property
    def ratio(self) -> float:
        """How many times faster."""
        return self.serial_s / self.local_s


@dataclass(frozen=True, slots=True)
class Record:
    """What stands in the file."""

    date: str
    machine: str
    workloads: tuple[Workload, ...] = ()
    pairs: tuple[Pair, ...] = ()


def markdown(record: Record) -> str:
    """The whole page."""
    lines = [
        "# Runs with more workers",
        "",
        f"{record.date}, {record.machine}. Written by `python -m benchmarks.scale`.",
        "",
        *_pairs(record.pairs),
        *_simulated(record.workloads),
    ]
    return "\n".join(lines) + "\n"


def _pairs(pairs: tuple[Pair, ...]) -> list[str]:
    if not pairs:
        return []
    lines = [
        "## Measured: two workers on two cores",
        "",
        'A batch of requests to score blocks (`scorer = "exact"`), by one process and then by `local:2`, one',
        "thread each, in turn. What workers take to start is in their seconds.",
        "",
        "| network | requests | serial, s | local:2, s | of these to start | times faster |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.network}, {one.steps} steps | {one.requests} | {one.serial_s:.1f} | {one.local_s:.1f} "
        f"| {one.start_s:.1f} | {one.ratio:.2f} |"
        for one in pairs
    ]
    ratios = [one.ratio for one in pairs]
    if len(ratios) > 1:
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines += ["", f"Median of {len(ratios)}: {statistics.median(ratios):.2f} times ({spread})."]
    return [*lines, ""]


def _simulated(workloads: tuple[Workload, ...]) -> list[str]:
    lines = [
        "## Simulated from recorded durations",
        "",
        "Each request's seconds were recorded in one process; what follows is arithmetic on them, as",
        '`benchmarks/scale_simulation.py` says. "Meanwhile" is a search that times engines while workers',
        "compute; optpipe times them afterwards. The bottleneck is what most of the run's seconds go by on.",
        "",
    ]
    for one in workloads:
        lines += _workload(one)
    return lines


def _workload(one: Workload) -> list[str]:
    largest = max((len(batch) for batch in one.batches), default=0)
    scaled = f" Seconds of training times {one.factor:g}, to the recipe's steps." if one.factor != 1 else ""
    lines = [
        f"### {one.name}",
        "",
        f"`{one.recorded}`. {sum(map(len, one.batches))} requests in {len(one.batches)} batches, the largest of "
        f"{largest}; computing {one.compute_s:.0f} s, timing {one.timing_s:.0f} s, recovery "
        f"{one.recover_s:.0f} s, all else {one.before_s + one.after_s:.0f} s; a worker starts in "
        f"{one.start_s:.1f} s.{scaled}",
        "",
        "| workers | search, s | faster | meanwhile, s | run, s | faster | bottleneck of the run |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = simulate(one, 1)
    whole = alone.search_s + one.rest_s
    for workers in WORKERS:
        found = simulate(one, workers)
        overlapped = simulate(one, workers, meanwhile=True).search_s
        run = found.search_s + one.rest_s
        lines.append(
            f"| {workers} | {found.search_s:.1f} | {alone.search_s / found.search_s:.2f} | {overlapped:.1f} "
            f"| {run:.1f} | {whole / run:.2f} | {bottleneck(one, found)} |"
        )
    return [*lines, ""]
