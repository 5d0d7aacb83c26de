"""The Markdown of ``benchmarks.practise`` for Tables 6, 7 and 8: other images, and other criteria."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks import practise_paper as paper
from benchmarks.practise_rows import Record, Row, cells_of, margin, of_cell, with_figures
from benchmarks.practise_tables import heading, saved
from benchmarks.runs_tables import not_reached, of, spread, standard_error

REAL = "practise"
MADE = "synthesized"
OUTSIDE = "imagenet"
NAMES = {REAL: "CIFAR-10", MADE: "made from the network", OUTSIDE: "ImageNet's, 32 pixels"}
TITLES = {
    "data-free": "No image at all",
    "out-of-domain": "Images of other things",
    "criteria": "Criteria by number of dropped blocks",
}
WITHIN = {"data-free": 2.0, "out-of-domain": 1.0}
"""Points that the other images may be behind real ones."""
DECIDED_AT = {"data-free": 500, "out-of-domain": 1000}
MINE = "recoverability"
PAPER = {"data-free": paper.TABLE_6, "out-of-domain": paper.TABLE_7, "criteria": paper.TABLE_8}


def markdown(record: Record) -> str:
    """The whole file of one of these tables."""
    table, made = record.settings.table, with_figures(record.rows)
    lines = [
        *heading(record, TITLES[table]),
        said_of(record),
        *standard_error(record.facts, [of(row).measured for row in made]),
    ]
    if made:
        lines += by_criterion(made) if table == "criteria" else by_images(table, made)
    return "\n".join([*lines, *paper.lines_of(PAPER[table]), *not_reached(record.rows)]) + "\n"


def said_of(record: Record) -> str:
    """What the rows differ in."""
    if record.settings.table == "criteria":
        return (
            "A fixed number of blocks is dropped, lowest score first, and all criteria recover alike. "
            "Recoverability is divided by the measured saving as in the paper, its rivals are not. A seed draws "
            "the calibration images and decides the recovery, and the order of `random`."
        )
    what = f" Made images: {record.settings.synthesis}." if record.settings.synthesis else ""
    return (
        "Blocks are dropped and the network recovers by mimicking, without labels. A seed draws real images and "
        f"those of other things, and decides the recovery; nothing else differs.{what}"
    )


def by_images(table: str, rows: Sequence[Row]) -> list[str]:
    """Every cell and kind of images, and how far the others are behind real ones."""
    other = MADE if table == "data-free" else OUTSIDE
    lines = [
        "",
        "| images | asked | of | seeds | top-1 | change | measured saving | MACs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells_of(rows):
        for method in (REAL, other):
            mine = of_cell(rows, method, cell)
            if not mine:
                continue
            measured = [of(row).measured for row in mine]
            lines.append(
                f"| {cell[0]} | {cell[1]:.0%} | {NAMES[method]} | {len(mine)} | "
                f"{spread([one.top1 for one in measured])} | {spread([one.change for one in measured], '+.2f')} | "
                f"{saved(mine)} | -{statistics.mean(one.macs_saving for one in measured):.1f}% |"
            )
    lines.append("")
    for count, asked in cells_of(rows):
        found = margin(rows, (other, count, asked), (REAL, count, asked))
        if found is None:
            continue
        allowed, verdict = WITHIN[table], ""
        if count == DECIDED_AT[table]:
            within = found.mean >= -allowed - 1e-9
            verdict = f"; {'within' if within else 'not within'} the {allowed:g} points that are allowed"
        lines.append(f"- {count} images, {asked:.0%}: against real ones {found}{verdict}.")
    return lines


def by_criterion(rows: Sequence[Row]) -> list[str]:
    """Top-1 of each criterion at each number of dropped blocks, and where recoverability is first."""
    lines: list[str] = []
    for count in sorted({row.variant.count for row in rows}):
        mine = [row for row in rows if row.variant.count == count]
        drops = [asked for _, asked in cells_of(mine)]
        names = list(dict.fromkeys(row.variant.method for row in mine))
        lines += [
            "",
            f"## {count} images",
            "",
            "Top-1 in percent, mean ± standard deviation over seeds, and the measured saving.",
            "",
            *_grid(mine, count, drops, names, _shown),
            "",
            "Agreement with the original on the test images, in percent: what is recovered is the original, and "
            "this says how much of it is back, whether its answers are right or not.",
            "",
            *_grid(mine, count, drops, names, _agreeing),
        ]
        lines += ["", *(_first(mine, count, drop, names) for drop in drops), "", _counted(mine, count, drops)]
    return lines


def _grid(
    rows: Sequence[Row],
    count: int,
    drops: Sequence[float],
    names: Sequence[str],
    shown: Callable[[Sequence[Row]], str],
) -> list[str]:
    """A line for each criterion, a column for each number of dropped blocks."""
    lines = [f"| criterion | {' | '.join(f'{drop:g}' for drop in drops)} |", f"|---|{'---|' * len(drops)}"]
    for name in names:
        cells = [of_cell(rows, name, (count, drop)) for drop in drops]
        lines.append(f"| {name} | {' | '.join(map(shown, cells))} |")
    return lines


def _agreeing(rows: Sequence[Row]) -> str:
    return spread([of(row).measured.agreement for row in rows]) if rows else ""


def _shown(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    saving = statistics.mean(of(row).measured.saving for row in rows)
    return f"{spread([of(row).top1 for row in rows])} (-{saving:.1f}%)"


def _means(rows: Sequence[Row], count: int, drop: float) -> dict[str, float]:
    """The mean top-1 of each criterion that has a row in the cell."""
    names = dict.fromkeys(row.variant.method for row in rows)
    cells = {name: of_cell(rows, name, (count, drop)) for name in names}
    return {name: statistics.mean(of(row).top1 for row in found) for name, found in cells.items() if found}


def _first(rows: Sequence[Row], count: int, drop: float, names: Sequence[str]) -> str:
    """How recoverability stands to the best of the others."""
    means = _means(rows, count, drop)
    others = {name: means[name] for name in names if name in means and name != MINE}
    if MINE not in means or not others:
        return f"- {drop:g} dropped: there are not two criteria to compare yet."
    best = max(others, key=others.__getitem__)
    found = margin(rows, (MINE, count, drop), (best, count, drop))
    same = _same_blocks(rows, count, drop, best)
    return f"- {drop:g} dropped: recoverability less `{best}`, the best of the others: {found}{same}."


def _same_blocks(rows: Sequence[Row], count: int, drop: float, best: str) -> str:
    """At how many seeds both dropped the same blocks, where at any."""
    mine, theirs = (
        {row.seed: set(of(row).dropped) for row in of_cell(rows, name, (count, drop))}
        for name in (MINE, best)
    )
    equal = sum(mine[seed] == theirs.get(seed) for seed in mine)
    return f"; the same blocks at {equal} of {len(mine)} seeds" if equal else ""


def _counted(rows: Sequence[Row], count: int, drops: Sequence[float]) -> str:
    """At how many numbers of dropped blocks recoverability has the highest mean, or shares it."""
    compared = [means for drop in drops if len(means := _means(rows, count, drop)) > 1 and MINE in means]
    first = sum(means[MINE] >= max(means.values()) - 1e-9 for means in compared)
    return f"Recoverability is first, or level with the first, at {first} of {len(compared)} numbers."
