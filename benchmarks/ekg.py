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
import contextlib
import dataclasses
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from benchmarks.ekg_rows import Facts, Figures, Outcome, Record, Row, Settings, Variant
from benchmarks.ekg_tables import PAPER_EPOCHS, markdown
from optpipe import store
from optpipe.errors import OptpipeError, RunError, UsageError
from optpipe.files import write_atomically
from optpipe.report import build, schema

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = ROOT / "recipes" / "cifar10" / "ekg_resnet56.toml"
WEIGHTS = "${OPTPIPE_DATA:-../../../shared}/weights"
NETWORKS = {
    "resnet56": (),
    "resnet20": (
        "model.name=zoo:resnet20_cifar",
        f"model.weights={WEIGHTS}/resnet20_cifar10.safetensors",
    ),
}
EPOCHS = {"macs": 4.0, "latency": 4.0, "time": 2.0, "tiny": 0.0}
BATCH = 64
IMAGES = 500
RIVAL_SHARES = (40, 50, 55, 60)
MACS = "budget.macs_reduction=0.47"
LATENCY = "budget.latency_reduction=0.3"
TINY = {25: "budget.latency_reduction=0.25", 29: "budget.latency_reduction=0.29"}


@dataclass(frozen=True, slots=True)
class Job:
    """One row to be made: a command and the folder in which it leaves its report or its figures."""

    variant: Variant
    seed: int
    folder: Path
    command: tuple[str, ...]


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    recipe = base_recipe(arguments)
    jobs = list(jobs_of(arguments, recipe))
    if arguments.dry_run:
        for job in jobs:
            print(shlex.join(job.command))
        return 0
    path = arguments.out / f"ekg_{arguments.table}{suffix(arguments)}.json"
    record = resume(path, settings_of(arguments))
    wanted = [job for job in jobs if not is_done(record, job, jobs)]
    with ThreadPoolExecutor(arguments.workers) as pool:
        # Not at the end of all: rows are written as they come.
        for done in as_completed([pool.submit(run, job, arguments.workers) for job in wanted]):
            record = with_row(record, *done.result())
            write_atomically(path, store.to_json(record))
            write_atomically(path.with_suffix(".md"), markdown(record))
            print(one_line(record.rows[-1]), flush=True)
    print(markdown(record))
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=list(EPOCHS))
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--scale", type=float, help="epochs of fine-tuning [4; time: 2]")
    scale.add_argument("--paper", dest="scale", action="store_const", const=float(PAPER_EPOCHS))
    parser.add_argument("--steps", type=int, default=300, help="iterations of the table tiny [300]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet56")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these configurations alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/ekg"), help="where the runs are kept")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; not of time [1]")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    arguments = parser.parse_args(words)
    if arguments.workers > 1 and arguments.table == "time":
        parser.error(f"--workers {arguments.workers}: {arguments.table} compares seconds; give 1")
    return arguments


def suffix(arguments: argparse.Namespace) -> str:
    """What tells the names of this call's runs and results from those of the default scale."""
    parts = [] if arguments.network == "resnet56" else [arguments.network]
    parts += [] if arguments.scale is None else [f"{arguments.scale:g}epochs"]
    parts += [] if arguments.steps == 300 else [f"{arguments.steps}steps"]
    return "".join(f"-{part}" for part in parts)


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
        machine=f"{platform.platform()}, {os.cpu_count()} cores",
        workers=arguments.workers,
    )


def epochs_of(arguments: argparse.Namespace) -> float:
    """Epochs of fine-tuning; 500 images are trained for iterations."""
    return EPOCHS[arguments.table] if arguments.scale is None else float(arguments.scale)


def base_recipe(arguments: argparse.Namespace) -> Path:
    """The recipe that all rows start from: without its budget, of which there can be only one kind.

    For 500 images also without its ``[recover]`` table, which is not for that many.
    """
    if not arguments.recipe.is_file():
        raise UsageError(f"{arguments.recipe}: there is no such recipe; name another with --recipe")
    raw = tomllib.loads(arguments.recipe.read_text(encoding="utf-8"))
    raw["budget"] = {}
    if arguments.table == "tiny":
        raw.pop("recover", None)
    path: Path = arguments.runs / f"{arguments.recipe.stem}-{arguments.table}.toml"
    write_atomically(path, tomli_w.dumps(raw))
    return path


def jobs_of(arguments: argparse.Namespace, recipe: Path) -> Iterator[Job]:
    """All rows in the order in which they are made: the first seed of each, then the second."""
    for number, seed in enumerate(arguments.seeds):
        found = variants(arguments)
        if arguments.table == "time" and number % 2:
            found.reverse()
        for variant, overrides in found:
            if arguments.only and variant.name not in arguments.only:
                continue
            folder = arguments.runs / f"{arguments.table}-{variant.name}{suffix(arguments)}-seed{seed}"
            seeded = (f"run.seed={seed}", f"data.calibration.seed={seed}")
            words = (*NETWORKS[arguments.network], *overrides, *seeded, *arguments.overrides)
            yield Job(variant, seed, folder, command(arguments.table, variant, recipe, folder, words))


def command(
    table: str, variant: Variant, recipe: Path, folder: Path, overrides: Sequence[str]
) -> tuple[str, ...]:
    if variant.score == "torch-pruning":
        start = [sys.executable, "-m", "benchmarks.ekg_rival", str(recipe)]
        start += ["--share", variant.name.rpartition("-")[2]]
    else:
        start = [sys.executable, "-m", "optpipe.cli", "run", str(recipe), "--quiet"]
        start += ["--fresh"] if table == "time" else []
    return (*start, "--out", str(folder), *(word for one in overrides for word in ("--set", one)))


def variants(arguments: argparse.Namespace) -> list[tuple[Variant, tuple[str, ...]]]:
    """The configurations of a table, each with what it sets."""
    if arguments.table == "tiny":
        return tiny_variants(arguments.steps, threads_of(arguments))
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
        everywhere = (LATENCY, *threads_of(arguments), *everywhere)
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


def threads_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Engines on one run's share of the cores, so that one is timed while another run trains beside it."""
    if arguments.workers == 1:
        return ()
    return (f"target.threads={max(1, (os.cpu_count() or 1) // arguments.workers)}",)


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
    """The row of one command, run now unless its folder holds all that it would make.

    ``workers`` commands run at a time, each with its share of the cores.
    """
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))} if workers > 1 else {}
    environment = {
        **os.environ,
        **share,
        "OPTPIPE_DATA": os.environ.get("OPTPIPE_DATA", str(ROOT.parent / "shared")),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    done = subprocess.run(
        job.command,
        check=False,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode in {130, -2}:
        raise KeyboardInterrupt
    if done.returncode:
        return Row(job.variant, job.seed, None, reason(done.stderr, done.returncode)), None
    try:
        figures, facts = outcome(job)
    except OptpipeError as error:
        return Row(job.variant, job.seed, None, str(error)), None
    return Row(job.variant, job.seed, figures), facts


def reason(stderr: str, code: int) -> str:
    """Why a command failed, in one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    text = (said or lines or [f"exit code {code}"])[-1]
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def outcome(job: Job) -> tuple[Figures, Facts]:
    """What a finished command left in its folder."""
    if job.variant.score != "torch-pruning":
        report = build.read(job.folder)
        return figures_of(report), facts_of(report)
    path = job.folder / "figures.json"
    try:
        left = store.from_json(Outcome, path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError(f"{path}: holds no figures: {error}") from error
    return left.figures, left.facts


def figures_of(report: schema.Report) -> Figures:
    """What a table shows of a report."""
    original, result = report.original, report.result
    latency = result.latency
    if latency.ratio_to_original is None or latency.ratio_ci95 is None or result.agreement is None:
        raise RunError(f"{report.name}: its result was not timed and scored beside the original")
    return Figures(
        saving=100 * (1 - latency.ratio_to_original),
        saving_low=100 * (1 - latency.ratio_ci95[1]),
        saving_high=100 * (1 - latency.ratio_ci95[0]),
        macs_saving=100 * (1 - result.macs / original.macs),
        parameters_saving=100 * (1 - result.parameters / original.parameters),
        original_top1=100 * original.quality.value,
        before_recovery=100 * report.quality_before_recovery.value,
        top1=100 * result.quality.value,
        agreement=100 * result.agreement.value,
        met=report.budget.met,
        stages={name: stage.seconds for name, stage in report.stages.items()},
        widths=tuple((group, len(kept)) for group, kept in report.plan.keep_channels),
        # Step by step they say something only where every step was timed.
        tables=report.tables if report.budget.asked.latency_reduction is not None else (),
    )


def facts_of(report: schema.Report) -> Facts:
    return Facts(
        executed_on=report.environment.executed_on,
        platform=report.environment.platform,
        versions=report.environment.versions,
        calibration_count=report.data.calibration_count,
        evaluation_count=report.data.evaluation_count,
    )


def resume(path: Path, settings: Settings) -> Record:
    """The rows that are there, if they were made with the same settings; else none."""
    fresh = Record(settings, "", None, ())
    with contextlib.suppress(FileNotFoundError, ValidationError):
        found = store.from_json(Record, path.read_bytes())
        if found.settings == settings:
            return found
    return fresh


def is_done(record: Record, job: Job, jobs: Sequence[Job]) -> bool:
    """Whether a row is there already; of seconds that are compared, whether all of its seed are."""
    wanted = {job.variant}
    if record.settings.table == "time":
        wanted = {other.variant for other in jobs if other.seed == job.seed}
    made = {row.variant for row in record.rows if row.seed == job.seed and row.figures is not None}
    return wanted <= made


def with_row(record: Record, row: Row, facts: Facts | None) -> Record:
    """The record with a row added, in the place of an earlier one of the same name and seed."""
    kept = [old for old in record.rows if (old.variant.name, old.seed) != (row.variant.name, row.seed)]
    return dataclasses.replace(
        record,
        date=datetime.now(UTC).date().isoformat(),
        facts=facts or record.facts,
        rows=(*kept, row),
    )


def one_line(row: Row) -> str:
    """A row for the terminal."""
    figures = row.figures
    if figures is None:
        return f"{row.variant.name}, seed {row.seed}: FAILED: {row.failed}"
    return (
        f"{row.variant.name}, seed {row.seed}: top-1 {figures.top1:.2f} ({figures.before_recovery:.1f} before), "
        f"latency {-figures.saving:+.1f}%, MACs -{figures.macs_saving:.1f}%, {figures.whole_s:.0f} s"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
