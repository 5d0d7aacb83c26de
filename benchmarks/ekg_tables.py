"""The Markdown that ``benchmarks.ekg`` makes of its rows, with statements that follow from the numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ekg_rows import Figures, Record, Row

PAPER_EPOCHS = 100
PAPER_IMAGES = 50_000
PAPER_TIME = 1.29
ALLOWED_TIME = 1.35

GUIDES = ("ekg-ensemble-none", "ekg-single-none", "ekg-none-none")
TEACHERS = ("ekg-ensemble-ensemble", "ekg-ensemble-single", "ekg-ensemble-none")
SCORERS = ("ekg-ensemble-none", "gbn", "fpgm", "l1", "random")

# Torch-Pruning on the same 500 images and 300 iterations, measured on two cores before this benchmark existed
# (issue 4): percent of the channels, latency, MACs, top-1 before recovery and after, on 846 test images.
EARLIER = (
    (40, 0.0, 41.4, 67.9, 91.3),
    (50, 23.4, 49.6, 44.2, 91.5),
    (55, 27.5, 55.8, 18.2, 89.5),
    (60, 28.9, 61.5, 13.0, 88.4),
)


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


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± standard deviation, or the one value."""
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def markdown(record: Record) -> str:
    """The whole file."""
    made = [row for row in record.rows if row.figures is not None]
    lines = [*heading(record), *standard_error(record, made)]
    if made:
        lines += SECTIONS[record.settings.table](made)
    failed = [row for row in record.rows if row.figures is None]
    if failed:
        lines += ["", "## Not reached", ""]
        lines += [f"- {row.variant.name}, seed {row.seed}: {row.failed}" for row in failed]
    return "\n".join(lines) + "\n"


def heading(record: Record) -> list[str]:
    """Title, date, machine, versions and scale."""
    settings, facts = record.settings, record.facts
    titles = {
        "macs": "EKG at equal MACs",
        "latency": "EKG at equal measured latency",
        "time": "EKG: what the memory bank costs",
        "tiny": "EKG on 500 images",
    }
    lines = [f"# {titles[settings.table]}, {settings.network}", ""]
    where = settings.machine
    if facts is not None:
        versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        where = (
            f"{facts.executed_on}, {facts.platform}; {versions}; {facts.calibration_count} training and "
            f"{facts.evaluation_count} test images, which are disjoint"
        )
    lines += [f"{record.date}, {where}. Written by `python -m benchmarks.ekg {settings.table}`.", ""]
    asked = f"Asked of each run: {' or '.join(settings.budgets)}. "
    if settings.table == "tiny":
        asked += f"All recover in {settings.steps} iterations of 64 images."
    else:
        asked += (
            f"All fine-tune for {settings.epochs:g} epochs with equal batch, views and images (the paper: "
            f"{PAPER_EPOCHS} epochs of {PAPER_IMAGES} images)."
        )
    if settings.table == "macs":
        asked += (
            ' Accuracy is compared here, so `method.timed = "last"`: only the result is built and timed, not '
            "each step of the search."
        )
    if settings.overrides:
        asked += f" Besides: {', '.join(f'`{word}`' for word in settings.overrides)}."
    return [*lines, asked]


def standard_error(record: Record, made: list[Row]) -> list[str]:
    """How coarse the test set is."""
    if record.facts is None or not made:
        return []
    count = record.facts.evaluation_count
    top1 = statistics.mean(of(row).top1 for row in made)
    error = math.sqrt(top1 * (100 - top1) / count)
    return [
        "",
        f"Original top-1: {of(made[0]).original_top1:.2f}. On {count} test images one image is "
        f"{100 / count:.2f} points, and the standard error of one accuracy of {top1:.1f}% is {error:.2f}; "
        "nothing is chosen by these images.",
    ]


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


def single_rows(rows: list[Row]) -> list[str]:
    """Every run by itself."""
    lines = [
        "",
        "| configuration | score | guide | teachers | seed | measured saving (95% interval) | MACs | "
        "parameters | before recovery | top-1 | change, points | agreement | search s | recovery s | whole s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures, variant = of(row), row.variant
        search_s = searched_s(rows, row)
        missed = "" if figures.met else " (budget not met)"
        lines.append(
            f"| {variant.name} | {variant.score} | {variant.guide} | {variant.teachers} | {row.seed} | "
            f"{figures.saving:.1f}% ({figures.saving_low:.1f} to {figures.saving_high:.1f}){missed} | "
            f"-{figures.macs_saving:.1f}% | -{figures.parameters_saving:.1f}% | "
            f"{figures.before_recovery:.1f} | {figures.top1:.2f} | {figures.change:+.2f} | "
            f"{figures.agreement:.1f} | {search_s:.0f} | {figures.recover_s:.0f} | "
            f"{figures.whole_s - figures.search_s + search_s:.0f} |"
        )
    return lines


def summary_table(rows: list[Row]) -> list[str]:
    """Each variant over its seeds."""
    lines = [
        "",
        "| configuration | score | guide | teachers | seeds | top-1 | change, points | before recovery | "
        "measured saving | MACs | parameters | agreement | search s | recovery s | whole s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, mine in by_variant(rows).items():
        variant, all_of = mine[0].variant, [of(row) for row in mine]
        search_s = [searched_s(rows, row) for row in mine]
        whole_s = [one.whole_s - one.search_s + search for one, search in zip(all_of, search_s, strict=True)]
        cells = [
            spread([one.top1 for one in all_of]),
            spread([one.change for one in all_of], "+.2f").replace("± +", "± "),
            spread([one.before_recovery for one in all_of], ".1f"),
            spread([one.saving for one in all_of], ".1f") + "%",
            "-" + spread([one.macs_saving for one in all_of], ".1f") + "%",
            "-" + spread([one.parameters_saving for one in all_of], ".1f") + "%",
            spread([one.agreement for one in all_of], ".1f"),
            *(spread(seconds, ".0f") for seconds in (search_s, [one.recover_s for one in all_of], whole_s)),
        ]
        lines.append(
            f"| {name} | {variant.score} | {variant.guide} | {variant.teachers} | {len(mine)} | "
            f"{' | '.join(cells)} |"
        )
    return lines


def summaries(rows: list[Row], names: Sequence[str]) -> list[Summary]:
    """Top-1 of those of these variants that have a figure, best first."""
    found = by_variant(rows)
    made = [Summary(name, {row.seed: of(row).top1 for row in found[name]}) for name in names if name in found]
    return sorted(made, key=lambda one: -one.mean)


def who_is_first(rows: list[Row], names: Sequence[str]) -> str:
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


def ladder(rows: list[Row], names: Sequence[str]) -> str:
    """Whether the mean top-1 of these variants falls strictly in the order in which they are named."""
    found = {one.name: one for one in summaries(rows, names)}
    absent = [name for name in names if name not in found]
    if absent:
        return f"not decided: no figure of {', '.join(absent)}"
    means = [found[name].mean for name in names]
    held = all(left > right for left, right in itertools.pairwise(means))
    return f"{str(held).lower()}: {', '.join(str(found[name]) for name in names)}"


def compared(rows: list[Row]) -> list[str]:
    """The accuracy tables: statements that follow from the numbers, then the numbers."""
    plain = [name for name in SCORERS if name in by_variant(rows)]
    ordered = summaries(rows, plain)
    ekg_first = len(ordered) > 1 and ordered[0].name == GUIDES[0] and ordered[0].mean > ordered[1].mean
    lines = [
        "",
        f"- Scorers under the same recovery, EKG first: {str(ekg_first).lower()}. {who_is_first(rows, plain)}",
        f"- All configurations: {who_is_first(rows, list(by_variant(rows)))}",
    ]
    if "ekg-none-none" in by_variant(rows):
        lines += [
            f"- Ensemble above Single above None in the search (recovery without teachers): {ladder(rows, GUIDES)}.",
            "- Ensemble above Single above None in the recovery (search guided by the ensemble): "
            f"{ladder(rows, TEACHERS)}.",
        ]
    counts = {len(mine) for mine in by_variant(rows).values()}
    if len(counts) > 1:
        lines.append("- Not all configurations have the same seeds: their means are not of the same runs.")
    return [
        *lines,
        *summary_table(rows),
        "",
        "Mean ± standard deviation over seeds. A seed decides the images of the search, the recovery and the "
        "clock. Rows of a seed that differ in the recovery alone share one search: its seconds are counted "
        "for each of them.",
        *single_rows(rows),
    ]


def time_section(rows: list[Row]) -> list[str]:
    """Seconds with the memory bank against without, seed by seed."""
    found = by_variant(rows)
    pairs = [
        (of(with_bank), of(without))
        for with_bank in found.get(TEACHERS[0], [])
        for without in found.get(TEACHERS[2], [])
        if with_bank.seed == without.seed
    ]
    ratios = {
        "whole run": [one.whole_s / other.whole_s for one, other in pairs],
        "recover stage (bank and fine-tuning)": [one.recover_s / other.recover_s for one, other in pairs],
        "search, bank and fine-tuning over fine-tuning alone": [
            (one.search_s + one.recover_s) / other.recover_s for one, other in pairs
        ],
    }
    lines = [
        "",
        f'Runs with `recover.teachers = "ensemble"` and "none" in turn in one sitting, each anew and without '
        f"a cache. The paper gives {PAPER_TIME:.2f} for fine-tuning; at most {ALLOWED_TIME:.2f} is asked. "
        "Search and bank are paid once, so that the last ratio falls with more epochs.",
        "",
        "| ratio | seeds | mean ± sd | largest | all at most 1.35 |",
        "|---|---|---|---|---|",
    ]
    for name, values in ratios.items():
        if values:
            held = str(max(values) <= ALLOWED_TIME).lower()
            lines.append(f"| {name} | {len(values)} | {spread(values, '.3f')} | {max(values):.3f} | {held} |")
    stages = list(of(rows[0]).stages)
    lines += [
        "",
        f"| configuration | seed | {' | '.join(f'{stage} s' for stage in stages)} | whole s | top-1 |",
        "|---|---|" + "---|" * (len(stages) + 2),
    ]
    for row in rows:
        seconds = " | ".join(f"{of(row).stages.get(stage, 0.0):.1f}" for stage in stages)
        lines.append(
            f"| {row.variant.name} | {row.seed} | {seconds} | {of(row).whole_s:.1f} | {of(row).top1:.2f} |"
        )
    return lines


def beaten(rows: list[Row]) -> list[str]:
    """For each of EKG's runs: the rival's of its seed that save no more time, and which of them it beats."""
    lines = []
    for row in rows:
        if row.variant.score == "torch-pruning":
            continue
        mine = of(row)
        rivals = [
            other for other in rows if other.variant.score == "torch-pruning" and other.seed == row.seed
        ]
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


def widths_lines(rows: list[Row]) -> list[str]:
    """The channels that each of EKG's runs kept inside the blocks of each stage."""
    lines = ["", "| configuration | seed | stage | channels kept: how many blocks |", "|---|---|---|---|"]
    for row in rows:
        if row.variant.score == "torch-pruning":
            continue
        stages: dict[str, list[int]] = {}
        for name, width in of(row).widths:
            stages.setdefault(name.split(".")[0], []).append(width)
        for stage, kept in sorted(stages.items()):
            counts = ", ".join(f"{width}: {kept.count(width)}" for width in sorted(set(kept)))
            lines.append(f"| {row.variant.name} | {row.seed} | {stage} | {counts} |")
    return lines


def tiny_section(rows: list[Row]) -> list[str]:
    """EKG against Torch-Pruning on 500 images, measured in the same sitting, and the earlier figures."""
    return [
        "",
        "The rival is Torch-Pruning's L1 importance with the same share of channels taken out of every block, "
        'recovered by mimicking features as `recover.name = "practise"` does, on the same images, scored and '
        "timed on the same engine beside the original.",
        "",
        *beaten(rows),
        *single_rows(rows),
        "",
        "Measured earlier, on 846 test images and one seed (the rows above are on the test images named at "
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
        *widths_lines(rows),
    ]


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


SECTIONS = {"macs": compared, "latency": compared, "time": time_section, "tiny": tiny_section}
