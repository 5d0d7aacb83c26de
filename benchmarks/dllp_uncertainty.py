"""What ``benchmarks.dllp uncertainty`` reads of an ensemble, and its tables and figures (Fig. 2 of the paper)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy.stats import spearmanr

from benchmarks.dllp_rows import Observed, Reading, Seen, SeenRecord
from benchmarks.runs_tables import by_variant, circumstances, heading, not_reached, of, spread, unequal_seeds
from optpipe import uncertainty
from optpipe.report.figures import figure_svg
from optpipe.types import Curve, Figure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CLEAN = "clean"
FILTERS = ("sharpen", CLEAN, "blur 1", "blur 2", "blur 3", "blur 5")
SHARES = (20, 40, 60, 80, 100)
SAMPLED = "sampled masks"
SETTLED = "settled particles"
MEMBERS = (SAMPLED, SETTLED)
ENOUGH = 0.9
FEWEST = 3
"""Points of which a rank correlation says anything."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure of uncertainty: its name, and where a reading has it."""

    name: str
    of: Callable[[Reading], float]


ALEATORIC = (
    Measure("1/d²", lambda one: one.variance),
    Measure("expected entropy", lambda one: one.entropy),
)
EPISTEMIC = (
    Measure("mutual information", lambda one: one.information),
    Measure("variance over members", lambda one: one.disagreement),
)


@dataclass(frozen=True, slots=True)
class Trend:
    """How far a measure of some members goes with what it ought to rise with: Spearman of each seed.

    ``of_mean`` is that of the measure averaged over the seeds, None where it has none.
    """

    members: str
    measure: str
    by_seed: dict[int, float]
    of_mean: float | None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.by_seed.values())

    @property
    def held(self) -> bool:
        """Whether it rises as asked."""
        return self.mean >= ENOUGH

    def __str__(self) -> str:
        seeds = ", ".join(f"seed {seed} {value:.2f}" for seed, value in sorted(self.by_seed.items()))
        together = "" if self.of_mean is None else f"; of the mean over seeds {self.of_mean:.2f}"
        return f"{self.measure} {self.mean:.2f} ({seeds}{together})"


def name_of(share: int) -> str:
    """The row of a share of the training images."""
    return f"share-{share}"


def reading(
    members: str, images: str, probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> Reading:
    """What members say, from their probabilities (S, N, C) of N images."""
    parts = uncertainty.decompose(probabilities)
    return Reading(
        members=members,
        images=images,
        variance=uncertainty.aleatoric_variance(parts.mean, labels),
        entropy=float(parts.aleatoric.mean()),
        information=float(parts.epistemic.mean()),
        disagreement=float(uncertainty.predictive_variance(probabilities).mean()),
        top1=100 * float((parts.mean.argmax(axis=1) == labels).mean()),
        calibration=100 * uncertainty.calibration(parts.mean, labels).error,
    )


def spearman(values: Sequence[float]) -> float | None:
    """The rank correlation of values with their order; None where they are too few, or all the same."""
    if len(values) < FEWEST or len(set(values)) == 1:
        return None
    return float(spearmanr(range(len(values)), values).statistic)


# ---------------------------------------------------------------- trends


def found_in(figures: Observed, members: str, images: str) -> Reading | None:
    """What these members say of these images."""
    return next((one for one in figures.readings if (one.members, one.images) == (members, images)), None)


def over_filters(rows: Sequence[Seen], members: str, measure: Measure) -> dict[int, list[float]]:
    """Of each seed the measure on the images from the sharpest to the most blurred, all training images seen."""
    found: dict[int, list[float]] = {}
    for row in rows:
        readings = [found_in(of(row), members, name) for name in FILTERS]
        there = [measure.of(one) for one in readings if one is not None]
        if row.variant.name == name_of(100) and len(there) == len(FILTERS):
            found[row.seed] = there
    return found


def over_shares(rows: Sequence[Seen], members: str, measure: Measure) -> dict[int, list[float]]:
    """Of each seed that has all shares the measure on clean images, from most training images to fewest."""
    there: dict[int, dict[str, float]] = {}
    for row in rows:
        one = found_in(of(row), members, CLEAN)
        if one is not None:
            there.setdefault(row.seed, {})[row.variant.name] = measure.of(one)
    falling = [name_of(share) for share in reversed(SHARES)]
    return {
        seed: [values[name] for name in falling]
        for seed, values in there.items()
        if all(name in values for name in falling)
    }


Over = Callable[[Sequence[Seen], str, Measure], dict[int, list[float]]]


def trends(rows: Sequence[Seen], measures: Sequence[Measure], over: Over) -> list[Trend]:
    """Spearman of every measure and kind of members that has one."""
    found = []
    for members in MEMBERS:
        for measure in measures:
            series = over(rows, members, measure)
            each = {seed: spearman(values) for seed, values in series.items()}
            known = {seed: value for seed, value in each.items() if value is not None}
            if known:
                averaged = [statistics.mean(values) for values in zip(*series.values(), strict=True)]
                found.append(Trend(members, measure.name, known, spearman(averaged)))
    return found


def verdict(found: Sequence[Trend], asked: str) -> str:
    """Whether both measures go as asked, by each kind of members."""
    if not found:
        return f"{asked}: not decided, no seed has all rows."
    said = []
    for members in MEMBERS:
        mine = [one for one in found if one.members == members]
        if mine:
            held = str(all(one.held for one in mine)).lower()
            said.append(f"by {members} {held}: {', '.join(map(str, mine))}")
    return f"{asked}, Spearman at least {ENOUGH} averaged over seeds: {'; '.join(said)}."


def line(figures: Observed) -> str:
    """A row's figures for the terminal."""
    said = []
    for members in MEMBERS:
        one = found_in(figures, members, CLEAN)
        if one is not None:
            said.append(
                f"{members}: information {one.information:.4f}, 1/d² {one.variance:.4f}, {one.top1:.1f}%"
            )
    return f"{figures.count} images, {figures.steps} steps in {figures.trained_s:.0f} s; {'; '.join(said)}"


# ---------------------------------------------------------------- the file


def markdown(record: SeenRecord) -> str:
    """The whole file."""
    made = [row for row in record.rows if row.figures is not None]
    lines = introduction(record)
    if made:
        lines += [
            "",
            "- "
            + verdict(
                trends(made, ALEATORIC, over_filters), "Aleatoric uncertainty rises from sharpened to blurred"
            ),
            "- "
            + verdict(
                trends(made, EPISTEMIC, over_shares), "Epistemic uncertainty falls with more training images"
            ),
            *unequal_seeds(made),
            *filters_section(made),
            *shares_section(made),
            *single_rows(made),
        ]
    return "\n".join([*lines, *not_reached(record.rows)]) + "\n"


def introduction(record: SeenRecord) -> list[str]:
    """Title, date, machine, versions, scale, and what was measured."""
    settings = record.settings
    words = ", ".join(f"`{word}`" for word in settings.training)
    every = (
        "All shares are trained for the same number of steps, so that they differ in observations alone"
        if settings.equal == "steps"
        else "All shares are trained for the same number of epochs, so that fewer images have fewer steps too"
    )
    return [
        *heading(
            record,
            f"Uncertainty of networks pruned by DLLP, {settings.network}",
            settings.machine,
            "benchmarks.dllp uncertainty",
        ),
        f"Asked of each run: {settings.budget}; {words}; {settings.epochs:g} epochs of {settings.images} images "
        f"(the paper: VGG-11, 60 of 50000). {every}. A smaller share is a part of every larger one. Two kinds of "
        f"members: {settings.draws} masks drawn from theta for each of the particles, with the weights at the end "
        "of the gates' training; and the particles' own networks as they were cut and settled, one each. "
        "1/d² is the mean squared residual of their mean prediction, at which the likelihood of Eq. 9 is greatest; "
        "entropies and information are in nats. The sharpened test images have passed a 3x3 Laplacian kernel; "
        "the radius of a Gaussian blur is in pixels, of images of 32."
        + circumstances(settings.workers, settings.overrides),
    ]


def filters_section(rows: Sequence[Seen]) -> list[str]:
    """Fig. 2a as numbers."""
    mine = by_variant(rows).get(name_of(100), [])
    lines = [
        "",
        "## Aleatoric: test images of falling quality, all training images (Fig. 2a)",
        "",
        "| members | images | 1/d² | expected entropy | mutual information | top-1 | calibration error |",
        "|---|---|---|---|---|---|---|",
    ]
    for members in MEMBERS:
        for name in FILTERS:
            found = [one for row in mine if (one := found_in(of(row), members, name)) is not None]
            if found:
                lines.append(
                    f"| {members} | {name} | {spread([one.variance for one in found], '.4f')} | "
                    f"{spread([one.entropy for one in found], '.3f')} | "
                    f"{spread([one.information for one in found], '.4f')} | "
                    f"{spread([one.top1 for one in found], '.1f')} | "
                    f"{spread([one.calibration for one in found], '.1f')}% |"
                )
    return lines


def shares_section(rows: Sequence[Seen]) -> list[str]:
    """Fig. 2b as numbers."""
    lines = [
        "",
        "## Epistemic: fewer training images, the test images as they are (Fig. 2b)",
        "",
        "| members | training images | mutual information | variance over members | expected entropy | 1/d² | "
        "top-1 | calibration error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    made = by_variant(rows)
    for members in MEMBERS:
        for share in SHARES:
            mine = made.get(name_of(share), [])
            found = [one for row in mine if (one := found_in(of(row), members, CLEAN)) is not None]
            if found:
                lines.append(
                    f"| {members} | {of(mine[0]).count} ({share}%) | "
                    f"{spread([one.information for one in found], '.4f')} | "
                    f"{spread([one.disagreement for one in found], '.4f')} | "
                    f"{spread([one.entropy for one in found], '.3f')} | "
                    f"{spread([one.variance for one in found], '.4f')} | "
                    f"{spread([one.top1 for one in found], '.1f')} | "
                    f"{spread([one.calibration for one in found], '.1f')}% |"
                )
    return [*lines, "", "Mean ± standard deviation over seeds."]


def single_rows(rows: Sequence[Seen]) -> list[str]:
    """Every run by itself."""
    lines = [
        "",
        "## Run by run",
        "",
        "| row | seed | images | steps | trained s | read s | MACs | top-1 as shipped | 1/d² learnt, each particle | "
        "mutual information, sampled | variance, sampled | mutual information, settled | variance, settled |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = of(row)
        read: list[str] = []
        for members in MEMBERS:
            one = found_in(figures, members, CLEAN)
            read += ["", ""] if one is None else [f"{one.information:.4f}", f"{one.disagreement:.4f}"]
        learnt = ", ".join(f"{value:.4f}" for value in figures.learnt)
        lines.append(
            f"| {row.variant.name} | {row.seed} | {figures.count} | {figures.steps} | {figures.trained_s:.0f} | "
            f"{figures.measured_s:.0f} | -{figures.macs_saving:.1f}% | {figures.pruned_top1:.2f} | {learnt} | "
            f"{' | '.join(read)} |"
        )
    return lines


# ---------------------------------------------------------------- figures


def figures(record: SeenRecord) -> dict[str, str]:
    """Fig. 2a and 2b as SVG by the name of what they show; those that have their rows."""
    made = [row for row in record.rows if row.figures is not None]
    network = record.settings.network
    found = {}
    for kind, measures, over, places, label, base in (
        ("aleatoric", ALEATORIC, over_filters, (-1.0, 0.0, 1.0, 2.0, 3.0, 5.0), _BLUR, CLEAN),
        ("epistemic", EPISTEMIC, over_shares, tuple(map(float, reversed(SHARES))), _SHARE, "all images"),
    ):
        curves = _curves(made, measures, over, places, 1 if kind == "aleatoric" else 0)
        if curves:
            title = f"{kind.capitalize()} uncertainty, {network}: mean over seeds"
            found[kind] = figure_svg(Figure(title, label, f"over that of {base}", curves))
    return found


_BLUR = "radius of the blur in pixels; clean at 0, sharpened at -1"
_SHARE = "training images, percent"


def _curves(
    rows: Sequence[Seen], measures: Sequence[Measure], over: Over, places: tuple[float, ...], base: int
) -> tuple[Curve, ...]:
    """Each measure's mean over seeds, over what it is at the place ``base``."""
    found = []
    for members in MEMBERS:
        for measure in measures:
            by_seed = list(over(rows, members, measure).values())
            means = [statistics.mean(values) for values in zip(*by_seed, strict=True)]
            if means and means[base] > 0:
                scaled = tuple(mean / means[base] for mean in means)
                found.append(Curve(f"{measure.name}, {members}", places, scaled))
    return tuple(found)
