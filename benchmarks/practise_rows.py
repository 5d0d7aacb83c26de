"""What ``benchmarks.practise`` keeps of its runs besides what every benchmark of runs does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks import runs
from benchmarks.dllp_tables import Paired
from benchmarks.runs_tables import of


@dataclass(frozen=True, slots=True)
class Variant:
    """One cell of a table: who, on how many calibration images, and how much is asked.

    ``asked`` is a share of the latency, or in the table of criteria a number of blocks. ``sets`` are what the
    row sets besides what all rows do.
    """

    name: str
    method: str
    count: int
    asked: float
    sets: tuple[str, ...]

    @property
    def cell(self) -> tuple[int, float]:
        """What rows that are compared have in common."""
        return self.count, self.asked


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured, the blocks that it dropped and the steps that it recovered for."""

    measured: runs.Figures
    dropped: tuple[str, ...]
    steps: int

    @property
    def top1(self) -> float:
        """Percent."""
        return self.measured.top1


@dataclass(frozen=True, slots=True)
class Settings:
    """What must be equal for rows to stand in one table; ``steps`` are those of each recovery.

    ``synthesis`` is what the images of the rows without real ones were made with, "" where there are none such.
    """

    table: str
    network: str
    recipe: str
    steps: int
    overrides: tuple[str, ...]
    machine: str
    workers: int = 1
    synthesis: str = ""


Job: TypeAlias = runs.Job[Variant]
Row: TypeAlias = runs.Row[Variant, Figures]
Record: TypeAlias = runs.Record[Settings, Variant, Figures]


def with_figures(rows: Sequence[Row]) -> list[Row]:
    """The rows that came to something."""
    return [row for row in rows if row.figures is not None]


def of_cell(rows: Sequence[Row], method: str, cell: tuple[int, float]) -> list[Row]:
    """The rows of a method at so many images and so much asked, by seed."""
    found = [row for row in with_figures(rows) if row.variant.method == method and row.variant.cell == cell]
    return sorted(found, key=lambda row: row.seed)


def cells_of(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """All cells that have a row, the least asked first, then the fewest images."""
    return sorted({row.variant.cell for row in rows}, key=lambda cell: (cell[1], cell[0]))


def margin(rows: Sequence[Row], mine: tuple[str, int, float], other: tuple[str, int, float]) -> Paired | None:
    """Top-1 of ``mine`` less that of ``other`` at the seeds that both have; None where there are none.

    Either is a method, a number of images and what is asked.
    """
    here, there = (
        {row.seed: of(row).top1 for row in of_cell(rows, method, (count, asked))}
        for method, count, asked in (mine, other)
    )
    shared = sorted(set(here) & set(there))
    return Paired({seed: here[seed] - there[seed] for seed in shared}) if shared else None
