"""What ``benchmarks.three_d`` keeps of its runs besides what every benchmark of runs does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from benchmarks import runs

# Tables of the method's report.
OPTIMUM = "The optimum, predicted and built"
POINTS = "Accuracy along each dimension"
PREDICTORS = "Accuracy predictors"
SURFACE = "The surface of the "
KEPT = (OPTIMUM, POINTS, PREDICTORS, SURFACE)


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of a table: along which dimensions it prunes."""

    name: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured, where its network lies, and the steps that it trained for.

    ``trainings`` are those of the search, of ``search_steps`` together.
    """

    measured: runs.Figures
    d: float
    w: float
    r: float
    dropped: int
    size: str
    trainings: int
    search_steps: int
    recover_steps: int

    @property
    def top1(self) -> float:
        """Percent."""
        return self.measured.top1

    @property
    def steps(self) -> int:
        """Steps of all trainings."""
        return self.search_steps + self.recover_steps

    @property
    def where(self) -> str:
        """(d, w, r) in words."""
        return f"{self.d:.3g}, {self.w:.3g}, {self.r:.3g}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What must be equal for rows to stand in one table; ``epochs`` of the last fine-tuning of several.

    ``shared`` is what the benchmark itself sets for all rows alike, ``overrides`` what the caller sets besides.
    """

    table: str
    network: str
    budget: str
    epochs: float
    overrides: tuple[str, ...]
    machine: str
    workers: int = 1
    shared: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """What the budget counts, as the method's tables call it."""
        return "latency" if self.table == "latency" else "MACs"


Job: TypeAlias = runs.Job[Variant]
Row: TypeAlias = runs.Row[Variant, Figures]
Record: TypeAlias = runs.Record[Settings, Variant, Figures]
