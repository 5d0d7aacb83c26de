"""Depth, width and resolution together against each of them alone, with the same total of training steps.

    python -m benchmarks.three_d macs         # half of the MACs
    python -m benchmarks.three_d latency      # 35% less measured latency

Each row is an ordinary ``optpipe run`` in a process of its own, seed 0 of all rows first; a run that is done
is not repeated, one that was stopped goes on, and one that failed is a row that says why. Rows are written as
they come. ``--scale`` is the number of epochs of the last fine-tuning; each of the 17 trainings that the
three dimensions are learnt in takes a tenth of it, as in the recipe for a CPU, or with ``--paper`` half, 40
of 80. One dimension alone learns nothing beforehand: its recovery takes the epochs of those trainings too.
All rows alike have validation images of their own, of which accuracies on the way are taken, and the original
as the teacher of every training; results with names without "validated" are of before there was either.
Whatever is no default, the network or the scale, goes into the names of runs and results, so that no trial
run overwrites results.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import runs
from benchmarks.runs import ROOT, Facts
from benchmarks.runs_tables import cells
from benchmarks.three_d_rows import KEPT, POINTS, Figures, Job, Record, Row, Settings, Variant
from benchmarks.three_d_tables import PAPER_EPOCHS, epochs_of_training, markdown
from optpipe.errors import OptpipeError, RunError, UsageError
from optpipe.report import build, schema

RECIPE = ROOT / "recipes" / "cifar10" / "three_d_resnet56.toml"
BUDGETS = {"macs": "budget.macs_reduction=0.5", "latency": "budget.latency_reduction=0.35"}
VARIANTS = (
    Variant("together", ("depth", "width", "resolution")),
    Variant("depth", ("depth",)),
    Variant("width", ("width",)),
    Variant("resolution", ("resolution",)),
)
EPOCHS = 4.0
ROUNDS = 4
INSIDE = 4
TRAININGS = 1 + 3 * ROUNDS + INSIDE
# The original knows the training images by heart: held out of those, it flatters what leaves its weights alone.
VALIDATING = 141
SPLIT = (
    "data.validation.source=${OPTPIPE_DATA:-../../../shared}/data/cifar10/test_423.npz",
    f"data.validation.count={VALIDATING}",
    f"data.evaluation.skip={VALIDATING}",
)
TEACHERS = ("recover.teachers=single",)
# The total of training steps follows from these; they are set here alone.
FIXED = (
    "method.dimensions",
    "method.rounds",
    "method.inside",
    "method.epochs",
    "recover.epochs",
    "recover.steps",
)


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    recipe = runs.base_recipe(
        arguments.recipe, arguments.runs / f"{arguments.recipe.stem}-{arguments.table}.toml"
    )
    jobs = list(jobs_of(arguments, recipe))
    if arguments.dry_run:
        for job in jobs:
            print(shlex.join(job.command))
        return 0
    path = arguments.out / f"three_d_{arguments.table}{named(arguments)}.json"
    record = runs.resume(Record, path, settings_of(arguments))
    wanted = [job for job in jobs if not runs.is_done(record, job)]
    workers: int = arguments.workers
    record = runs.make(record, path, wanted, workers, lambda job: run(job, workers), markdown, line)
    print(markdown(record))
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=list(BUDGETS))
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--scale", type=float, help=f"epochs of the last fine-tuning [{EPOCHS:g}]")
    scale.add_argument("--paper", dest="scale", action="store_const", const=float(PAPER_EPOCHS))
    runs.add_options(parser, "three_d", RECIPE)
    arguments = parser.parse_args(words)
    for word in arguments.overrides:
        if word.partition("=")[0].strip() in FIXED:
            raise UsageError(f"--set {word}: the equal total of training steps follows from it; give --scale")
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(
        table=arguments.table,
        network=arguments.network,
        budget=BUDGETS[arguments.table],
        epochs=epochs_of(arguments),
        overrides=tuple(arguments.overrides),
        machine=runs.machine(),
        workers=arguments.workers,
        shared=(*SPLIT, *TEACHERS),
    )


def named(arguments: argparse.Namespace) -> str:
    """What tells a call's runs and results from others', those without validation images too."""
    return runs.suffix(arguments, "validated")


def epochs_of(arguments: argparse.Namespace) -> float:
    """Epochs of the last fine-tuning of three dimensions together."""
    return EPOCHS if arguments.scale is None else float(arguments.scale)


def jobs_of(arguments: argparse.Namespace, recipe: Path) -> Iterator[Job]:
    """All rows in the order in which they are made: the first seed of each, then the second."""
    for seed in arguments.seeds:
        for variant in VARIANTS:
            if arguments.only and variant.name not in arguments.only:
                continue
            overrides = (
                BUDGETS[arguments.table],
                *(runs.threads_of(arguments.workers) if arguments.table == "latency" else ()),
                *SPLIT,
                *TEACHERS,
                *training(variant, epochs_of(arguments)),
            )
            yield runs.job(arguments, named(arguments), variant, seed, runs.optpipe_run(recipe), overrides)


def training(variant: Variant, epochs: float) -> tuple[str, ...]:
    """What a configuration is and how long it trains.

    ``epochs`` are those of the last fine-tuning of several dimensions, after ``TRAININGS`` shorter trainings on
    the same images. A single dimension has as many epochs in its recovery alone: the same number of steps,
    but that each short training's last step may be a part of one.
    """
    a_round = epochs_of_training(epochs)
    if len(variant.dimensions) == 1:
        epochs += TRAININGS * a_round
    return (
        f"method.dimensions={json.dumps(variant.dimensions)}",
        f"method.rounds={ROUNDS}",
        "method.inside=true",
        f"method.epochs={a_round:g}",
        f"recover.epochs={epochs:g}",
    )


def run(job: Job, workers: int = 1) -> tuple[Row, Facts | None]:
    """The row of one command, run now unless its folder holds all that it would make."""
    return runs.run(job, outcome, workers)


def outcome(job: Job) -> tuple[Figures, Facts]:
    """What a finished command left in its folder."""
    report = build.read(job.folder)
    return figures_of(report, epochs_of_a_round(job)), runs.facts_of(report)


def epochs_of_a_round(job: Job) -> float:
    """The ``method.epochs`` of a job's command, which no report has."""
    return next(float(word.partition("=")[2]) for word in job.command if word.startswith("method.epochs="))


def figures_of(report: schema.Report, epochs: float) -> Figures:
    """What a table shows of a report of which each round took so many epochs. Raises RunError without d, w, r."""
    found = re.match(r"d = ([\d.]+), w = ([\d.]+), r = ([\d.]+):", report.reason)
    if found is None:
        raise RunError(f"{report.name}: its reason does not begin with d, w and r: {report.reason!r}")
    kept = [table for table in report.tables if table.title.startswith(KEPT)]
    trained = len(cells(kept, POINTS, ("rounds",)))
    height, width = report.plan.input_hw or report.target.input_shape[1:]
    return Figures(
        measured=runs.figures_of(report, kept),
        d=float(found[1]),
        w=float(found[2]),
        r=float(found[3]),
        dropped=len(report.plan.drop_blocks),
        size=f"{height}x{width}",
        trainings=trained,
        search_steps=trained * steps_of_a_round(report, epochs),
        recover_steps=report.recover.steps,
    )


def steps_of_a_round(report: schema.Report, epochs: float) -> int:
    """Steps that a round of so many epochs took, on all calibration images.

    Raises:
        RunError: the run had no validation images, so that some of those were held out.
    """
    images = report.data.calibration_count
    if not report.data.validation_count:
        raise RunError(f"{report.name}: had no validation images; its trainings saw a part of the others")
    return max(1, math.ceil(epochs * images / min(report.recover.batch, images) - 1e-9))


def line(figures: Figures) -> str:
    """A run's figures for the terminal."""
    return (
        f"d, w, r = {figures.where}; {runs.line(figures.measured)}, "
        f"{figures.search_steps} + {figures.recover_steps} steps"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
