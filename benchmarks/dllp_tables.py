"""The Markdown of ``benchmarks.dllp macs`` and ``latency``, with statements that follow from the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from benchmarks.dllp_rows import Figures, Record, Row, Spike
from benchmarks.runs_tables import (
    by_variant,
    circumstances,
    heading,
    not_reached,
    of,
    spread,
    standard_error,
    unequal_seeds,
)

MINE = "dllp"
RIVAL = "magnitude"
PAPER_EPOCHS = 60.0
LOSSLESS = 0.5
"""Points of accuracy that the cut may change."""
PAPER = (
    ("L1 norm", 93.42, 34.0, 0.5),
    ("SFP", 93.59, 51.0, 0.24),
    ("FPGM", 93.59, 53.0, 0.1),
    ("DLLP", 92.80, 55.0, 0.04),
)
"""Of Table 1, ResNet-56 on CIFAR-10: accuracy before, percent of the operations gone, points lost."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Differences of two configurations at equal seeds, and the 95% interval of their mean by Student's t."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.by_seed.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """None for a single seed."""
        values = list(self.by_seed.values())
        if len(values) < 2:
            return None
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        seeds = ", ".join(f"seed {seed} {value:+.2f}" for seed, value in sorted(self.by_seed.items()))
        between = self.interval
        if between is None:
            return f"{self.mean:+.2f} points (a single seed has no interval)"
        return f"{self.mean:+.2f} points (95% interval {between[0]:+.2f} to {between[1]:+.2f}; {seeds})"


def paired(rows: Sequence[Row], name: str, other: str, value: Callable[[Figures], float]) -> Paired | None:
    """``name`` less ``other`` at the seeds that both have; None where there are none."""
    found = by_variant(rows)
    mine, theirs = (
        {row.seed: value(of(row)) for row in found.get(one, ()) if row.figures is not None}
        for one in (name, other)
    )
    shared = sorted(set(mine) & set(theirs))
    return Paired({seed: mine[seed] - theirs[seed] for seed in shared}) if shared else None


def markdown(record: Record) -> str:
    """The whole file."""
    made = [row for row in record.rows if row.figures is not None]
    lines = [*introduction(record), *standard_error(record.facts, [of(row).measured for row in made])]
    if made:
        lines += [
            "",
            f"- {higher(made)}",
            f"- {calibrated(made)}",
            f"- {lossless(made)}",
            f"- {work(made)}",
            *unequal_seeds(made),
            *summary_table(made),
            *differences(made),
            *spike_section(made),
            *joined_section(made),
            *paper_table(),
            *single_rows(made),
        ]
    return "\n".join([*lines, *not_reached(record.rows)]) + "\n"


def introduction(record: Record) -> list[str]:
    """Title, date, machine, versions and scale."""
    settings = record.settings
    title = {"macs": "equal MACs", "latency": "equal measured latency"}[settings.table]
    training = "".join(f", `{word}`" for word in settings.training)
    return [
        *heading(
            record,
            f"DLLP against magnitude pruning at {title}, {settings.network}",
            settings.machine,
            f"benchmarks.dllp {settings.table}",
        ),
        f"Asked of each run: {settings.budget}. All begin with the original's weights and train for "
        f"{settings.epochs:g} epochs{training} (the paper: 60 of 50000 images). `dllp` learns which filters stay "
        "in the first part of them and trains what stays in the rest; `magnitude` takes the filters of the largest "
        "weights at once and trains them for all of it, for the same number of steps in the same loop. A step of "
        "`dllp` trains two particles, so that it costs about twice as much: the seconds stand in the table. What "
        "is scored and timed is one network, the first particle's, and nothing is trained after the cut."
        + circumstances(settings.workers, settings.overrides),
    ]


def higher(rows: Sequence[Row]) -> str:
    """Whether DLLP's accuracy is the higher one."""
    found = paired(rows, MINE, RIVAL, lambda one: one.top1)
    asked = f"Top-1 of `{MINE}` above `{RIVAL}`'s at the same budget and number of steps"
    if found is None:
        return f"{asked}: not decided, no seed has both."
    ahead = sum(value > 0 for value in found.by_seed.values())
    return f"{asked}: {_said(found.mean > 0)}, {found}; ahead at {ahead} of {len(found.by_seed)} seeds."


def calibrated(rows: Sequence[Row]) -> str:
    """Whether DLLP's calibration error is the lower one."""
    found = paired(rows, MINE, RIVAL, lambda one: one.calibration)
    asked = f"Expected calibration error of `{MINE}` below `{RIVAL}`'s at the same budget"
    if found is None:
        return f"{asked}: not decided, no seed has both."
    lower = sum(value < 0 for value in found.by_seed.values())
    return f"{asked}: {_said(found.mean < 0)}, {found}; lower at {lower} of {len(found.by_seed)} seeds."


def lossless(rows: Sequence[Row]) -> str:
    """Whether the cut changes the accuracy of any network, and by how much its logits."""
    asked = f"Accuracy after the cut within {LOSSLESS} point of the masked network, nothing trained after it"
    found = [one for row in rows if row.variant.name.startswith(MINE) and (one := of(row).spike) is not None]
    if not found:
        return f"{asked}: not decided, no run says."
    largest = max(abs(one.cut - one.masked) for one in found)
    apart = max(one.apart for one in found)
    return (
        f"{asked}: {_said(largest <= LOSSLESS)} in {len(found)} runs of DLLP; at most {largest:.2f} points and "
        f"{apart:.2g} of a logit apart."
    )


def work(rows: Sequence[Row]) -> str:
    """Steps and seconds of the trainings."""
    said = []
    for name, mine in by_variant(rows).items():
        steps = sorted({of(row).steps for row in mine})
        seconds = spread([of(row).trained_s for row in mine], ".0f")
        count = of(mine[0]).particles
        networks = "one network" if count == 1 else f"{count} particles"
        said.append(f"`{name}` {' or '.join(map(str, steps))} steps of {networks} in {seconds} s")
    return f"Training: {'; '.join(said)}."


def summary_table(rows: Sequence[Row]) -> list[str]:
    """Each configuration over its seeds, and the original."""
    lines = [
        "",
        "| rows | seeds | top-1 | change, points | latency over the original's | MACs | parameters | "
        "calibration error | original's | steps | trained s | whole s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, mine in by_variant(rows).items():
        figures = [of(row) for row in mine]
        measured = [one.measured for one in figures]
        shown = [
            spread([one.top1 for one in measured]),
            spread([one.change for one in measured], "+.2f"),
            spread([1 - one.saving / 100 for one in measured], ".3f"),
            "-" + spread([one.macs_saving for one in measured], ".1f") + "%",
            "-" + spread([one.parameters_saving for one in measured], ".1f") + "%",
            spread([one.calibration for one in figures]) + "%",
            spread([one.original_calibration for one in figures]) + "%",
            spread([float(one.steps) for one in figures], ".0f"),
            spread([one.trained_s for one in figures], ".0f"),
            spread([one.whole_s for one in measured], ".0f"),
        ]
        lines.append(f"| {name} | {len(mine)} | {' | '.join(shown)} |")
    return [
        *lines,
        "",
        "Mean ± standard deviation over seeds. A seed decides the order of the images, the masks, the second "
        "particle and the clock. Seconds of a training are those of the attempt that finished it. The calibration "
        "error is over 15 bins of equal width, on the test images.",
    ]


def differences(rows: Sequence[Row]) -> list[str]:
    """Every configuration against magnitude, seed by seed."""
    names = [name for name in by_variant(rows) if name != RIVAL]
    lines = ["", f"## Less `{RIVAL}`, seed by seed", ""]
    for name in names:
        for what, value in (
            ("top-1", lambda one: one.top1),
            ("calibration error", lambda one: one.calibration),
        ):
            found = paired(rows, name, RIVAL, value)
            if found is not None:
                lines.append(f"- `{name}`, {what}: {found}")
    return lines if len(lines) > 3 else []


def spike_section(rows: Sequence[Row]) -> list[str]:
    """Accuracies on the way to the cut."""
    lines = [
        "",
        "## Cutting the spike out",
        "",
        "| rows | seed | masks sampled | by the threshold, before settling | masked at the end | cut | "
        "change, points | largest difference of a logit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one: Spike | None = of(row).spike
        if one is not None:
            lines.append(
                f"| {row.variant.name} | {row.seed} | {_optional(one.sampled)} | {_optional(one.unsettled)} | "
                f"{one.masked:.2f} | {one.cut:.2f} | {one.cut - one.masked:+.2f} | {one.apart:.2g} |"
            )
    return [
        *lines,
        "",
        "Accuracies of the first particle on up to 1000 calibration images, which it was trained on, in percent.",
    ]


def joined_section(rows: Sequence[Row]) -> list[str]:
    """The particles' networks together, which are not what is compared above."""
    found = {
        name: [(of(row), one) for row in mine if (one := of(row).joined) is not None]
        for name, mine in by_variant(rows).items()
    }
    lines = [
        "",
        "## The particles' networks together",
        "",
        "| rows | networks | top-1 | calibration error | of the one network | latency over the original's |",
        "|---|---|---|---|---|---|",
    ]
    for name, pairs in found.items():
        if pairs:
            errors = [one.calibration for _, one in pairs if one.calibration is not None]
            ratios = [one.ratio for _, one in pairs if one.ratio is not None]
            lines.append(
                f"| {name} | {pairs[0][1].members} | {spread([one.top1 for _, one in pairs])} | "
                f"{spread(errors) + '%' if errors else ''} | "
                f"{spread([figures.calibration for figures, _ in pairs])}% | "
                f"{spread(ratios, '.3f') if ratios else ''} |"
            )
    return lines if any(found.values()) else []


def paper_table() -> list[str]:
    """What the paper has, at equal operations and far longer trainings."""
    lines = [
        "",
        "The paper's Table 1, ResNet-56 on CIFAR-10, all 50000 training images:",
        "",
        "| method | before | operations | change, points |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| {name} | {top1:.2f} | -{gone:.0f}% | -{lost:.2f} |" for name, top1, gone, lost in PAPER
    ]


def single_rows(rows: Sequence[Row]) -> list[str]:
    """Every run by itself."""
    lines = [
        "",
        "## Run by run",
        "",
        "| rows | seed | measured saving (95% interval) | MACs | parameters | weights zero | top-1 | change, points | "
        "agreement | calibration error | steps | trained s | search s | whole s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures, measured = of(row), of(row).measured
        missed = "" if measured.met else " (budget not met)"
        lines.append(
            f"| {row.variant.name} | {row.seed} | {measured.saving:.1f}% ({measured.saving_low:.1f} to "
            f"{measured.saving_high:.1f}){missed} | -{measured.macs_saving:.1f}% | "
            f"-{measured.parameters_saving:.1f}% | {figures.sparsity:.1f}% | {measured.top1:.2f} | "
            f"{measured.change:+.2f} | {measured.agreement:.1f} | {figures.calibration:.2f}% | {figures.steps} | "
            f"{figures.trained_s:.0f} | {measured.search_s:.0f} | {measured.whole_s:.0f} |"
        )
    return lines


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _said(held: bool) -> str:
    return str(held).lower()
