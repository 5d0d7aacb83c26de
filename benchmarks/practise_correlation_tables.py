"""The Markdown and the figures of ``benchmarks.practise correlation``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

from benchmarks.runs_tables import spread
from optpipe.report.figures import figure_svg
from optpipe.types import Curve, Figure


@dataclass(frozen=True, slots=True)
class Scale:
    """What must be equal for rows to stand in one table; ``exact_steps`` are of adaptors, 0 without."""

    network: str
    recipe: str
    steps: int
    exact_steps: int
    overrides: tuple[str, ...]
    machine: str


@dataclass(frozen=True, slots=True)
class Error:
    """Squared feature error per element, and shares of images: apart from the original, and wrong."""

    feature: float
    disagreement: float
    test: float


@dataclass(frozen=True, slots=True)
class Alone:
    """One block dropped: what each criterion says of it, errors before and after recovery, its seconds."""

    seed: int
    block: str
    scores: dict[str, float]
    before: Error
    recovered: Error
    seconds: float


@dataclass(frozen=True, slots=True)
class Several:
    """Some blocks dropped: errors as they are, with trained adaptors, and with all layers trained."""

    seed: int
    dropped: int
    blocks: tuple[str, ...]
    before: Error
    adaptors: Error
    trained: Error


@dataclass(frozen=True, slots=True)
class Correlated:
    """All rows so far."""

    scale: Scale
    date: str
    alone: tuple[Alone, ...]
    several: tuple[Several, ...]


ERRORS: tuple[tuple[str, Callable[[Error], float]], ...] = (
    ("feature error", lambda error: error.feature),
    ("disagreement", lambda error: error.disagreement),
    ("test error", lambda error: error.test),
)
BEST = "recoverability"


def line(row: Alone) -> str:
    """A row for the terminal."""
    return (
        f"{row.block}: test error {row.before.test:.1%}, recovered {row.recovered.test:.1%}, feature error "
        f"{row.recovered.feature:.4f}, {row.seconds:.0f} s"
    )


def whole_seeds(rows: Sequence[Alone]) -> dict[int, list[Alone]]:
    """The rows of each seed that has as many blocks as any other; one that is not done yet has no ranks."""
    by_seed: dict[int, list[Alone]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(row)
    most = max(map(len, by_seed.values()), default=0)
    return {seed: mine for seed, mine in by_seed.items() if len(mine) == most and most > 2}


def correlation(rows: Sequence[Alone], name: str, error: Callable[[Error], float]) -> float | None:
    """Spearman's coefficient over the blocks of one seed; None where all errors or all scores are equal."""
    scores, errors = [row.scores[name] for row in rows], [error(row.recovered) for row in rows]
    if len(set(scores)) < 2 or len(set(errors)) < 2:
        return None
    return float(spearmanr(scores, errors).statistic)


def correlations(found: Correlated) -> dict[str, dict[str, list[float]]]:
    """Of each criterion and error, Spearman's coefficient at each seed."""
    seeds = whole_seeds(found.alone)
    names = dict.fromkeys(name for row in found.alone for name in row.scores)
    return {
        name: {
            title: [value for mine in seeds.values() if (value := correlation(mine, name, error)) is not None]
            for title, error in ERRORS
        }
        for name in names
    }


def markdown(found: Correlated) -> str:
    """The whole file."""
    scale = found.scale
    lines = [
        f"# What criteria say of blocks, and what is left of them, {scale.network}",
        "",
        f"{found.date}, {scale.machine}. Written by `python -m benchmarks.practise correlation`.",
        "",
        f"Scale: each recovery, and each training of adaptors in the second table, takes {scale.steps} steps (the "
        f"paper: 2000 and 1000), recipe `{scale.recipe}`"
        + (f", adaptors of one block {scale.exact_steps}" if scale.exact_steps else "")
        + "".join(f", `{word}`" for word in scale.overrides)
        + ". A seed draws the calibration images. Feature error and disagreement with the original are of 1,000 "
        "held-out training images, test error of the test images.",
    ]
    if whole_seeds(found.alone):
        lines += [*_ranks(found), *_blocks(found)]
    return "\n".join([*lines, *_several(found)]) + "\n"


def _ranks(found: Correlated) -> list[str]:
    seeds = whole_seeds(found.alone)
    lines = [
        "",
        "## Spearman's coefficient with the error after recovery",
        "",
        f"Over {len(next(iter(seeds.values())))} blocks dropped alone; mean ± standard deviation of "
        f"{len(seeds)} seeds. Fig. 9 of the paper shows this for ResNet-34 without a number.",
        "",
        f"| criterion | {' | '.join(title for title, _ in ERRORS)} |",
        f"|---|{'---|' * len(ERRORS)}",
    ]
    table = correlations(found)
    for name, by_error in table.items():
        shown = (spread(values, "+.3f") if values else "" for values in by_error.values())
        lines.append(f"| {name} | {' | '.join(shown)} |")
    title = ERRORS[0][0]
    means = {name: statistics.mean(by[title]) for name, by in table.items() if by[title]}
    if BEST in means and len(means) > 1:
        first = max(means, key=means.__getitem__)
        said = "is first" if first == BEST else f"is not first: `{first}` is, at {means[first]:+.3f}"
        lines += ["", f"By the {title}, `{BEST}` {said} ({means[BEST]:+.3f})."]
    return lines


def _blocks(found: Correlated) -> list[str]:
    """Means over the seeds of every block."""
    by_block = _by_block(found)
    names = tuple(found.alone[0].scores)
    lines = [
        "",
        "## Every block dropped alone",
        "",
        "Means over seeds.",
        "",
        f"| block | {' | '.join(names)} | test error before | test error | disagreement | feature error |",
        f"|---|{'---|' * (len(names) + 4)}",
    ]
    for block, rows in by_block.items():
        scores = (f"{statistics.mean(row.scores[name] for row in rows):.4g}" for name in names)
        lines.append(
            f"| {block} | {' | '.join(scores)} | {_mean(rows, lambda row: row.before.test):.1%} | "
            f"{_mean(rows, lambda row: row.recovered.test):.1%} | "
            f"{_mean(rows, lambda row: row.recovered.disagreement):.1%} | "
            f"{_mean(rows, lambda row: row.recovered.feature):.4f} |"
        )
    return lines


def _by_block(found: Correlated) -> dict[str, list[Alone]]:
    by_block: dict[str, list[Alone]] = {}
    for mine in whole_seeds(found.alone).values():
        for row in mine:
            by_block.setdefault(row.block, []).append(row)
    return by_block


def _mean(rows: Sequence[Alone], value: Callable[[Alone], float]) -> float:
    return statistics.mean(value(row) for row in rows)


def _several(found: Correlated) -> list[str]:
    if not found.several:
        return []
    lines = [
        "",
        "## Several dropped: adaptors alone against all layers",
        "",
        "Test error in percent, mean ± standard deviation over seeds, with the order of recoverability. Adaptors "
        "are trained with the paper's settings, all layers with the recipe's.",
        "",
        "| dropped | seeds | as they are | adaptors alone | all layers |",
        "|---|---|---|---|---|",
    ]
    for count in _counts(found):
        mine = [row for row in found.several if row.dropped == count]
        shown = (
            spread([100 * error.test for error in errors])
            for errors in zip(*((row.before, row.adaptors, row.trained) for row in mine), strict=True)
        )
        lines.append(f"| {count} | {len(mine)} | {' | '.join(shown)} |")
    return lines


def _counts(found: Correlated) -> list[int]:
    return sorted({row.dropped for row in found.several})


# ---------------------------------------------------------------- figures


def figures(found: Correlated) -> dict[str, str]:
    """SVG by kind: what criteria say of each block (as Fig. 9), errors by number of blocks (as Fig. 12)."""
    drawn: dict[str, str] = {}
    if whole_seeds(found.alone):
        drawn["blocks"] = figure_svg(blocks_figure(found))
    if len(_counts(found)) > 1:
        drawn["several"] = figure_svg(several_figure(found))
    return drawn


def blocks_figure(found: Correlated) -> Figure:
    """Each criterion's values and the recovered errors over the blocks, all between 0 and 1."""
    by_block = _by_block(found)
    places = tuple(float(place) for place in range(1, len(by_block) + 1))
    curves = {
        name: [statistics.mean(row.scores[name] for row in rows) for rows in by_block.values()]
        for name in found.alone[0].scores
        if name not in {"random", "first"}
    }
    curves["feature error once recovered"] = [
        _mean(rows, lambda row: row.recovered.feature) for rows in by_block.values()
    ]
    curves["test error once recovered"] = [
        _mean(rows, lambda row: row.recovered.test) for rows in by_block.values()
    ]
    return Figure(
        f"Blocks of {found.scale.network} dropped alone",
        "droppable block, in order of execution",
        "from the least (0) to the largest (1) of each curve",
        tuple(Curve(name, places, _between(values)) for name, values in curves.items()),
    )


def _between(values: Sequence[float]) -> tuple[float, ...]:
    """Values moved and scaled to lie from 0 to 1; all 0 where they are equal."""
    least, span = min(values), max(values) - min(values)
    return tuple((value - least) / span if span else 0.0 for value in values)


def several_figure(found: Correlated) -> Figure:
    """Test errors in percent over the number of dropped blocks, means over seeds."""
    counts = _counts(found)
    kinds: tuple[tuple[str, Callable[[Several], Error]], ...] = (
        ("as they are", lambda row: row.before),
        ("adaptors alone trained", lambda row: row.adaptors),
        ("all layers trained", lambda row: row.trained),
    )
    return Figure(
        f"Blocks of {found.scale.network} dropped in order of recoverability",
        "blocks dropped",
        "test error (%)",
        tuple(
            Curve(
                name,
                tuple(map(float, counts)),
                tuple(
                    100 * statistics.mean(error(row).test for row in found.several if row.dropped == count)
                    for count in counts
                ),
            )
            for name, error in kinds
        ),
    )
