"""A recipe at several latency budgets and seeds: accuracy and measured latency of each result.

    python -m benchmarks.budgets recipes/cifar10/practise_resnet56.toml

Each run is an ordinary ``optpipe run`` in a process of its own, with another seed for the calibration images,
the recovery and the clock; a run that is done is not repeated. Rows are written as they come. ``--scale``
multiplies the recovery's steps: 1 is the recipe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from optpipe import recipe as recipes
from optpipe.files import write_atomically
from optpipe.report import build, schema

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Row:
    """One finished run; accuracies and savings in percent and points, ``seconds`` as the stages took."""

    budget: float
    seed: int
    dropped: int
    saving: float
    saving_low: float
    saving_high: float
    macs_saving: float
    original_top1: float
    before_recovery: float
    top1: float
    change: float
    agreement: float
    met: bool
    seconds: float
    recover_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.22, 0.35, 0.60])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--runs", type=Path, default=Path("runs/budgets"), help="where the runs are kept")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: list[Row] = []
    report = None
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            report = run(arguments, budget, seed)
            rows.append(row_of(report, budget, seed))
            publish(arguments, rows, report)
            print(rows[-1], flush=True)


def run(arguments: argparse.Namespace, budget: float, seed: int) -> schema.Report:
    """The report of one run, made now unless its folder holds it already."""
    folder = arguments.runs / f"{arguments.recipe.stem}-{budget:g}-seed{seed}"
    overrides = [
        f"budget.latency_reduction={budget}",
        f"run.seed={seed}",
        f"data.calibration.seed={seed}",
        *arguments.overrides,
    ]
    if arguments.scale != 1.0:
        steps = recipes.load(arguments.recipe).recover.get("steps", 1200)
        assert isinstance(steps, int)
        overrides.append(f"recover.steps={max(1, round(steps * arguments.scale))}")
    command = [sys.executable, "-m", "optpipe.cli", "run", str(arguments.recipe), "--quiet"]
    command += ["--out", str(folder), *(word for override in overrides for word in ("--set", override))]
    subprocess.run(command, check=True)
    return build.read(folder)


def row_of(report: schema.Report, budget: float, seed: int) -> Row:
    """What the table shows of a report."""
    original, result = report.original, report.result
    latency = result.latency
    assert latency.ratio_to_original is not None and latency.ratio_ci95 is not None
    assert result.agreement is not None
    return Row(
        budget=budget,
        seed=seed,
        dropped=len(report.plan.drop_blocks),
        saving=100 * (1 - latency.ratio_to_original),
        saving_low=100 * (1 - latency.ratio_ci95[1]),
        saving_high=100 * (1 - latency.ratio_ci95[0]),
        macs_saving=100 * (1 - result.macs / original.macs),
        original_top1=100 * original.quality.value,
        before_recovery=100 * report.quality_before_recovery.value,
        top1=100 * result.quality.value,
        change=100 * (result.quality.value - original.quality.value),
        agreement=100 * result.agreement.value,
        met=report.budget.met,
        seconds=sum(stage.seconds for stage in report.stages.values()),
        recover_seconds=report.stages["recover"].seconds,
    )


def publish(arguments: argparse.Namespace, rows: list[Row], report: schema.Report) -> None:
    """Write all rows so far as JSON and Markdown."""
    name = f"budgets_{arguments.recipe.stem}"
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "recipe": str(arguments.recipe),
        "scale": arguments.scale,
        "overrides": arguments.overrides,
        "executed_on": report.environment.executed_on,
        "platform": report.environment.platform,
        "versions": report.environment.versions,
        "evaluation_images": report.data.evaluation_count,
        "calibration_images": report.data.calibration_count,
        "recover": asdict(report.recover),
        "rows": [asdict(row) for row in rows],
    }
    write_atomically(arguments.out / f"{name}.json", json.dumps(facts, indent=1) + "\n")
    write_atomically(arguments.out / f"{name}.md", markdown(facts, rows))


def markdown(facts: dict[str, object], rows: list[Row]) -> str:
    lines = [
        f"# {facts['recipe']} at several budgets",
        "",
        f"{facts['date']}, {facts['executed_on']}, {facts['platform']}; scale {facts['scale']}; "
        f"{facts['calibration_images']} calibration and {facts['evaluation_images']} evaluation images, which "
        f"are disjoint; versions {facts['versions']}.",
        "",
        "Latency of the result beside the original's, timed in turn; a seed decides the calibration images, "
        "the recovery and the clock. Seconds of a run are those of its stages; runs share engines, and those of a seed "
        "their scores, so that only the first pays for them.",
        "",
        "| budget | seed | dropped | measured saving (95% interval) | MACs | before recovery | top-1 | change, "
        "points | agreement | run s | recovery s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.budget, row.seed)):
        lines.append(
            f"| {row.budget:.0%} | {row.seed} | {row.dropped} | {row.saving:.1f}% ({row.saving_low:.1f} to "
            f"{row.saving_high:.1f}) | -{row.macs_saving:.1f}% | {row.before_recovery:.1f} | {row.top1:.2f} | "
            f"{row.change:+.2f} | {row.agreement:.1f} | {row.seconds:.0f} | {row.recover_seconds:.0f} |"
        )
    lines += [
        "",
        "| budget | seeds | top-1 change: median | mean ± sd | saving: least |",
        "|---|---|---|---|---|",
    ]
    for budget in sorted({row.budget for row in rows}):
        mine = [row for row in rows if row.budget == budget]
        changes = [row.change for row in mine]
        spread = f" ± {statistics.stdev(changes):.2f}" if len(changes) > 1 else ""
        lines.append(
            f"| {budget:.0%} | {len(mine)} | {statistics.median(changes):+.2f} | "
            f"{statistics.mean(changes):+.2f}{spread} | {min(row.saving for row in mine):.1f}% |"
        )
    lines.append("")
    lines.append(f"Original top-1: {rows[0].original_top1:.2f}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
