"""EKG against other scorers, its ablations, what its memory bank costs, and 500 images.

    python -m benchmarks.ekg macs         # 47% fewer MACs, equal epochs for all
    python -m benchmarks.ekg latency      # the same at 30% less measured latency
    python -m benchmarks.ekg time         # the seconds with and without the memory bank, in turn
    python -m benchmarks.ekg tiny         # 500 images and 300 iterations, beside Torch-Pruning

Each row is an ordinary ``optpipe run`` in a process of its own, seed 0 of all rows first; a run that is done
is not repeated, one that was stopped goes on, and one that failed is a row that says why. Rows are written as
they come. ``--scale`` is the number of epochs of fine-tuning (``--paper``: the paper's 100). Whatever is no
default, the network or the scale, goes into the names of runs and results, so that no trial run overwrites
results.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from benchmarks import runs
from benchmarks.ekg_rows import Job, Outcome, Record, Row, Settings, Variant
from benchmarks.ekg_tables import PAPER_EPOCHS, markdown
from benchmarks.runs import ROOT, Facts, Figures
from optpipe import store
from optpipe.errors import OptpipeError, RunError
from optpipe.report import build, schema

RECIPE = ROOT / "recipes" / "cifar10" / "ekg_resnet56.toml"
EPOCHS = {"macs": 4.0, "latency": 4.0, "time": 2.0, "tiny": 0.0}
BATCH = 64
IMAGES = 500
RIVAL_SHARES = (40, 50, 55, 60)
MACS = "budget.macs_reduction=0.47"
LATENCY = "budget.latency_reduction=0.3"
TINY = {25: "budget.latency_reduction=0.25", 29: "budget.latency_reduction=0.29"}


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    recipe = base_recipe(arguments)
    jobs = list(jobs_of(arguments, recipe))
    if arguments.dry_run:
        for job in jobs:
            print(shlex.join(job.command))
        return 0
    path = arguments.out / f"ekg_{arguments.table}{suffix(arguments)}.json"
    record = runs.resume(Record, path, settings_of(arguments))
    wanted = [job for job in jobs if not is_done(record, job, jobs)]
    workers: int = arguments.workers
    record = runs.make(record, path, wanted, workers, lambda job: run(job, workers), markdown, runs.line)
    print(markdown(record))
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=list(EPOCHS))
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--scale", type=float, help="epochs of fine-tuning [4; time: 2]")
    scale.add_argument("--paper", dest="scale", action="store_const", const=float(PAPER_EPOCHS))
    parser.add_argument("--steps", type=int, default=300, help="iterations of the table tiny [300]")
    runs.add_options(parser, "ekg", RECIPE)
    arguments = parser.parse_args(words)
    if arguments.workers > 1 and arguments.table == "time":
        parser.error(f"--workers {arguments.workers}: {arguments.table} compares seconds; give 1")
    return arguments


def suffix(arguments: argparse.Namespace) -> str:
    """What tells the names of this call's runs and results from those of the default scale."""
    return runs.suffix(arguments, *([] if arguments.steps == 300 else [f"{arguments.steps}steps"]))


def settings_of(arguments: argparse.Namespace) -> Settings:
    budgets = {"tiny": tuple(TINY.values()), "macs": (MACS,), "time": (MACS,)}.get(
        arguments.table, (LATENCY,)
    )
    return Settings(
        table=arguments.table,
        network=arguments.network,
        budgets=budgets,
        epochs=epochs_of(arguments),
        steps=arguments.steps,
        overrides=tuple(arguments.overrides),
        machine=runs.machine(),
        workers=arguments.workers,
    )


def epochs_of(arguments: argparse.Namespace) -> float:
    """Epochs of fine-tuning; 500 images are trained for iterations."""
    return EPOCHS[arguments.table] if arguments.scale is None else float(arguments.scale)


def base_recipe(arguments: argparse.Namespace) -> Path:
    """The recipe that all rows start from: without its budget, of which there can be only one kind.

    For 500 images also without its ``[recover]`` table, which is not for that many.
    """
    path: Path = arguments.runs / f"{arguments.recipe.stem}-{arguments.table}.toml"
    return runs.base_recipe(arguments.recipe, path, ["recover"] if arguments.table == "tiny" else [])


def jobs_of(arguments: argparse.Namespace, recipe: Path) -> Iterator[Job]:
    """All rows in the order in which they are made: the first seed of each, then the second."""
    for number, seed in enumerate(arguments.seeds):
        found = variants(arguments)
        if arguments.table == "time" and number % 2:
            found.reverse()
        for variant, overrides in found:
            if arguments.only and variant.name not in arguments.only:
                continue
            start = command(arguments.table, variant, recipe)
            yield runs.job(arguments, suffix(arguments), variant, seed, start, overrides)


def command(table: str, variant: Variant, recipe: Path) -> tuple[str, ...]:
    """The beginning of a configuration's command."""
    if variant.score == "torch-pruning":
        share = variant.name.rpartition("-")[2]
        return (sys.executable, "-m", "benchmarks.ekg_rival", str(recipe), "--share", share)
    return (*runs.optpipe_run(recipe), *(["--fresh"] if table == "time" else []))


def variants(arguments: argparse.Namespace) -> list[tuple[Variant, tuple[str, ...]]]:
    """The configurations of a table, each with what it sets."""
    if arguments.table == "tiny":
        return tiny_variants(arguments.steps, runs.threads_of(arguments.workers))
    everywhere: tuple[str, ...] = (
        f"recover.epochs={epochs_of(arguments)}",
        "recover.views=2",
        'recover.loss="labels"',
    )
    if arguments.table == "macs":
        everywhere = (MACS, 'method.timed="last"', *everywhere)
        # The rows that share a search stand apart: the first has stored it when the others come. Where only
        # layers inside blocks are narrowed, as here, GBN's scores are EKG's, and "gbn" is its search without a
        # guide too.
        ekg = [("ensemble", "none"), ("single", "none"), ("ensemble", "ensemble"), ("ensemble", "single")]
        rivals = ["l1", "fpgm", "gbn", "random"]
    else:
        everywhere = (LATENCY, *runs.threads_of(arguments.workers), *everywhere)
        ekg = [("ensemble", "none"), ("ensemble", "ensemble")]
        rivals = ["l1", "fpgm", "gbn", "random"]
    if arguments.table == "time":
        # Two runs with equal work but for the bank: the number of steps to a latency would differ by noise.
        everywhere, rivals = (MACS, 'method.timed="last"', *everywhere[1:], "run.cache=false"), []
        ekg.reverse()
    found = [Variant(f"ekg-{guide}-{teachers}", "taylor", guide, teachers) for guide, teachers in ekg]
    found[1:1] = [Variant(score, score, "none", "none") for score in rivals]
    return [
        (
            variant,
            (
                *everywhere,
                f'method.score="{variant.score}"',
                f'method.guide="{variant.guide}"',
                f'recover.teachers="{variant.teachers}"',
            ),
        )
        for variant in found
    ]


def tiny_variants(steps: int, threads: tuple[str, ...]) -> list[tuple[Variant, tuple[str, ...]]]:
    """EKG's search with either recovery at two budgets, and the rival's shares of channels."""
    # About 50 images a class: a third of them for the reward, the others for the epoch before the search.
    images = (*threads, f"data.calibration.count={IMAGES}", "method.score_images=16")
    own = (f"recover.steps={steps}", f"recover.batch={BATCH}")
    mimic = ('recover.name="practise"', *own)
    searched = (*images, 'method.score="taylor"', 'method.guide="ensemble"')
    found: list[tuple[Variant, tuple[str, ...]]] = []
    for percent, budget in TINY.items():
        for name, teachers, recover in (("practise", "mimicking", mimic), ("ekg", "ensemble", own)):
            variant = Variant(f"ekg-{percent}-{name}", "taylor", "ensemble", teachers)
            found.append((variant, (budget, *searched, *recover)))
    for share in RIVAL_SHARES:
        variant = Variant(f"tp-l1-{share}", "torch-pruning", "none", "mimicking")
        # The budget is not the rival's, but a recipe has one.
        found.append((variant, (TINY[25], *images, *mimic)))
    return found


def run(job: Job, workers: int = 1) -> tuple[Row, Facts | None]:
    """The row of one command, run now unless its folder holds all that it would make."""
    return runs.run(job, outcome, workers)


def outcome(job: Job) -> tuple[Figures, Facts]:
    """What a finished command left in its folder."""
    if job.variant.score != "torch-pruning":
        report = build.read(job.folder)
        return figures_of(report), runs.facts_of(report)
    path = job.folder / "figures.json"
    try:
        left = store.from_json(Outcome, path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError(f"{path}: holds no figures: {error}") from error
    return left.figures, left.facts


def figures_of(report: schema.Report) -> Figures:
    """What a table shows of a report."""
    # Step by step they say something only where every step was timed.
    return runs.figures_of(report, report.tables if report.budget.asked.latency_reduction is not None else ())


def is_done(record: Record, job: Job, jobs: Sequence[Job]) -> bool:
    """Whether a row is there already; of seconds that are compared, whether all of its seed are."""
    compared = [job]
    if record.settings.table == "time":
        compared = [other for other in jobs if other.seed == job.seed]
    return all(runs.is_done(record, other) for other in compared)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
