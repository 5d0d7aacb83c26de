"""Distribution-lossless pruning against magnitude pruning, and whether its uncertainty is one.

    python -m benchmarks.dllp macs            # 55% fewer MACs
    python -m benchmarks.dllp latency         # 30% less measured latency
    python -m benchmarks.dllp uncertainty     # blurred test images, fewer training images

Each row is an ordinary ``optpipe run`` in a process of its own, seed 0 of all rows first; a run that is done
is not repeated, one that was stopped goes on, and one that failed is a row that says why. Rows are written as
they come. ``--scale`` is the number of epochs; 60, or ``--paper``, are the paper's, with batches of 512 at a
rate of 0.1. Whatever is no default, the network or the scale, goes into the names of runs and results.

``macs`` and ``latency`` train DLLP and magnitude pruning for the same number of steps; DLLP trains its two
particles in each. ``--only`` names further rows: without Stein's direction and the prior (dllp-beta0), without
training after the last sampled masks (dllp-settle0), and magnitude for twice the steps, which is DLLP's number
of gradients (magnitude-double).

``uncertainty`` trains ResNet-20 from scratch, as the original has seen all images, on 20 to 100% of them, and
asks the ensemble that each training leaves. All shares are trained for the same number of steps: what the paper
means is too few observations, not too little training, and with equal epochs a fifth of the images would have
a fifth of the training too (``--equal epochs`` does that). ``--pretrained`` starts from the original after all.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import dllp_left as left
from benchmarks import dllp_tables, runs
from benchmarks import dllp_uncertainty as seen
from benchmarks.dllp_rows import (
    Figures,
    Job,
    Observed,
    Record,
    SeenRecord,
    Settings,
    Variant,
)
from benchmarks.runs import ROOT, Facts
from optpipe.errors import OptpipeError, UsageError
from optpipe.files import write_atomically
from optpipe.report import build, schema
from optpipe.timing import Stopwatch

RECIPE = ROOT / "recipes" / "cifar10" / "dllp_resnet56.toml"
BUDGETS = {
    "macs": "budget.macs_reduction=0.55",
    "latency": "budget.latency_reduction=0.3",
    "uncertainty": "budget.macs_reduction=0.5",
}
EPOCHS = {"macs": 8.0, "latency": 8.0, "uncertainty": 6.0}
PAPER_EPOCHS = dllp_tables.PAPER_EPOCHS
PAPER_BATCH = 512
PAPER = (f"method.batch={PAPER_BATCH}", "method.lr=0.1")
POSTERIOR = ('method.score="posterior"', "export.uncertainty=true")
MAGNITUDE = ('method.score="magnitude"', "export.uncertainty=false")
MAIN = (Variant("dllp", POSTERIOR), Variant("magnitude", MAGNITUDE))
FURTHER = (
    Variant("dllp-beta0", (*POSTERIOR, "method.beta=0.0")),
    Variant("dllp-settle0", (*POSTERIOR, "method.settle=0.0")),
    Variant("magnitude-double", MAGNITUDE),
)
QUICK = ("export.precisions=[]",)
# Nothing is timed to be compared there.
UNTIMED = ("timing.budget_s=0.5", "timing.final_budget_s=0.5", "export.uncertainty=false")
IMAGES = 4660
BATCH = 128
# The equal number of steps follows from these; they are set here alone.
FIXED = ("method.epochs", "method.score", "recover.epochs", "recover.steps")


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
    path = arguments.out / f"dllp_{arguments.table}{named(arguments)}.json"
    if arguments.table == "uncertainty":
        watched(arguments, jobs, path)
        return 0
    record = runs.resume(Record, path, settings_of(arguments))
    wanted = [job for job in jobs if not runs.is_done(record, job)]
    workers: int = arguments.workers
    record = runs.make(
        record, path, wanted, workers, lambda job: run(job, workers), dllp_tables.markdown, line
    )
    print(dllp_tables.markdown(record))
    return 0


def watched(arguments: argparse.Namespace, jobs: Sequence[Job], path: Path) -> None:
    """The table of uncertainties, and its two figures beside it."""
    record = runs.resume(SeenRecord, path, settings_of(arguments))
    wanted = [job for job in jobs if not runs.is_done(record, job)]
    workers, draws = int(arguments.workers), int(arguments.draws)
    record = runs.make(
        record, path, wanted, workers, lambda job: look(job, draws, workers), seen.markdown, seen.line
    )
    for kind, drawn in seen.figures(record).items():
        write_atomically(path.with_name(f"{path.stem}-{kind}.svg"), drawn)
    print(seen.markdown(record))


# ---------------------------------------------------------------- what is asked


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=list(BUDGETS))
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--scale", type=float, help="epochs of all training images [8; uncertainty: 6]")
    scale.add_argument("--paper", dest="scale", action="store_const", const=PAPER_EPOCHS)
    runs.add_options(parser, "dllp", RECIPE)
    parser.add_argument("--draws", type=int, default=4, help="masks of each particle [4]")
    parser.add_argument("--equal", choices=["steps", "epochs"], default="steps", help="of all shares [steps]")
    parser.add_argument("--pretrained", action="store_true", help="from the original; else from scratch")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"that all shares are of [{IMAGES}]")
    parser.set_defaults(network=None)
    arguments = parser.parse_args(words)
    if arguments.network is None:
        arguments.network = "resnet20" if arguments.table == "uncertainty" else "resnet56"
    own = {word.partition("=")[0] for variant in variants(arguments) for word in variant.sets}
    if arguments.table == "uncertainty":
        own |= {"method.batch", "method.start"}
    for word in arguments.overrides:
        if word.partition("=")[0].strip() in {*own, *FIXED}:
            raise UsageError(
                f"--set {word}: the rows differ in it or are equal by it; give --scale or --only"
            )
    return arguments


def named(arguments: argparse.Namespace) -> str:
    """What tells a call's runs and results from those of the default network and scale."""
    if arguments.table != "uncertainty":
        return runs.suffix(arguments)
    more = ["pretrained"] if arguments.pretrained else []
    more += [] if arguments.equal == "steps" else ["equal-epochs"]
    more += [] if arguments.images == IMAGES else [f"{arguments.images}images"]
    return runs.suffix(arguments, *more)


def settings_of(arguments: argparse.Namespace) -> Settings:
    looks = arguments.table == "uncertainty"
    return Settings(
        table=arguments.table,
        network=arguments.network,
        budget=BUDGETS[arguments.table],
        epochs=epochs_of(arguments),
        training=training(arguments),
        overrides=tuple(arguments.overrides),
        machine=runs.machine(),
        workers=arguments.workers,
        draws=arguments.draws if looks else 0,
        equal=arguments.equal if looks else "",
        images=arguments.images if looks else 0,
    )


def epochs_of(arguments: argparse.Namespace) -> float:
    return EPOCHS[arguments.table] if arguments.scale is None else float(arguments.scale)


def training(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What is set of the training for all rows alike."""
    as_in_paper = PAPER if epochs_of(arguments) == PAPER_EPOCHS else ()
    if arguments.table != "uncertainty":
        return as_in_paper
    start = "pretrained" if arguments.pretrained else "scratch"
    return (f'method.start="{start}"', *(as_in_paper or (f"method.batch={BATCH}", "method.lr=0.1")))


def variants(arguments: argparse.Namespace) -> list[Variant]:
    """The configurations of a table that are asked for."""
    if arguments.table == "uncertainty":
        found = [share_of(arguments, share) for share in seen.SHARES]
    else:
        found = [*MAIN, *(FURTHER if arguments.only else ())]
    return [one for one in found if not arguments.only or one.name in arguments.only]


def share_of(arguments: argparse.Namespace, share: int) -> Variant:
    """The training on a share of the images, in percent, for equal steps or equal epochs."""
    count = round(share / 100 * arguments.images)
    epochs = epochs_of(arguments)
    if arguments.equal == "steps":
        batch = PAPER_BATCH if epochs == PAPER_EPOCHS else BATCH
        steps = math.ceil(epochs * arguments.images / min(batch, arguments.images) - 1e-9)
        epochs = steps * min(batch, count) / count
    return Variant(seen.name_of(share), (f"data.calibration.count={count}", f"method.epochs={epochs!r}"))


def jobs_of(arguments: argparse.Namespace, recipe: Path) -> Iterator[Job]:
    """All rows in the order in which they are made: the first seed of each, then the second."""
    timed = runs.threads_of(arguments.workers) if arguments.table == "latency" else ()
    for seed in arguments.seeds:
        for variant in variants(arguments):
            epochs = epochs_of(arguments) * (2 if variant.name.endswith("-double") else 1)
            overrides = (
                BUDGETS[arguments.table],
                *timed,
                *QUICK,
                *(UNTIMED if arguments.table == "uncertainty" else (f"method.epochs={epochs!r}",)),
                *training(arguments),
                *variant.sets,
            )
            start = runs.optpipe_run(recipe)
            yield runs.job(arguments, named(arguments), variant, seed, start, overrides)


# ---------------------------------------------------------------- one run


def run(job: Job, workers: int = 1) -> tuple[runs.Row[Variant, Figures], Facts | None]:
    """The row of one command, run now unless its folder holds all that it would make."""
    return runs.run(job, outcome, workers)


def look(job: Job, draws: int, workers: int = 1) -> tuple[runs.Row[Variant, Observed], Facts | None]:
    """The same of the table of uncertainties: the run, and then what its members say."""
    return runs.run(job, lambda done: observed(done, draws), workers)


def outcome(job: Job) -> tuple[Figures, Facts]:
    """What a finished command left in its folder."""
    report = build.read(job.folder)
    return figures_of(report, job.folder), runs.facts_of(report)


def figures_of(report: schema.Report, folder: Path) -> Figures:
    """What a table shows of a run: its report, and what its folder says of its trainings."""
    config = left.config_of(folder)
    return Figures(
        measured=runs.figures_of(report),
        original_calibration=left.calibration_of(report.original, report.name),
        calibration=left.calibration_of(report.result, report.name),
        particles=config.particles if config.score == "posterior" else 1,
        steps=left.steps_of(config, report.data.calibration_count),
        trained_s=sum(one.seconds for one in left.trainings(folder)),
        sparsity=100 * report.result.sparsity,
        spike=left.spike_of(report.tables),
        joined=left.joined_of(report),
    )


def observed(job: Job, draws: int) -> tuple[Observed, Facts]:
    """What the members of a finished run say of the test images: as they are, and of all images filtered too."""
    report = build.read(job.folder)
    watch = Stopwatch()
    found = left.opened(job.folder)
    particles, networks = found.particles(), list(found.networks())
    filters = seen.FILTERS if job.variant.name == seen.name_of(100) else (seen.CLEAN,)
    readings = []
    for name in filters:
        images = left.filtered(found.setup.evaluation, name)
        assert images.labels is not None
        for members, probabilities in (
            (seen.SAMPLED, left.sampled(found, particles, images, draws)),
            (seen.SETTLED, left.settled(networks, images)),
        ):
            readings.append(seen.reading(members, name, probabilities, images.labels.numpy()))
    measured = runs.figures_of(report)
    return (
        Observed(
            count=report.data.calibration_count,
            steps=left.steps_of(found.config, report.data.calibration_count),
            trained_s=sum(one.seconds for one in left.trainings(job.folder)),
            measured_s=watch.seconds,
            pruned_top1=measured.top1,
            macs_saving=measured.macs_saving,
            learnt=left.variances(particles),
            readings=tuple(readings),
        ),
        runs.facts_of(report),
    )


def line(figures: Figures) -> str:
    """A run's figures for the terminal."""
    return f"{runs.line(figures.measured)}, calibration error {figures.calibration:.2f}%"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
