"""What ``benchmarks.ekg_correlation`` keeps of its networks, and what its tables and figures say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from optpipe.report.figures import Point, scatter_svg

VALIDATION = 32  # images a class
FEWEST = 5  # networks of which a correlation says anything
PREDICTORS = ("validation loss", "condition number", "condition number at the weights", "MACs left")

Score = Literal["random", "l1"]
Interval = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Settings:
    """What must be equal for rows to stand in one table; the defaults are for two cores.

    ``images`` of each class of the validation set, as one batch, go into the condition number.
    """

    network: str = "resnet56"
    networks: int = 30
    epochs: float = 4.0
    lr: float = 0.01
    points: int = 5
    iterations: int = 8
    images: int = 4
    seed: int = 0


PAPER = Settings(networks=50, epochs=200.0, lr=0.1, points=21, iterations=20, images=VALIDATION)


@dataclass(frozen=True, slots=True)
class Row:
    """One sub-network. ``line`` are its condition numbers along the gradient, ``condition`` their mean.

    ``residual`` is the median over the line of the smallest eigenvalue's residual to the largest eigenvalue,
    which is by how much a condition number may be off.
    """

    index: int
    score: Score
    macs_reduction: float
    parameters_reduction: float
    validation_loss: float
    condition: float
    line: tuple[float, ...]
    residual: float
    training_loss: float
    potential_loss: float
    test_error: float
    condition_s: float
    tune_s: float


@dataclass(frozen=True, slots=True)
class Correlation:
    """A predictor's coefficients with the potential loss, each with its bootstrap 95% interval."""

    predictor: str
    pearson: Interval
    spearman: Interval


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that the results hold. ``failed`` are networks without a row and why."""

    settings: Settings
    date: str = ""
    machine: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    rows: tuple[Row, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    correlations: tuple[Correlation, ...] = ()
    difference: Interval | None = None


# ---------------------------------------------------------------- what the rows say


def correlated(record: Record) -> Record:
    """The record with its coefficients, where there are networks enough for any."""
    if len(record.rows) < FEWEST:
        return record
    potential = np.array([row.potential_loss for row in record.rows])
    values = [predictor_values(record.rows, name) for name in PREDICTORS]
    correlations = tuple(
        Correlation(
            name,
            bootstrap(lambda x, y: pearson(x[:, 0], y), column[:, None], potential),
            bootstrap(lambda x, y: spearman(x[:, 0], y), column[:, None], potential),
        )
        for name, column in zip(PREDICTORS, values, strict=True)
    )
    both = np.stack(values[:2], axis=1)
    difference = bootstrap(lambda x, y: pearson(x[:, 1], y) - pearson(x[:, 0], y), both, potential)
    return dataclasses.replace(record, correlations=correlations, difference=difference)


def predictor_values(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    read: dict[str, Callable[[Row], float]] = {
        "validation loss": lambda row: row.validation_loss,
        "condition number": lambda row: row.condition,
        "condition number at the weights": lambda row: row.line[len(row.line) // 2],
        "MACs left": lambda row: 1 - row.macs_reduction,
    }
    return np.array([read[name](row) for row in rows])


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Pearson's coefficient, 0 where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size > 0 else 0.0


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's rank coefficient."""
    return pearson(rankdata(x), rankdata(y))


def bootstrap(
    figure: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
) -> Interval:
    """(the figure of all networks, and the ends of its 95% interval over networks drawn anew)."""
    draws = np.random.default_rng(0).integers(0, len(y), (1000, len(y)))
    low, high = np.percentile([figure(x[draw], y[draw]) for draw in draws], [2.5, 97.5])
    return figure(x, y), float(low), float(high)


# ---------------------------------------------------------------- results


def figure_of(record: Record, name: str) -> str:
    found = [each for each in record.correlations if each.predictor == name]
    note = "".join(f"Pearson {shown(c.pearson)}, Spearman {shown(c.spearman)}" for c in found)
    x = predictor_values(record.rows, name)
    kinds = {"l1": "by L1 norm", "random": "by a random score"}
    points = [
        Point(float(value), row.potential_loss, kinds[row.score])
        for value, row in zip(x, record.rows, strict=True)
    ]
    title = f"{record.settings.network}: potential loss and {name}, {len(points)} sub-networks"
    return scatter_svg(points, title, x_label=name, y_label="potential loss", note=note)


def shown(interval: Interval) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*interval)


def line_of(row: Row) -> str:
    return (
        f"MACs -{row.macs_reduction:.0%} by {row.score}, validation loss {row.validation_loss:.3f}, condition "
        f"number {row.condition:.4f} ({row.condition_s:.0f} s), potential loss {row.potential_loss:.3f} "
        f"({row.tune_s:.0f} s)"
    )


def markdown(record: Record) -> str:
    settings = record.settings
    versions = ", ".join(f"{package} {number}" for package, number in record.versions)
    return (
        "\n".join(
            [
                "# What foretells a sub-network's potential loss",
                "",
                f"{record.date}, {record.machine}, {versions}. {settings.network}, {len(record.rows)} of "
                f"{settings.networks} random sub-networks with 20 to 60% fewer MACs, every third by the L1 norm of its "
                f"filters. Fine-tuned for {settings.epochs:g} epochs at a rate of {settings.lr:g} (the paper: 200 at "
                f"0.1). Condition number: mean of {settings.points} points along the gradient (the paper: 21), at most "
                f"{settings.iterations} Hessian products each (the first thrice that), {settings.images} validation "
                f"images of each class as one batch. Seed {settings.seed}.",
                "",
                *correlation_lines(record),
                *row_lines(record.rows),
                *(f"\nNetwork {index} has no row: {why}" for index, why in record.failed),
            ]
        )
        + "\n"
    )


def correlation_lines(record: Record) -> list[str]:
    if not record.correlations or record.difference is None:
        return [f"Fewer than {FEWEST} networks: no correlation yet.", ""]
    low, high = record.difference[1:]
    verdict = (
        "the condition number foretells more"
        if low > 0
        else "the validation loss foretells more"
        if high < 0
        else "which of the two foretells more is not decided"
    )
    return [
        "| with the potential loss | networks | Pearson (95%) | Spearman (95%) |",
        "|---|---|---|---|",
        *[
            f"| {each.predictor} | {len(record.rows)} | {shown(each.pearson)} | {shown(each.spearman)} |"
            for each in record.correlations
        ],
        "| the paper's Fig. 2: validation loss | 50 | lower; no number in its text | - |",
        "| the paper's Fig. 2: condition number | 50 | higher; no number in its text | - |",
        "",
        f"Pearson of the condition number less that of the validation loss: {shown(record.difference)}: "
        f"{verdict}. Intervals are bootstrapped over the networks. MACs left is what needs no evaluation at all. "
        "The paper fine-tunes on 50,000 images, here there are 4,340, and 423 test images make a coarse "
        "potential loss.",
        "",
    ]


def row_lines(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    condition_s, tune_s = (
        np.median([getattr(row, name) for row in rows]) for name in ("condition_s", "tune_s")
    )
    return [
        f"Seconds a network (median): condition number {condition_s:.1f}, fine-tuning {tune_s:.1f}.",
        "",
        "| network | score | MACs | parameters | validation loss | condition number | along the line | residual | "
        "potential loss | test error |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *[
            f"| {row.index} | {row.score} | {-row.macs_reduction:.1%} | {-row.parameters_reduction:.1%} | "
            f"{row.validation_loss:.4f} | {row.condition:.4f} | {min(row.line):.3f} to {max(row.line):.3f} | "
            f"{row.residual:.1e} | {row.potential_loss:.4f} | {row.test_error:.2%} |"
            for row in rows
        ],
    ]
