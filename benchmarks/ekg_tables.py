"""The Markdown that ``benchmarks.ekg`` makes of its rows, with statements that follow from the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.ekg_rows import Record, Row, searched_s
from benchmarks.ekg_tiny import tiny_section
from benchmarks.runs_tables import (
    by_variant,
    circumstances,
    heading,
    not_reached,
    of,
    spread,
    standard_error,
    summaries,
    unequal_seeds,
    who_is_first,
)

PAPER_EPOCHS = 100
PAPER_IMAGES = 50_000
PAPER_TIME = 1.29
ALLOWED_TIME = 1.35

GUIDES = ("ekg-ensemble-none", "ekg-single-none", "gbn")
TEACHERS = ("ekg-ensemble-ensemble", "ekg-ensemble-single", "ekg-ensemble-none")
SCORERS = ("ekg-ensemble-none", "gbn", "fpgm", "l1", "random")


def markdown(record: Record) -> str:
    """The whole file."""
    made = [row for row in record.rows if row.figures is not None]
    lines = [*introduction(record), *standard_error(record.facts, [of(row) for row in made])]
    if made:
        lines += SECTIONS[record.settings.table](made)
    if made and record.settings.table != "time":
        lines += ["", "## Run by run", *single_rows(made)]
    return "\n".join([*lines, *not_reached(record.rows)]) + "\n"


def introduction(record: Record) -> list[str]:
    """Title, date, machine, versions and scale."""
    settings = record.settings
    titles = {
        "macs": "EKG at equal MACs",
        "latency": "EKG at equal measured latency",
        "time": "EKG: what the memory bank costs",
        "tiny": "EKG on 500 images",
    }
    title = f"{titles[settings.table]}, {settings.network}"
    lines = heading(record, title, settings.machine, f"benchmarks.ekg {settings.table}")
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
    return [*lines, asked + circumstances(settings.workers, settings.overrides)]


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
            spread([one.change for one in all_of], "+.2f"),
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
        f"- EKG first of {len(plain)} scorers under the same recovery: {str(ekg_first).lower()}. {who_is_first(rows, plain)}",
        f"- All configurations: {who_is_first(rows, list(by_variant(rows)))}",
    ]
    if "ekg-single-none" in by_variant(rows):
        lines += [
            f"- Ensemble above Single above None in the search (recovery without teachers): {ladder(rows, GUIDES)}.",
            "- Ensemble above Single above None in the recovery (search guided by the ensemble): "
            f"{ladder(rows, TEACHERS)}.",
        ]
    lines += unequal_seeds(rows)
    return [
        *lines,
        *summary_table(rows),
        "",
        "Mean ± standard deviation over seeds. A seed decides the images of the search, the recovery and the "
        "clock. Rows of a seed that differ in the recovery alone share one search: its seconds are counted "
        "for each of them. All rows share engines of equal structure, and with them the measured channel counts, "
        "which the first row paid for. The seconds of a stage are those of the attempt that finished it.",
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


SECTIONS = {"macs": compared, "latency": compared, "time": time_section, "tiny": tiny_section}
