"""EKG on 500 images against Torch-Pruning: who saves more and is better, and on which channel counts."""

from __future__ import annotations

import math
import re
from collections import Counter

from benchmarks.ekg_rows import Row
from benchmarks.runs import Figures
from benchmarks.runs_tables import cells, of

RIVAL = "torch-pruning"
# Tables of EKG's report.
COUNTS = "Channel counts on this target"
STEPS = "Predicted and measured saving, step by step"
WIDTHS = "Widths"

# Torch-Pruning on the same 500 images and 300 iterations, measured on two cores before this benchmark existed
# (issue 4): percent of the channels, latency, MACs, top-1 before recovery and after, on 846 test images.
EARLIER = (
    (40, 0.0, 41.4, 67.9, 91.3),
    (50, 23.4, 49.6, 44.2, 91.5),
    (55, 27.5, 55.8, 18.2, 89.5),
    (60, 28.9, 61.5, 13.0, 88.4),
)


def tiny_section(rows: list[Row]) -> list[str]:
    """EKG against Torch-Pruning on 500 images, measured in the same sitting, and the earlier figures."""
    return [
        "",
        "The rival is Torch-Pruning's L1 importance with the same share of channels taken out of every block, "
        'recovered by mimicking features as `recover.name = "practise"` does, on the same images, scored and '
        "timed on the same engine beside the original.",
        "",
        *beaten(rows),
        "",
        "Measured earlier with ResNet-56, on 846 test images and one seed (the rows here are on those named at "
        "the top):",
        "",
        "| Torch-Pruning, L1 | measured saving | MACs | before recovery | top-1 |",
        "|---|---|---|---|---|",
        *[
            f"| {share}% | {saving:.1f}% | -{macs:.1f}% | {before:.1f} | {top1:.1f} |"
            for share, saving, macs, before, top1 in EARLIER
        ],
        "",
        "## Channel counts",
        *free_macs(rows),
        "",
        *[line for row in rows if row.variant.score != RIVAL for line in on_rungs(row)],
        *widths_lines(rows),
    ]


def beaten(rows: list[Row]) -> list[str]:
    """For each of EKG's runs: the rival's of its seed that save no more time, and which of them it beats."""
    lines = []
    for row in rows:
        if row.variant.score == RIVAL:
            continue
        mine = of(row)
        rivals = [other for other in rows if other.variant.score == RIVAL and other.seed == row.seed]
        slower = [other for other in rivals if of(other).saving <= mine.saving]
        better = [other.variant.name for other in slower if mine.top1 > of(other).top1]
        not_better = [other.variant.name for other in slower if mine.top1 <= of(other).top1]
        over = [
            other.variant.name
            for other in rivals
            if of(other).saving > mine.saving and of(other).top1 >= mine.top1
        ]
        text = f"- {row.variant.name}, seed {row.seed}: {mine.saving:.1f}% saved, top-1 {mine.top1:.2f}. Of rivals that save no more it beats {', '.join(better) or 'none'}"
        text += f"; it does not beat {', '.join(not_better)}" if not_better else ""
        text += f"; {', '.join(over)} save more and are at least as good" if over else ""
        lines.append(text + ".")
    return lines


def free_macs(rows: list[Row]) -> list[str]:
    """Points of MACs that bought each point of time: where the rival's 40% step bought next to none."""
    lines = [
        "",
        "| configuration | seed | MACs | measured saving | of the MACs' share |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        figures = of(row)
        share = figures.saving / figures.macs_saving if figures.macs_saving else math.nan
        lines.append(
            f"| {row.variant.name} | {row.seed} | -{figures.macs_saving:.1f}% | {figures.saving:.1f}% | "
            f"{share:.2f} |"
        )
    return lines


def widths_lines(rows: list[Row]) -> list[str]:
    """The channels that each of EKG's runs kept inside the blocks of each stage."""
    lines = ["", "| configuration | seed | stage | channels kept: how many blocks |", "|---|---|---|---|"]
    for row in rows:
        if row.variant.score == RIVAL:
            continue
        stages: dict[str, list[int]] = {}
        for name, width in of(row).widths:
            stages.setdefault(name.split(".")[0], []).append(width)
        for stage, kept in sorted(stages.items()):
            counts = ", ".join(f"{width}: {kept.count(width)}" for width in sorted(set(kept)))
            lines.append(f"| {row.variant.name} | {row.seed} | {stage} | {counts} |")
    return lines


def on_rungs(row: Row) -> list[str]:
    """Whether a search stayed on channel counts that save time, as the tables of its report have it."""
    figures, name = of(row), f"- {row.variant.name}, seed {row.seed}"
    timed = counts_of(figures)
    if not timed:
        return [f"{name}: its report has no table of channel counts."]
    widths = [
        (str(group), int(str(had)), int(str(kept)))
        for group, had, kept in cells(figures.tables, WIDTHS, ("group", "channels", "kept"))
    ]
    narrowed = [(group, had, kept) for group, had, kept in widths if kept < had]
    off = [(group, had, kept) for group, had, kept in narrowed if not timed.get(had, {}).get(kept)]
    text = f"{name}: {len(narrowed) - len(off)} of {len(narrowed)} narrowed groups keep a count that was measured to save time"
    if off:
        text += "; the others, which a finer last step can make: "
        text += ", ".join(f"{group} {kept} of {had}" for group, had, kept in off)
    lines = [f"{text}."]
    near = []
    for had, counts in sorted(timed.items()):
        count = min(counts, key=lambda count: abs(count - had * 0.6))
        taken = sum(kept == count for _, other, kept in narrowed if other == had)
        verdict = "saves time" if counts[count] else "passed over"
        near.append(f"{count} of {had} {verdict}, kept by {taken} groups")
    lines.append(f"  - The timed counts next to the rival's 40% step: {'; '.join(near)}.")
    steps = Counter(str(cell) for (cell,) in cells(figures.tables, STEPS, ("this step",)) if cell is not None)
    if steps:
        said = ", ".join(f"{count} {verdict}" for verdict, count in steps.most_common())
        lines.append(f"  - Accepted steps by what the engine measured: {said}.")
    return lines


def counts_of(figures: Figures) -> dict[int, dict[int, bool]]:
    """For each width of the original the counts that the search timed, and whether one saves time."""
    found: dict[int, dict[int, bool]] = {}
    for groups, count, verdict in cells(figures.tables, COUNTS, ("groups", "channels each", "verdict")):
        width = re.search(r"(\d+) channels", str(groups))
        if width is not None:
            found.setdefault(int(width[1]), {})[int(str(count))] = verdict == "taken"
    return found
