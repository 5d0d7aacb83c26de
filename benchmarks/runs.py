"""What benchmarks share of which each row is a run in a process of its own: how it is made, kept and resumed.

A run that is done is not repeated, one that was stopped goes on, and one that failed is a row that says why.
Rows are written as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import tomli_w
from pydantic import ValidationError

from optpipe import store
from optpipe.errors import OptpipeError, RunError, UsageError
from optpipe.files import write_atomically
from optpipe.report import schema
from optpipe.types import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WEIGHTS = "${OPTPIPE_DATA:-../../../shared}/weights"
NETWORKS = {
    "resnet56": (),
    "resnet20": (
        "model.name=zoo:resnet20_cifar",
        f"model.weights={WEIGHTS}/resnet20_cifar10.safetensors",
    ),
}


class Named(Protocol):
    """A configuration: what tells one line of a table from another."""

    @property
    def name(self) -> str:
        """Unique within the table, and a part of a folder's name."""
        ...


class Scored(Protocol):
    """What a run came to."""

    @property
    def top1(self) -> float:
        """Percent."""
        ...


V = TypeVar("V", bound=Named)
F = TypeVar("F", bound=Scored)
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured: percent, points of accuracy, and the seconds of its stages.

    ``widths`` are channels kept of each narrowed group, ``tables`` such as the search left in the report.
    """

    saving: float
    saving_low: float
    saving_high: float
    macs_saving: float
    parameters_saving: float
    original_top1: float
    before_recovery: float
    top1: float
    agreement: float
    met: bool
    stages: dict[str, float]
    widths: tuple[tuple[str, int], ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def change(self) -> float:
        """Points of top-1 against the original."""
        return self.top1 - self.original_top1

    @property
    def search_s(self) -> float:
        """Seconds of the search."""
        return self.stages.get("analyze", 0.0)

    @property
    def recover_s(self) -> float:
        """Seconds of the recovery, a memory bank with it."""
        return self.stages.get("recover", 0.0)

    @property
    def whole_s(self) -> float:
        """Seconds of all stages."""
        return sum(self.stages.values())


@dataclass(frozen=True, slots=True)
class Facts:
    """Where and on what the runs were made."""

    executed_on: str
    platform: str
    versions: dict[str, str]
    calibration_count: int
    evaluation_count: int
    validation_count: int = 0


# Generic classes with slots are called by their bare names: Python 3.11 cannot call Row[X, Y] (it then sets an
# attribute that a frozen one refuses).
@dataclass(frozen=True, slots=True)
class Job(Generic[V]):
    """One row to be made: a command and the folder in which it leaves its report or its figures."""

    variant: V
    seed: int
    folder: Path
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row(Generic[V, F]):
    """One run: its figures, or why there are none."""

    variant: V
    seed: int
    figures: F | None
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Record(Generic[S, V, F]):
    """A table as it is kept: rows in the order in which they were made.

    Rows stand in one table where the settings are equal.
    """

    settings: S
    date: str
    facts: Facts | None
    rows: tuple[Row[V, F], ...]


# ---------------------------------------------------------------- what is asked


def add_options(parser: argparse.ArgumentParser, folder: str, recipe: Path) -> None:
    """Give a parser the options of every such benchmark, but for the table and the scale."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet56")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these configurations alone")
    parser.add_argument("--runs", type=Path, default=Path("runs") / folder, help="where the runs are kept")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--recipe", type=Path, default=recipe)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")


def suffix(arguments: argparse.Namespace, *more: str) -> str:
    """What tells the names of a call's runs and results from those of the default network and scale."""
    parts = [] if arguments.network == "resnet56" else [arguments.network]
    parts += [] if arguments.scale is None else [f"{arguments.scale:g}epochs"]
    return "".join(f"-{part}" for part in (*parts, *more))


def machine() -> str:
    """This machine, before any run has said on what it was executed."""
    return f"{platform.platform()}, {os.cpu_count()} cores"


def threads_of(workers: int) -> tuple[str, ...]:
    """Engines on one run's share of the cores, so that one is timed while another run trains beside it."""
    return () if workers == 1 else (f"target.threads={_share(workers)}",)


def _share(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


def base_recipe(recipe: Path, path: Path, without: Sequence[str] = ()) -> Path:
    """``path``, with the recipe that all rows start from: without its budget, of which there is only one kind.

    Nor has it the tables ``without``. Raises UsageError where there is no such recipe.
    """
    if not recipe.is_file():
        raise UsageError(f"{recipe}: there is no such recipe; name another with --recipe")
    raw = tomllib.loads(recipe.read_text(encoding="utf-8"))
    raw["budget"] = {}
    for table in without:
        raw.pop(table, None)
    write_atomically(path, tomli_w.dumps(raw))
    return path


def optpipe_run(recipe: Path) -> tuple[str, ...]:
    """The beginning of the command that runs a recipe."""
    return (sys.executable, "-m", "optpipe.cli", "run", str(recipe), "--quiet")


def job(
    arguments: argparse.Namespace,
    named: str,
    variant: V,
    seed: int,
    start: Sequence[str],
    overrides: Sequence[str],
) -> Job[V]:
    """The job of one configuration and seed; ``named`` is the suffix of this call's names."""
    folder: Path = arguments.runs / f"{arguments.table}-{variant.name}{named}-seed{seed}"
    seeded = (f"run.seed={seed}", f"data.calibration.seed={seed}")
    words = (*NETWORKS[arguments.network], *overrides, *seeded, *arguments.overrides)
    sets = (word for one in words for word in ("--set", one))
    return Job(variant, seed, folder, (*start, "--out", str(folder), *sets))


# ---------------------------------------------------------------- one run


def run(
    job: Job[V], outcome: Callable[[Job[V]], tuple[F, Facts]], workers: int = 1
) -> tuple[Row[V, F], Facts | None]:
    """The row of one command, run now unless its folder holds all that it would make.

    ``outcome`` reads what a finished command left in its folder. ``workers`` commands run at a time, each
    with its share of the cores.
    """
    share = {"OMP_NUM_THREADS": str(_share(workers))} if workers > 1 else {}
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


def figures_of(report: schema.Report, tables: Sequence[Table] = ()) -> Figures:
    """What a report measured, and those of its tables that are to be kept."""
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
        tables=tuple(tables),
    )


def facts_of(report: schema.Report) -> Facts:
    return Facts(
        executed_on=report.environment.executed_on,
        platform=report.environment.platform,
        versions=report.environment.versions,
        calibration_count=report.data.calibration_count,
        evaluation_count=report.data.evaluation_count,
        validation_count=report.data.validation_count,
    )


# ---------------------------------------------------------------- the rows that are kept


def resume(kept: type[Record[S, V, F]], path: Path, settings: S) -> Record[S, V, F]:
    """The rows that are there, if they were made with the same settings; else none."""
    with contextlib.suppress(FileNotFoundError, ValidationError):
        found = store.from_json(kept, path.read_bytes())
        if found.settings == settings:
            return found
    return Record(settings, "", None, ())


def is_done(record: Record[S, V, F], job: Job[V]) -> bool:
    """Whether a row is there already, with figures."""
    return any(
        (row.variant, row.seed) == (job.variant, job.seed) and row.figures is not None for row in record.rows
    )


def make(
    record: Record[S, V, F],
    path: Path,
    jobs: Sequence[Job[V]],
    workers: int,
    run: Callable[[Job[V]], tuple[Row[V, F], Facts | None]],
    markdown: Callable[[Record[S, V, F]], str],
    line: Callable[[F], str],
) -> Record[S, V, F]:
    """Run the jobs, ``workers`` at a time, and write ``path`` and the Markdown beside it after each."""
    with ThreadPoolExecutor(workers) as pool:
        # Not at the end of all: rows are written as they come.
        for done in as_completed([pool.submit(run, one) for one in jobs]):
            row, facts = done.result()
            record = with_row(record, row, facts)
            write_atomically(path, store.to_json(record))
            write_atomically(path.with_suffix(".md"), markdown(record))
            said = f"FAILED: {row.failed}" if row.figures is None else line(row.figures)
            print(f"{row.variant.name}, seed {row.seed}: {said}", flush=True)
    return record


def with_row(record: Record[S, V, F], row: Row[V, F], facts: Facts | None) -> Record[S, V, F]:
    """The record with a row added, in the place of an earlier one of the same name and seed."""
    kept = [old for old in record.rows if (old.variant.name, old.seed) != (row.variant.name, row.seed)]
    return dataclasses.replace(
        record,
        date=datetime.now(UTC).date().isoformat(),
        facts=facts or record.facts,
        rows=(*kept, row),
    )


def line(figures: Figures) -> str:
    """A run's figures for the terminal."""
    return (
        f"top-1 {figures.top1:.2f} ({figures.before_recovery:.1f} before), "
        f"latency {-figures.saving:+.1f}%, MACs -{figures.macs_saving:.1f}%, {figures.whole_s:.0f} s"
    )
