"""The Markdown that ``benchmarks.three_d`` makes of its rows, with statements that follow from the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.runs import Facts
from benchmarks.runs_tables import (
    by_variant,
    cells,
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
from benchmarks.three_d_rows import OPTIMUM, PREDICTORS, SURFACE, Record, Row, Settings
from optpipe.types import Cell

PAPER_EPOCHS = 80
SHARE = 0.1
"""Of the epochs of the last fine-tuning, those of each training before it: the CPU recipe's 1 of 10."""
PAPER_TOP1 = 93.69
# Table 1, ResNet-56 on CIFAR-10: accuracy, and the fraction of the operations that is gone.
PAPER = (
    ("three dimensions (ours there)", 93.76, 0.50),
    ("depth only (DBP)", 93.27, 0.52),
    ("width only", 92.97, 0.50),
    ("resolution only", 92.00, 0.51),
)
TOGETHER = "together"
ALLOWED_OFF = 0.03
CUBIC = 3
LEVEL = 2e-3


@dataclass(frozen=True, slots=True)
class Prediction:
    """A network that was built: its predicted cost and what was measured; ``final`` after training it, anew."""

    seed: int
    corrections: int
    predicted: float
    first_off: float
    off: float
    final: float

    @property
    def final_off(self) -> float:
        """The final cost over the predicted one, less 1."""
        return self.final / self.predicted - 1


def markdown(record: Record) -> str:
    """The whole file."""
    made = [row for row in record.rows if row.figures is not None]
    lines = [*introduction(record), *standard_error(record.facts, [of(row).measured for row in made])]
    if made:
        together = [row for row in made if row.variant.name == TOGETHER]
        lines += [
            "",
            *statements(made, together, record.settings.what),
            *summary_table(made),
            *paper_table(),
            *predictors_section(together),
            *costs_section(together, record.settings.what),
            "",
            "## Run by run",
            *single_rows(made),
        ]
    return "\n".join([*lines, *not_reached(record.rows)]) + "\n"


def introduction(record: Record) -> list[str]:
    """Title, date, machine, versions and scale."""
    settings = record.settings
    title = {"macs": "equal MACs", "latency": "equal measured latency"}[settings.table]
    return [
        *heading(
            record,
            f"Three dimensions at {title}, {settings.network}",
            settings.machine,
            f"benchmarks.three_d {settings.table}",
        ),
        f"Asked of each run: {settings.budget}. `together` weighs depth, width and resolution against each "
        f"other: it trains networks along each dimension for {epochs_of_training(settings.epochs):g} epochs at a time, and its "
        f"result for {settings.epochs:g} (the paper: {PAPER_EPOCHS // 2} and {PAPER_EPOCHS}, of 50000 images). "
        "A single dimension goes as far as the budget asks, with nothing to learn; its result is trained for "
        "as many epochs as all of those trainings come to."
        + alike(settings, record.facts)
        + circumstances(settings.workers, settings.overrides),
    ]


def alike(settings: Settings, facts: Facts | None) -> str:
    """What all rows have in common, in words; "" where the settings are of before there was any."""
    if not settings.shared:
        return ""
    split = ""
    if facts is not None:
        whole = facts.validation_count + facts.evaluation_count
        split = (
            f" {facts.validation_count} of the {whole} lossless test images validate, the other "
            f"{facts.evaluation_count} test."
        )
    words = ", ".join(f"`{word}`" for word in settings.shared)
    return (
        f"{split} Accuracies on the way are those of the validation images; all calibration images train, and "
        f"the original's logits on them teach every training. All rows alike: {words}."
    )


def epochs_of_training(epochs: float) -> float:
    """Epochs of each training on the way, where the last takes so many; at the paper's scale half as many."""
    return epochs / 2 if epochs == PAPER_EPOCHS else round(SHARE * epochs, 6)


def statements(rows: list[Row], together: list[Row], what: str) -> list[str]:
    """What the numbers say, before the numbers."""
    return [
        f"- {first(rows)}",
        *unequal_seeds(rows),
        f"- {equal_steps(rows)}",
        f"- {rank_against_cubic(together)}",
        f"- {predicted_well(together, what)}",
    ]


def first(rows: list[Row]) -> str:
    """Whether three dimensions together are first."""
    names = list(by_variant(rows))
    ordered = summaries(rows, names)
    mine = next((one for one in ordered if one.name == TOGETHER), None)
    if mine is None or len(ordered) < 2:
        return f"Three dimensions together first: not decided. {who_is_first(rows, names)}"
    best = max(one.mean for one in ordered if one is not mine)
    verdict = f"Three dimensions together first of {len(ordered)}: {str(mine.mean > best).lower()}."
    if mine.mean < best:
        ahead = [f"`{one.name}` by {one.mean - mine.mean:.2f}" for one in ordered if one.mean > mine.mean]
        verdict += f" They are not: better are {', '.join(ahead)} points."
    return f"{verdict} {who_is_first(rows, names)}"


def equal_steps(rows: list[Row]) -> str:
    """The steps that rows really trained for, and how far apart they are."""
    steps = {name: [of(row).steps for row in mine] for name, mine in by_variant(rows).items()}
    every = [count for counts in steps.values() for count in counts]
    apart = f"; at most {1 - min(every) / max(every):.1%} apart" if len(every) > 1 else ""
    said = ", ".join(f"`{name}` {_range(counts)}" for name, counts in steps.items())
    return f"Steps of training in all, rounds and recovery: {said}{apart}."


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def summary_table(rows: list[Row]) -> list[str]:
    """Each configuration over its seeds."""
    lines = [
        "",
        "| dimensions | seeds | top-1 | change, points | before recovery | measured saving | MACs | parameters | "
        "d, w, r | steps | search s | recovery s | whole s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, mine in by_variant(rows).items():
        all_of = [of(row).measured for row in mine]
        shown = [
            spread([one.top1 for one in all_of]),
            spread([one.change for one in all_of], "+.2f"),
            spread([one.before_recovery for one in all_of], ".1f"),
            spread([one.saving for one in all_of], ".1f") + "%",
            "-" + spread([one.macs_saving for one in all_of], ".1f") + "%",
            "-" + spread([one.parameters_saving for one in all_of], ".1f") + "%",
            "; ".join(dict.fromkeys(of(row).where for row in mine)),
            spread([float(of(row).steps) for row in mine], ".0f"),
            spread([one.search_s for one in all_of], ".0f"),
            spread([one.recover_s for one in all_of], ".0f"),
            spread([one.whole_s for one in all_of], ".0f"),
        ]
        lines.append(f"| {name} | {len(mine)} | {' | '.join(shown)} |")
    return [
        *lines,
        "",
        "Mean ± standard deviation over seeds. A seed decides the order of the images, the trainings and "
        "the clock. Engines of equal structure are shared, and so is what the first row paid for them. The "
        "seconds of a stage are those of the attempt that finished it.",
    ]


def paper_table() -> list[str]:
    """What the paper has for ResNet-56, which is at equal operations and far longer trainings."""
    lines = [
        "",
        f"The paper's Table 1, ResNet-56 on CIFAR-10 ({PAPER_TOP1:.2f} before), all 50000 training images:",
        "",
        "| dimensions | top-1 | change, points | operations |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| {name} | {top1:.2f} | {top1 - PAPER_TOP1:+.2f} | -{100 * gone:.0f}% |"
        for name, top1, gone in PAPER
    ]


# ---------------------------------------------------------------- the accuracy predictors


def left_out_errors(rows: list[Row]) -> dict[tuple[str, int, float], dict[int, float]]:
    """For each predictor, degree and ridge: the error on points left out of each seed, in percent."""
    found: dict[tuple[str, int, float], dict[int, float]] = {}
    columns = ("predictor", "degree", "ridge", "error on points left out")
    for row in rows:
        for kind, degree, ridge, error in cells(of(row).measured.tables, PREDICTORS, columns):
            key = (str(kind), int(_number(degree)), _number(ridge))
            found.setdefault(key, {})[row.seed] = 100 * _number(error)
    return found


def rank_against_cubic(together: list[Row]) -> str:
    """Whether the product of polynomials predicts points left out better than the full cubic does."""
    errors = left_out_errors(together)
    mine = next((by_seed for (kind, _, _), by_seed in errors.items() if kind.startswith("rank")), None)
    full = {ridge: one for (kind, degree, ridge), one in errors.items() if (kind, degree) == ("full", CUBIC)}
    if mine is None or not full:
        return "The rank-1 predictor below the full cubic on points left out: not decided, no table of both."
    said = []
    for ridge, other in sorted(full.items()):
        seeds = [f"seed {seed} {_below(mine[seed], other[seed])}" for seed in sorted(mine)]
        means = statistics.mean(mine.values()), statistics.mean(other.values())
        said.append(
            f"{f'with ridge {ridge:g}' if ridge else 'without ridge'} {_below(*means)} "
            f"({means[0]:.2f}% against {means[1]:.2f}%; {', '.join(seeds)})"
        )
    text = f"The rank-1 predictor below the full cubic on points left out, on average: {'; '.join(said)}."
    plain = full.get(0.0, {})
    if all(_below(error, plain.get(seed, math.inf)) == "level" for seed, error in mine.items()):
        text += (
            " All points lie on the axes, where a product of cubics and a full cubic can be the same functions: "
            "least squares without ridge then come to the same, and only points between the axes could tell the two apart."
        )
    return text


def predictors_section(together: list[Row]) -> list[str]:
    """The table that stands beside the paper's Table 4."""
    errors = left_out_errors(together)
    if not errors:
        return []
    seeds = sorted({seed for by_seed in errors.values() for seed in by_seed})
    lines = [
        "",
        "## Accuracy predictors",
        "",
        "Mean relative error, in percent, at each point when fitted to the others alone:",
        "",
        f"| predictor | degree | ridge | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        "|---|---|---|" + "---|" * (len(seeds) + 1),
    ]
    for (kind, degree, ridge), by_seed in errors.items():
        shown = [f"{by_seed[seed]:.2f}" if seed in by_seed else "" for seed in seeds]
        shown.append(f"{statistics.mean(by_seed.values()):.2f}")
        lines.append(f"| {kind} | {degree} | {ridge:g} | {' | '.join(shown)} |")
    return lines


# ---------------------------------------------------------------- what networks cost


def predictions(together: list[Row], what: str) -> list[Prediction]:
    """Of each seed that has such a table: the network that was chosen."""
    columns = ("network", f"predicted {what}", "off by", "verdict")
    found = []
    for row in together:
        figures = of(row).measured
        built = [line for line in cells(figures.tables, OPTIMUM, columns) if str(line[0]).startswith("built")]
        chosen = next((line for line in built if line[3] == "chosen"), None)
        if chosen is None:
            continue
        saving = figures.saving if what == "latency" else figures.macs_saving
        found.append(
            Prediction(
                seed=row.seed,
                corrections=len(built) - 1,
                predicted=_number(chosen[1]),
                first_off=_number(built[0][2]),
                off=_number(chosen[2]),
                final=1 - saving / 100,
            )
        )
    return sorted(found, key=lambda one: one.seed)


def predicted_well(together: list[Row], what: str) -> str:
    """Whether the chosen network's cost was predicted closely enough, when it was built and at the end."""
    found = predictions(together, what)
    title = f"Predicted against measured {what} of the chosen network within {ALLOWED_OFF:.0%}"
    if not found:
        return f"{title}: not decided, no table of it."
    said = []
    for name, offs in (
        ("when it was built", {one.seed: one.off for one in found}),
        ("when the finished network was measured anew", {one.seed: one.final_off for one in found}),
    ):
        seeds = ", ".join(f"seed {seed} {off:+.1%}" for seed, off in offs.items())
        held = all(abs(off) <= ALLOWED_OFF for off in offs.values())
        said.append(f"{name} {_verdict(held)} ({seeds})")
    return f"{title}: {'; '.join(said)}."


def costs_section(together: list[Row], what: str) -> list[str]:
    """Each seed's prediction, and the surface that it was read from."""
    found = predictions(together, what)
    if not found:
        return []
    lines = [
        "",
        f"## Predicted and measured {what}",
        "",
        f"| seed | corrections | first network off by | chosen: predicted {what} left | off by | "
        "finished network | off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        lines.append(
            f"| {one.seed} | {one.corrections} | {one.first_off:+.1%} | {one.predicted:.1%} | {one.off:+.1%} | "
            f"{one.final:.1%} | {one.final_off:+.1%} |"
        )
    lines += [
        "",
        "The first network is predicted by a surface fitted to networks on the axes and a few between them, each "
        "correction by one that has those built before it too.",
        "",
        "| surface of seed | networks | fit off by, mean | left out, mean | left out, largest |",
        "|---|---|---|---|---|",
    ]
    for row in together:
        offs = cells(of(row).measured.tables, SURFACE + what, ("smooth fit off by", "left out, off by"))
        if offs:
            fit, left = ([abs(_number(line[column])) for line in offs] for column in (0, 1))
            lines.append(
                f"| {row.seed} | {len(offs)} | {statistics.mean(fit):.1%} | {statistics.mean(left):.1%} | "
                f"{max(left):.1%} |"
            )
    return lines


def single_rows(rows: list[Row]) -> list[str]:
    """Every run by itself."""
    lines = [
        "",
        "| dimensions | seed | measured saving (95% interval) | MACs | parameters | d, w, r | blocks dropped | "
        "size | before recovery | top-1 | change, points | agreement | trainings | search steps | "
        "recovery steps | search s | recovery s | whole s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures, measured = of(row), of(row).measured
        missed = "" if measured.met else " (budget not met)"
        lines.append(
            f"| {row.variant.name} | {row.seed} | {measured.saving:.1f}% ({measured.saving_low:.1f} to "
            f"{measured.saving_high:.1f}){missed} | -{measured.macs_saving:.1f}% | "
            f"-{measured.parameters_saving:.1f}% | {figures.where} | {figures.dropped} | {figures.size} | "
            f"{measured.before_recovery:.1f} | {measured.top1:.2f} | {measured.change:+.2f} | "
            f"{measured.agreement:.1f} | {figures.trainings} | {figures.search_steps} | "
            f"{figures.recover_steps} | {measured.search_s:.0f} | {measured.recover_s:.0f} | "
            f"{measured.whole_s:.0f} |"
        )
    return lines


def _number(cell: Cell) -> float:
    assert isinstance(cell, int | float)
    return float(cell)


def _below(mine: float, other: float) -> str:
    """Whether an error is below another; "level" where they differ by no more than a fit's convergence."""
    return "level" if math.isclose(mine, other, rel_tol=LEVEL) else _verdict(mine < other)


def _verdict(held: bool) -> str:
    return str(held).lower()
