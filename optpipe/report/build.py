"""Judge a finished run against its budget, and write its report."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from pydantic import ValidationError

from optpipe import files, seals, store
from optpipe.errors import UsageError
from optpipe.report import figures, html, markdown, schema, unmeant
from optpipe.types import Budget, Latency, Plan


def judge(
    budget: Budget, original: schema.NetworkReport, result: schema.NetworkReport, plan: Plan
) -> schema.BudgetReport:
    """Whether the final measurement meets what was asked.

    A latency budget is met by the median ratio; the verdict says when the interval reaches beyond it.
    """
    if budget.drop_blocks is not None:
        dropped = len(plan.drop_blocks)
        met = dropped >= budget.drop_blocks
        return schema.BudgetReport(budget, met, f"{dropped} of {budget.drop_blocks} blocks dropped")
    if budget.macs_reduction is not None:
        return _judge_size(budget, "MACs", result.macs / original.macs, budget.macs_reduction)
    if budget.parameters_reduction is not None:
        ratio = result.parameters / original.parameters
        return _judge_size(budget, "parameters", ratio, budget.parameters_reduction)
    if budget.sparsity is not None:
        met = result.sparsity >= budget.sparsity - 1e-9
        return schema.BudgetReport(budget, met, f"zeros {result.sparsity:.2%}, asked {budget.sparsity:.2%}")
    return _judge_latency(budget, original.latency, result.latency)


def _judge_size(budget: Budget, what: str, ratio: float, reduction: float) -> schema.BudgetReport:
    # 10 left of 100 are 90% fewer, though 1 - 0.9 is a hair below 0.1.
    met = ratio <= 1 - reduction + 1e-9
    return schema.BudgetReport(budget, met, f"{what} {ratio - 1:+.1%}, asked {-reduction:+.1%}")


def _judge_latency(budget: Budget, original: Latency, result: Latency) -> schema.BudgetReport:
    allowed = budget.allowed_ratio(original)
    ratio, ci95 = result.ratio_to_original, result.ratio_ci95
    assert allowed is not None and ratio is not None and ci95 is not None
    met = ratio <= allowed
    verdict = f"latency {ratio - 1:+.1%} ({ci95[0] - 1:+.1%} to {ci95[1] - 1:+.1%}), asked {allowed - 1:+.1%}"
    if met and ci95[1] > allowed:
        verdict += "; the interval reaches beyond what was asked"
    return schema.BudgetReport(budget, met, verdict)


def with_advice(precisions: tuple[schema.PrecisionReport, ...]) -> tuple[schema.PrecisionReport, ...]:
    """The same with a note on each precision that is slower than wider ones, which are then the better.

    Slower means that the 95% intervals of the two ratios to the original are apart.
    """
    width = ("fp32", "bf16", "fp16", "int8")
    ordered = sorted(precisions, key=lambda one: width.index(one.precision))
    advised: list[schema.PrecisionReport] = []
    for one in precisions:
        faster = [other for other in ordered[: ordered.index(one)] if _is_slower(one.latency, other.latency)]
        names = " and ".join(other.precision for other in faster)
        notes = [f"slower than {names}: deploy {min(faster, key=_ratio).precision} here"] if faster else []
        advised.append(dataclasses.replace(one, notes=(*one.notes, *notes)))
    return tuple(advised)


def _ratio(one: schema.PrecisionReport) -> float:
    assert one.latency is not None and one.latency.ratio_to_original is not None
    return one.latency.ratio_to_original


def _is_slower(latency: Latency | None, other: Latency | None) -> bool:
    if latency is None or other is None or latency.ratio_ci95 is None or other.ratio_ci95 is None:
        return False
    return latency.ratio_ci95[0] > other.ratio_ci95[1]


def write(folder: Path, report: schema.Report) -> None:
    """Write report.json and all that shows it."""
    files.write_atomically(folder / "report.json", store.to_sealed(report))
    show(folder, report)


def show(folder: Path, report: schema.Report) -> None:
    """Write the figures, report.md, which shows them, and report.html, which holds its own."""
    shown = markdown.all_figures(report)
    for figure, path in zip(shown, markdown.figure_paths(shown), strict=True):
        files.write_atomically(folder / path, figures.figure_svg(figure))
    files.write_atomically(folder / "report.md", markdown.render(report))
    files.write_atomically(folder / "report.html", html.render(report))


def read(run: Path) -> schema.Report:
    """The report of a finished run; ``run`` is its folder or the report.json itself.

    Raises:
        UsageError: the run has no report, or it is of another version.
    """
    path = run if run.is_file() else run / "report.json"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        try:
            report = store.from_json(schema.Report, path.read_bytes())
        except seals.DamagedError as error:
            raise UsageError(f"{path}: {error}; give the same optpipe run again to have it anew") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise UsageError(f"{path}: is no report of this version: {where}{first['msg']}") from None
        if report.schema != schema.SCHEMA:
            raise UsageError(f"{path}: is of version {report.schema}; this optpipe reads {schema.SCHEMA}")
        if problem := unmeant.problem(report):
            raise UsageError(f"{path}: {problem}, which no run writes; is the file damaged?")
        return report
    raise UsageError(f"{path}: there is no report; has the run finished?")
