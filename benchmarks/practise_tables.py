"""The Markdown of ``benchmarks.practise images``, with statements that follow from the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks import practise_paper as paper
from benchmarks.practise_rows import Record, Row, Settings, cells_of, margin, of_cell, with_figures
from benchmarks.runs_tables import circumstances, not_reached, of, spread, standard_error

MINE = "practise"
RIVAL = "filters"
FIRST_TRY = {(50, 0.22): 3.2, (500, 0.22): 1.5, (50, 0.35): 3.9, (500, 0.35): 2.7}
"""Points that blocks were ahead of filters by in a first trial, one seed and 300 steps."""
BETTER_BY = 0.5
NAMES = {
    "practise": "blocks by recoverability, mimicking (PRACTISE)",
    "blocks-kd": "the same blocks, KD",
    "blocks-bp": "the same blocks, labels (BP)",
    "filters": "filters, mimicking (MiR)",
    "filters-kd": "filters, KD",
    "filters-bp": "filters, labels (BP)",
}


def markdown(record: Record) -> str:
    """The whole file."""
    made = with_figures(record.rows)
    lines = [
        *heading(record, "Blocks against filters with few images"),
        "A seed draws the calibration images and decides the recovery. Filters are narrowed inside blocks, all "
        "groups by one rate, to the smallest rate at which the engine is measured to be as much faster as is "
        "asked, and widths are rounded to what it runs well. All recoveries take the same steps. Where blocks "
        "recover by KD or labels, the blocks are PRACTISE's; the paper's BP (block) drops the first ones. These two "
        "train the classifier too, at a rate of 0.02 in place of 0.1.",
        *standard_error(record.facts, [of(row).measured for row in made]),
    ]
    if made:
        lines += [*margins(made), *grid(made)]
    for table in (paper.TABLE_2, paper.TABLE_3, paper.TABLE_4):
        lines += paper.lines_of(table)
    return "\n".join([*lines, *not_reached(record.rows)]) + "\n"


def heading(record: Record, title: str) -> list[str]:
    """Title, date, machine, versions and scale."""
    settings, facts = record.settings, record.facts
    where = settings.machine
    if facts is not None:
        versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        where = f"{facts.executed_on}, {facts.platform}; {versions}; {facts.evaluation_count} test images"
    return [
        f"# {title}, {settings.network}",
        "",
        f"{record.date}, {where}. Written by `python -m benchmarks.practise {settings.table}`.",
        "",
        scale_of(settings) + circumstances(settings.workers, settings.overrides),
        "",
    ]


def scale_of(settings: Settings) -> str:
    """How long the rows recover, beside the paper."""
    return (
        f"Scale: each recovery takes {settings.steps} steps (the recipes: 1200; the paper: 2000 of ResNet-34 and 50 "
        f"on ImageNet), recipe `{settings.recipe}`."
    )


def saved(rows: Sequence[Row]) -> str:
    """The mean measured saving, and between which bounds all intervals lie."""
    measured = [of(row).measured for row in rows]
    return (
        f"{statistics.mean(one.saving for one in measured):.1f}% "
        f"({min(one.saving_low for one in measured):.1f} to {max(one.saving_high for one in measured):.1f})"
    )


def margins(rows: Sequence[Row]) -> list[str]:
    """By how much blocks are ahead of filters in each cell, and whether by more than in the first trial."""
    lines = [
        "",
        "## PRACTISE less filters that mimic",
        "",
        "Points of top-1, paired by seed, with the 95% interval of the mean by Student's t. The first trial had "
        f"one seed and 300 steps; a margin passes where it is {BETTER_BY:g} points above that trial's. Its "
        "figures at 35% were against filters that saved only 29%. The paper's are of its Table 3: PRACTISE at "
        "-22.1% less MiR at -18.9%.",
        "",
        "| images | asked | margin | blocks save | filters save | first trial | at least wanted | passes | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    passed: list[bool] = []
    for count, asked in cells_of(rows):
        found = margin(rows, (MINE, count, asked), (RIVAL, count, asked))
        if found is None:
            continue
        first = FIRST_TRY.get((count, round(asked, 4)))
        wanted, verdict = "", ""
        if first is not None:
            # Half a point more, whatever that is in floating point.
            passed.append(found.mean >= first + BETTER_BY - 1e-9)
            wanted, verdict = f"{first + BETTER_BY:+.1f}", "yes" if passed[-1] else "no"
        theirs = paper.of_margin(count, asked)
        mine, others = of_cell(rows, MINE, (count, asked)), of_cell(rows, RIVAL, (count, asked))
        lines.append(
            f"| {count} | {asked:.0%} | {found} | {saved(mine)} | {saved(others)} | "
            f"{'' if first is None else f'{first:+.1f}'} | {wanted} | {verdict} | "
            f"{'' if theirs is None else f'{theirs:+.1f}'} |"
        )
    said = "No margin can be compared with the first trial's yet."
    if passed:
        said = (
            f"{sum(passed)} of {len(passed)} margins beat the first trial's by {BETTER_BY:g} points or more."
        )
    return [*lines, "", said]


def grid(rows: Sequence[Row]) -> list[str]:
    """Every cell and method: top-1 and what was measured."""
    lines = [
        "",
        "## All cells",
        "",
        "Top-1 in percent, mean ± standard deviation over seeds; the measured saving is the mean, with the "
        "lowest and highest bound of the runs' 95% intervals.",
        "",
        "| images | asked | method | seeds | top-1 | change | measured saving | MACs | budget met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells_of(rows):
        for method, name in NAMES.items():
            mine = of_cell(rows, method, cell)
            if not mine:
                continue
            measured = [of(row).measured for row in mine]
            lines.append(
                f"| {cell[0]} | {cell[1]:.0%} | {name} | {len(mine)} | {spread([one.top1 for one in measured])} | "
                f"{spread([one.change for one in measured], '+.2f')} | {saved(mine)} | "
                f"-{statistics.mean(one.macs_saving for one in measured):.1f}% | "
                f"{sum(one.met for one in measured)} of {len(mine)} |"
            )
    return lines
