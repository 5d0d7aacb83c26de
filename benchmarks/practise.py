"""The tables of PRACTISE's paper, on CIFAR-10: who is ahead with few images, with none, and by which criterion.

    python -m benchmarks.practise images          # Tables 2 to 4: blocks against filters
    python -m benchmarks.practise data-free       # Table 6: images made from the network against real ones
    python -m benchmarks.practise out-of-domain   # Table 7: images of other things against real ones
    python -m benchmarks.practise criteria        # Table 8: criteria by number of dropped blocks
    python -m benchmarks.practise correlation     # Figs. 9 and 12: every block dropped alone, several at once

Each row but those of ``correlation`` is an ordinary ``optpipe run`` in a process of its own, the first seed of
all rows first; a run that is done is not repeated, one that was stopped goes on, and one that failed is a row
that says why. Rows are written as they come. A seed draws the calibration images and decides the recovery.

``--scale`` multiplies the recovery's 1200 steps; ``criteria`` and ``correlation`` have 0.25 by default, that is
300 steps. The defaults are for ResNet-20 and end within an hour on one core; ``--full`` makes all cells: 50,
100, 500 and 1000 images, 22, 35 and 50% less measured latency, six methods. ``--paper`` is its scale: that
grid, ResNet-56, 2000 steps, five seeds; with ``--recipe recipes/cifar10/practise_resnet56_paper.toml`` its
scorer and recovery too. Rows of the same network, steps and recipe stand in one file, whatever the grid.

Real images of ``data-free`` and ``out-of-domain`` are the runs that ``images`` makes of its method
``practise``, so that those that are there are not made again. ``data-free`` makes its images once, with the
first seed, and all its rows learn from these; with ``--own-sets`` each seed makes its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import practise_correlation as correlation
from benchmarks import practise_sources_tables, practise_tables, runs
from benchmarks.practise_rows import Figures, Job, Record, Row, Settings, Variant
from benchmarks.runs import ROOT, Facts
from optpipe.errors import OptpipeError, RunError, UsageError
from optpipe.report import build, schema

RECIPE = ROOT / "recipes" / "cifar10" / "practise_resnet56.toml"
STEPS = 1200
PAPER_STEPS = 2000
SCALES = {"images": 1.0, "data-free": 1.0, "out-of-domain": 1.0, "criteria": 0.25, "correlation": 0.25}
DROPPABLE = {"resnet20": 7, "resnet56": 25}
COUNTS = {"images": (50, 500), "data-free": (500,), "out-of-domain": (50, 500, 1000), "criteria": (500,)}
FULL_COUNTS = {**COUNTS, "images": (50, 100, 500, 1000)}
BUDGETS = {"images": (0.22, 0.35), "data-free": (0.22,), "out-of-domain": (0.22,)}
FULL_BUDGETS = {**BUDGETS, "images": (0.22, 0.35, 0.5)}
DROPS = (1, 2, 3, 5, 8, 11)
REAL = "${OPTPIPE_DATA:-../../../shared}/data/cifar10/train_4660.npz"
OUTSIDE = "${OPTPIPE_DATA:-../../../shared}/data/out_of_domain/imagenet_1000_32px.npz"
UNLABELLED = ("data.calibration.labels=false",)
# Neither loss looks at a stage's output, both teach the classifier too, and one image has one label. The rate
# that suits features is too high for both: in a look at the shipped digits network, this one learnt where 0.1 did not.
LOGITS = ("recover.stage_weight=0.0", 'recover.trainable="all"', "recover.lr=0.02")
KD = ('recover.loss="kd"', *LOGITS, *UNLABELLED)
BP = (
    'recover.loss="labels"',
    *LOGITS,
    'recover.augment="shift"',
    "data.calibration.labels=true",
)
BLOCKS = ('method.name="practise"',)
FILTERS = ('method.name="filters"', 'method.style="normal"', 'method.rounding="engine"')
METHODS = {
    "practise": (*BLOCKS, *UNLABELLED),
    "blocks-kd": (*BLOCKS, *KD),
    "blocks-bp": (*BLOCKS, *BP),
    "filters": (*FILTERS, *UNLABELLED),
    "filters-kd": (*FILTERS, *KD),
    "filters-bp": (*FILTERS, *BP),
}
MAIN = ("practise", "filters")
SYNTHESIZED = "synthesized"
OUT_OF_DOMAIN = "imagenet"
CRITERIA = ("recoverability", "l2", "curl", "epsilon_resnet", "random", "first")
QUICK = ("export.precisions=[]",)
# The rows are told apart or made equal by these; they are set here alone.
FIXED = (
    "method.name",
    "method.criterion",
    "recover.steps",
    "recover.epochs",
    "recover.loss",
    "data.calibration.count",
    "data.calibration.labels",
    "data.calibration.source",
    "data.calibration.seed",
    "run.seed",
)


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    if arguments.table == "correlation":
        return correlation.main(arguments, steps_of(arguments))
    jobs = list(jobs_of(arguments, *recipes_of(arguments)))
    if arguments.dry_run:
        for job in jobs:
            print(shlex.join(job.command))
        return 0
    path = arguments.out / f"practise_{arguments.table}{named(arguments)}.json"
    markdown = practise_tables.markdown if arguments.table == "images" else practise_sources_tables.markdown
    record = runs.resume(Record, path, settings_of(arguments))
    wanted = [job for job in jobs if not runs.is_done(record, job)]
    if any(job.variant.method == SYNTHESIZED for job in wanted):
        for job in synthesis_jobs(arguments, recipes_of(arguments)[0]):
            make_images(job, arguments.workers)
    workers: int = arguments.workers
    record = runs.make(record, path, wanted, workers, lambda job: run(job, workers), markdown, line)
    print(markdown(record))
    return 0


# ---------------------------------------------------------------- what is asked


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=list(SCALES))
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--scale", type=float, help="recovery steps over 1200 [1; criteria, correlation: 0.25]"
    )
    scale.add_argument("--paper", action="store_true", help="ResNet-56, 2000 steps, five seeds, --full")
    parser.add_argument("--full", action="store_true", help="all counts, budgets and methods")
    parser.add_argument("--counts", type=int, nargs="+", help="calibration images")
    parser.add_argument("--budgets", type=float, nargs="+", help="shares of the latency")
    parser.add_argument("--drops", type=int, nargs="+", help=f"of criteria, numbers of blocks {[*DROPS]}")
    parser.add_argument("--synthesis-steps", type=int, default=1000, help="of each batch of images [1000]")
    parser.add_argument("--own-sets", action="store_true", help="of made images, a set for each seed")
    parser.add_argument(
        "--exact-steps", type=int, default=0, help="correlation: of adaptors; 0 is without [0]"
    )
    parser.add_argument(
        "--label", default="", help="in the names of runs and results, to keep those of another machine apart"
    )
    runs.add_options(parser, "practise", RECIPE)
    parser.set_defaults(network=None, seeds=None)
    arguments = parser.parse_args(words)
    arguments.full = arguments.full or arguments.paper
    arguments.network = arguments.network or ("resnet56" if arguments.paper else "resnet20")
    arguments.seeds = arguments.seeds or list(range(5 if arguments.paper else 3))
    check(arguments)
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """UsageError for what would make rows unlike what the table says of them."""
    if arguments.scale is not None and arguments.scale <= 0:
        raise UsageError(f"--scale {arguments.scale:g}: must be above 0")
    for word in arguments.overrides:
        key = word.partition("=")[0].strip()
        if key in FIXED or key.partition(".")[0] == "budget":
            raise UsageError(
                f"--set {word}: the rows differ in it or are equal by it; give --scale or --only"
            )
    known = names_of(arguments.table)
    for name in arguments.only or ():
        if name not in known:
            raise UsageError(f"--only {name}: {arguments.table} has {', '.join(known)}")


def names_of(table: str) -> tuple[str, ...]:
    """All that can stand in a table's rows."""
    return {
        "images": tuple(METHODS),
        "data-free": ("practise", SYNTHESIZED),
        "out-of-domain": ("practise", OUT_OF_DOMAIN),
        "criteria": CRITERIA,
        "correlation": (),
    }[table]


def steps_of(arguments: argparse.Namespace) -> int:
    """Steps of each recovery."""
    if arguments.paper:
        return PAPER_STEPS
    scale = SCALES[arguments.table] if arguments.scale is None else float(arguments.scale)
    return max(1, round(STEPS * scale))


def named(arguments: argparse.Namespace) -> str:
    """What tells a call's runs and results from those of another network, recipe, number of steps or machine."""
    parts = [arguments.network, f"{steps_of(arguments)}steps"]
    parts += [] if arguments.recipe == RECIPE else [arguments.recipe.stem]
    parts += [arguments.label] if arguments.label else []
    return "".join(f"-{part}" for part in parts)


def settings_of(arguments: argparse.Namespace) -> Settings:
    synthesis = ""
    if arguments.table == "data-free":
        sets = "a set for each seed" if arguments.own_sets else f"one set, of seed {arguments.seeds[0]}"
        synthesis = f"{sets}, {arguments.synthesis_steps} steps for each batch"
    return Settings(
        table=arguments.table,
        network=arguments.network,
        recipe=arguments.recipe.name,
        steps=steps_of(arguments),
        overrides=tuple(arguments.overrides),
        machine=runs.machine(),
        workers=arguments.workers,
        synthesis=synthesis,
    )


# ---------------------------------------------------------------- the rows


def recipes_of(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """What rows that drop blocks start from, and what those that narrow layers do.

    The second has no settings of a method: those are of blocks. Both have the recipe's recovery.
    """
    stem, folder = arguments.recipe.stem, arguments.runs
    return (
        runs.base_recipe(arguments.recipe, folder / f"{stem}.toml"),
        runs.base_recipe(arguments.recipe, folder / f"{stem}-filters.toml", without=("method",)),
    )


def variants(arguments: argparse.Namespace) -> list[Variant]:
    """The cells of a table that are asked for."""
    table = arguments.table
    counts = arguments.counts or (FULL_COUNTS if arguments.full else COUNTS)[table]
    names = arguments.only or (MAIN if table == "images" and not arguments.full else names_of(table))
    if table == "criteria":
        drops = [drop for drop in arguments.drops or DROPS if drop <= DROPPABLE[arguments.network]]
        return [criterion(name, count, drop) for count in counts for drop in drops for name in names]
    budgets = arguments.budgets or (FULL_BUDGETS if arguments.full else BUDGETS)[table]
    return [cell(arguments, name, count, asked) for asked in budgets for count in counts for name in names]


def criterion(name: str, count: int, drop: int) -> Variant:
    """A fixed number of blocks dropped by one criterion."""
    sets = (
        f"budget.drop_blocks={drop}",
        f"data.calibration.count={count}",
        *METHODS["practise"],
        f'method.criterion="{name}"',
    )
    return Variant(f"{name}-{count}-{drop}blocks", name, count, drop, sets)


def cell(arguments: argparse.Namespace, name: str, count: int, asked: float) -> Variant:
    """One method, or images of one kind, at a measured latency."""
    sets = (
        f"budget.latency_reduction={asked:g}",
        f"data.calibration.count={count}",
        *METHODS.get(name, METHODS["practise"]),
    )
    if name == OUT_OF_DOMAIN:
        sets += (f"data.calibration.source={OUTSIDE}",)
    label = f"{name}-{count}-{100 * asked:g}"
    if name == SYNTHESIZED:
        own = "-own" if arguments.own_sets else ""
        label += f"-{arguments.synthesis_steps}each{own}"
    return Variant(label, name, count, asked, sets)


def jobs_of(arguments: argparse.Namespace, blocks: Path, filters: Path) -> Iterator[Job]:
    """All rows in the order in which they are made: the first seed of each, then the second."""
    for seed in arguments.seeds:
        for variant in variants(arguments):
            start = runs.optpipe_run(filters if variant.method.startswith("filters") else blocks)
            overrides = (
                *runs.threads_of(arguments.workers),
                *QUICK,
                *(made_images(arguments, variant.count, seed) if variant.method == SYNTHESIZED else ()),
                f"recover.steps={steps_of(arguments)}",
                *variant.sets,
            )
            # The rows with real images are the same runs in all tables.
            kept = "images" if variant.method == "practise" else arguments.table
            where = argparse.Namespace(**{**vars(arguments), "table": kept})
            yield runs.job(where, named(arguments), variant, seed, start, overrides)


# ---------------------------------------------------------------- images made from the network


def made_images(arguments: argparse.Namespace, count: int, seed: int) -> tuple[str, ...]:
    """What takes the place of real images in a row: those that the job of this set leaves behind."""
    path = set_folder(arguments, count, seed if arguments.own_sets else arguments.seeds[0])
    return (f"data.calibration.source={json.dumps(str(path.resolve() / 'synthesized.npz'))}",)


def set_folder(arguments: argparse.Namespace, count: int, seed: int) -> Path:
    """The run that makes a set of images."""
    folder: Path = arguments.runs
    return folder / f"synthesis-{arguments.network}-{arguments.synthesis_steps}each-{count}-seed{seed}"


def synthesis_jobs(arguments: argparse.Namespace, recipe: Path) -> Iterator[Job]:
    """The runs that make the sets; of each only the images are used."""
    counts = arguments.counts or COUNTS["data-free"]
    for seed in arguments.seeds if arguments.own_sets else arguments.seeds[:1]:
        for count in counts:
            sets = (
                "budget.drop_blocks=1",
                f"data.calibration.count={count}",
                'data.calibration.source="synthesize"',
                f"data.synthesize.steps={arguments.synthesis_steps}",
                *METHODS["practise"],
            )
            variant = Variant(f"synthesis-{count}", SYNTHESIZED, count, 0.0, sets)
            overrides = (*runs.threads_of(arguments.workers), *QUICK, "recover.steps=1", *sets)
            made = runs.job(arguments, "", variant, seed, runs.optpipe_run(recipe), overrides)
            folder = set_folder(arguments, count, seed)
            command = tuple(str(folder) if word == str(made.folder) else word for word in made.command)
            yield dataclasses.replace(made, folder=folder, command=command)


def make_images(job: Job, workers: int) -> None:
    """Make a set of images now, unless it is there. Raises RunError where nothing came of it."""
    print(f"images from the network: {job.folder.name}", flush=True)
    row, _ = run(job, workers)
    if row.figures is None:
        raise RunError(f"{job.folder}: no images were made from the network: {row.failed}")
    print(f"made and checked in {row.figures.measured.whole_s:.0f} s", flush=True)


# ---------------------------------------------------------------- one run


def run(job: Job, workers: int = 1) -> tuple[Row, Facts | None]:
    """The row of one command, run now unless its folder holds all that it would make."""
    return runs.run(job, outcome, workers)


def outcome(job: Job) -> tuple[Figures, Facts]:
    """What a finished command left in its folder."""
    report = build.read(job.folder)
    return figures_of(report), runs.facts_of(report)


def figures_of(report: schema.Report) -> Figures:
    """What a table shows of a report."""
    return Figures(runs.figures_of(report), report.plan.drop_blocks, report.recover.steps)


def line(figures: Figures) -> str:
    """A run's figures for the terminal."""
    dropped = f"{len(figures.dropped)} blocks gone, " if figures.dropped else ""
    return dropped + runs.line(figures.measured)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
