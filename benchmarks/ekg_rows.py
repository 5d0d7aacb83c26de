"""What ``benchmarks.ekg`` keeps of its runs: percent, points of accuracy, and the seconds of a run's stages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from optpipe.types import Table


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of a table: which filters go by what, and what teaches the recovery."""

    name: str
    score: str
    guide: str
    teachers: str


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured. ``widths`` are channels kept of each narrowed group, ``tables`` the search's."""

    saving: float
    saving_low: float
    saving_high: float
    macs_saving: float
    parameters_saving: float
    original_top1: float
    before_recovery: float
    top1: float
    agreement: float
    met: bool
    stages: dict[str, float]
    widths: tuple[tuple[str, int], ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def change(self) -> float:
        """Points of top-1 against the original."""
        return self.top1 - self.original_top1

    @property
    def search_s(self) -> float:
        """Seconds of the search."""
        return self.stages.get("analyze", 0.0)

    @property
    def recover_s(self) -> float:
        """Seconds of the recovery, a memory bank with it."""
        return self.stages.get("recover", 0.0)

    @property
    def whole_s(self) -> float:
        """Seconds of all stages."""
        return sum(self.stages.values())


@dataclass(frozen=True, slots=True)
class Row:
    """One run: its figures, or why there are none."""

    variant: Variant
    seed: int
    figures: Figures | None
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Where and on what the runs were made."""

    executed_on: str
    platform: str
    versions: dict[str, str]
    calibration_count: int
    evaluation_count: int


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


@dataclass(frozen=True, slots=True)
class Record:
    """A table as it is kept: rows in the order in which they were made."""

    settings: Settings
    date: str
    facts: Facts | None
    rows: tuple[Row, ...]


def of(row: Row) -> Figures:
    """The figures of a row that has some."""
    assert row.figures is not None
    return row.figures


def by_variant(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each variant, in the order in which variants first appear."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.variant.name, []).append(row)
    return found


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± standard deviation, or the one value."""
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def searched_s(rows: list[Row], row: Row) -> float:
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
