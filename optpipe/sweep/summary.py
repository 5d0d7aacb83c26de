"""What a sweep came to: every run's line, the joint front, and the best run for each budget. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from optpipe.comparison import Comparison, Row, Side
from optpipe.report import intervals

SCHEMA = "optpipe.sweep/1"
State = Literal["finished", "failed", "not yet"]


@dataclass(frozen=True, slots=True)
class Line:
    """One run. ``asked`` is the share of the latency to save; ``folder`` is where the run is.

    ``row`` is how it compares, None unless it is finished; ``reason`` says why it failed. ``seconds`` are
    those of all its stages. ``elsewhere`` marks what was measured on another machine, or with other versions,
    than most of the runs.
    """

    name: str
    recipe: str
    method: str
    asked: float
    folder: str
    state: State
    reason: str = ""
    seconds: float = 0.0
    row: Row | None = None
    elsewhere: bool = False


@dataclass(frozen=True, slots=True)
class Best:
    """The most accurate of the runs whose measured latency meets a budget; None where none does.

    ``of`` is how many met it, whatever they were asked for; ``level`` names those of them whose accuracy is
    not surely lower: the 95% interval of the difference holds 0.
    """

    asked: float
    run: str | None
    of: int
    level: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Summary:
    """What sweep.json holds. ``finished`` and ``failed`` count runs."""

    schema: str
    finished: int
    failed: int
    lines: tuple[Line, ...]
    best: tuple[Best, ...]


def summarise(lines: Sequence[Line], compared: Comparison | None) -> Summary:
    """The lines with how they compare, and the best for each budget that was asked, the mildest first.

    ``compared`` holds a row for each finished line, in their order; None where there is none.
    """
    rows = {} if compared is None else {row.run: row for row in compared.rows}
    usual = _usual(list(rows.values()))
    joined = tuple(_with_row(line, rows.get(line.folder), usual) for line in lines)
    here = [line for line in joined if line.row is not None and not line.elsewhere]
    asked = sorted({line.asked for line in joined})
    return Summary(
        SCHEMA,
        finished=sum(line.state == "finished" for line in joined),
        failed=sum(line.state == "failed" for line in joined),
        lines=joined,
        best=tuple(best(here, reduction) for reduction in asked),
    )


def best(lines: Sequence[Line], reduction: float) -> Best:
    """Of comparable finished runs the most accurate that saves so much; of equals the fastest."""
    meeting = [(line, line.row) for line in lines if line.row is not None and saves(line.row, reduction)]
    if not meeting:
        return Best(reduction, None, 0)
    chosen, row = max(meeting, key=lambda one: (one[1].result.quality.value, -one[1].latency_ratio))
    level = [
        line.name for line, other in meeting if line is not chosen and not _surely(row.result, other.result)
    ]
    return Best(reduction, chosen.name, len(meeting), tuple(level))


def saves(row: Row, reduction: float) -> bool:
    """Whether the measured latency meets a budget, as a run's own report judges it: by the median ratio."""
    return row.latency_ratio <= 1.0 - reduction


def _surely(first: Side, second: Side) -> bool:
    """Whether the first is more accurate beyond the 95% interval of the difference.

    Both saw the same images, and how often each agrees with the original bounds how often the two differ.
    """
    differ = intervals.disagreements(first, second)
    low, _ = intervals.difference(first.quality, second.quality, differ)
    return low > 0


def _usual(rows: Sequence[Row]) -> str | None:
    """The machine that measured most of the runs, of equally many the later."""
    counted = Counter(row.machine for row in rows)
    order = [row.machine for row in rows]
    return max(counted, key=lambda machine: (counted[machine], order.index(machine)), default=None)


def _with_row(line: Line, row: Row | None, usual: str | None) -> Line:
    return replace(line, row=row, elsewhere=row is not None and row.machine != usual)
