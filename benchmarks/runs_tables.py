"""What the tables of :mod:`benchmarks.runs` have in common: where they were made, and who is first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.runs import F, Facts, Figures, Record, Row, S, V
from optpipe.types import Cell, Table


@dataclass(frozen=True, slots=True)
class Summary:
    """Top-1 of one variant over its seeds; ``sd`` is None for a single one."""

    name: str
    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.by_seed.values())

    @property
    def sd(self) -> float | None:
        """The sample's standard deviation."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    def __str__(self) -> str:
        return f"`{self.name}` {spread(list(self.by_seed.values()))}"


def of(row: Row[V, F]) -> F:
    """The figures of a row that has some."""
    assert row.figures is not None
    return row.figures


def by_variant(rows: Sequence[Row[V, F]]) -> dict[str, list[Row[V, F]]]:
    """The rows of each variant, in the order in which variants first appear."""
    found: dict[str, list[Row[V, F]]] = {}
    for row in rows:
        found.setdefault(row.variant.name, []).append(row)
    return found


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± standard deviation, or the one value."""
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form.removeprefix('+')}}" if len(values) > 1 else mean


def summaries(rows: Sequence[Row[V, F]], names: Sequence[str]) -> list[Summary]:
    """Top-1 of those of these variants that have a figure, best first."""
    found = by_variant(rows)
    made = [Summary(name, {row.seed: of(row).top1 for row in found[name]}) for name in names if name in found]
    return sorted(made, key=lambda one: -one.mean)


def who_is_first(rows: Sequence[Row[V, F]], names: Sequence[str]) -> str:
    """Which of these variants is first, by how much, and whether the spread would hide it."""
    ordered = summaries(rows, names)
    if len(ordered) < 2:
        return "There are not two configurations to compare yet."
    best, second = ordered[:2]
    shared = sorted(set(best.by_seed) & set(second.by_seed))
    ahead = sum(best.by_seed[seed] > second.by_seed[seed] for seed in shared)
    gap = best.mean - second.mean
    if gap == 0:
        verdict = f"{best} and {second} are level"
    else:
        verdict = f"{best} is first, {gap:.2f} points before {second}"
    if best.sd is None or second.sd is None:
        apart = "with a single seed there is no spread to judge that by"
    elif best.mean - best.sd <= second.mean + second.sd:
        apart = "mean ± sd overlap"
    else:
        apart = "mean ± sd do not overlap"
    return f"{verdict}; {apart}; ahead at {ahead} of {len(shared)} equal seeds."


def unequal_seeds(rows: Sequence[Row[V, F]]) -> list[str]:
    """A warning where a configuration lacks a seed that another has."""
    if len({frozenset(row.seed for row in mine) for mine in by_variant(rows).values()}) < 2:
        return []
    return ["- Not all configurations have the same seeds: their means are not of the same runs."]


def heading(record: Record[S, V, F], title: str, machine: str, command: str) -> list[str]:
    """Title, date, machine and versions, and the command that wrote it all."""
    facts, where = record.facts, machine
    if facts is not None:
        versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        validated = f", {facts.validation_count} validation" if facts.validation_count else ""
        where = (
            f"{facts.executed_on}, {facts.platform}; {versions}; {facts.calibration_count} training"
            f"{validated} and {facts.evaluation_count} test images, which are disjoint"
        )
    return [f"# {title}", "", f"{record.date}, {where}. Written by `python -m {command}`.", ""]


def circumstances(workers: int, overrides: Sequence[str]) -> str:
    """How many runs went at a time, and what they were given besides."""
    text = ""
    if workers > 1:
        text += (
            f" {workers} runs went at a time, each with its share of the cores, one engine timed at a "
            "time; what trains beside it disturbs latencies and seconds somewhat."
        )
    if overrides:
        text += f" Besides: {', '.join(f'`{word}`' for word in overrides)}."
    return text


def standard_error(facts: Facts | None, made: Sequence[Figures]) -> list[str]:
    """How coarse the test set is."""
    if facts is None or not made:
        return []
    count = facts.evaluation_count
    top1 = statistics.mean(one.top1 for one in made)
    error = math.sqrt(top1 * (100 - top1) / count)
    return [
        "",
        f"Original top-1: {made[0].original_top1:.2f}. On {count} test images one image is "
        f"{100 / count:.2f} points, and the standard error of one accuracy of {top1:.1f}% is {error:.2f}; "
        "nothing is chosen by these images.",
    ]


def not_reached(rows: Sequence[Row[V, F]]) -> list[str]:
    """The runs without figures, and why."""
    failed = [row for row in rows if row.figures is None]
    lines = ["", "## Not reached", ""] if failed else []
    return lines + [f"- {row.variant.name}, seed {row.seed}: {row.failed}" for row in failed]


def cells(tables: Sequence[Table], title: str, columns: tuple[str, ...]) -> list[tuple[Cell, ...]]:
    """These columns of the report's table of this title; nothing where there is none."""
    table = next((one for one in tables if one.title == title), Table(title, columns, ()))
    places = [table.columns.index(column) for column in columns]
    return [tuple(row[place] for place in places) for row in table.rows]
