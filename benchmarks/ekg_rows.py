"""What ``benchmarks.ekg`` keeps of its runs besides what every benchmark of runs does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks import runs
from benchmarks.runs import Facts, Figures
from benchmarks.runs_tables import of


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of a table: which filters go by what, and what teaches the recovery."""

    name: str
    score: str
    guide: str
    teachers: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of no ``optpipe run`` leaves; ``asked`` tells it from one of other settings."""

    figures: Figures
    facts: Facts
    asked: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What must be equal for rows to stand in one table."""

    table: str
    network: str
    budgets: tuple[str, ...]
    epochs: float
    steps: int
    overrides: tuple[str, ...]
    machine: str
    workers: int = 1


Job: TypeAlias = runs.Job[Variant]
Row: TypeAlias = runs.Row[Variant, Figures]
Record: TypeAlias = runs.Record[Settings, Variant, Figures]


def searched_s(rows: Sequence[Row], row: Row) -> float:
    """Seconds of the search that a row stands on.

    Rows of one seed that differ in the recovery alone share one search: the first runs it, the others find
    its answers in the cache, so that theirs is the longest of them.
    """
    mine = row.variant
    return max(
        of(other).search_s
        for other in rows
        if (other.variant.score, other.variant.guide, other.seed) == (mine.score, mine.guide, row.seed)
    )
