from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import make_latency, make_report

from optpipe import store
from optpipe.errors import UsageError
from optpipe.report import build, markdown, schema
from optpipe.types import Budget, Plan

# ---------------------------------------------------------------- report.json


def test_a_report_comes_back_from_json_as_it_was(report: schema.Report, tmp_path: Path) -> None:
    build.write(tmp_path, report)
    assert build.read(tmp_path) == report
    assert build.read(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    "key",
    [
        "schema",
        "method",
        "budget.met",
        *[
            f"{side}.{key}"
            for side in ("original", "result")
            for key in (
                "quality.metric",
                "quality.value",
                "quality.ci95",
                "quality.count",
                "latency.median_ms",
                "latency.samples",
                "parameters",
                "macs",
            )
        ],
        "result.latency.ratio_to_original",
        "result.latency.ratio_ci95",
        "result.agreement",
        "plan",
        *[
            f"stages.{stage}.seconds"
            for stage in ("ingest", "analyze", "prune", "recover", "export", "benchmark")
        ],
        "environment",
    ],
)
def test_what_other_programs_read_is_there(report: schema.Report, key: str) -> None:
    value = json.loads(store.to_json(report))
    for part in key.split("."):
        value = value[part]
    assert value is not None


def test_the_interface_has_a_version_and_fractions(report: schema.Report) -> None:
    value = json.loads(store.to_json(report))
    assert value["schema"] == "optpipe.report/1"
    assert value["budget"]["met"] is True
    assert value["original"]["quality"]["value"] == 0.915
    assert value["result"]["latency"]["ratio_to_original"] == 0.75
    assert value["result"]["latency"]["ratio_ci95"] == [0.74, 0.76]
    assert value["original"]["latency"]["ratio_to_original"] is None
    assert value["result"]["agreement"]["value"] == 0.96
    assert value["plan"]["drop_blocks"] == ["layer1.1", "layer2.2"]


def test_a_run_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        build.read(tmp_path)
    assert str(error.value) == f"{tmp_path}/report.json: there is no report; has the run finished?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no report of this version: Invalid JSON: EOF while parsing"),
        ("[]", "is no report of this version: "),
        ("{}", "is no report of this version: schema: Field required"),
    ],
)
def test_a_report_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        build.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/report.json: {message}")
    assert "\n" not in str(error.value)


def test_a_report_of_another_version_is_refused(report: schema.Report, tmp_path: Path) -> None:
    build.write(tmp_path, dataclasses.replace(report, schema="optpipe.report/2"))
    with pytest.raises(UsageError) as error:
        build.read(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/report.json: is of version optpipe.report/2; this optpipe reads optpipe.report/1"
    )


# ---------------------------------------------------------------- the verdict


def test_a_reduction_is_met_by_the_median_ratio() -> None:
    judged = build.judge(
        Budget(latency_reduction=0.22), make_latency(8), make_latency(6, 0.75, (0.74, 0.76)), Plan()
    )
    assert judged.met
    assert judged.verdict == "latency -25.0% (-26.0% to -24.0%), asked -22.0%"


def test_an_interval_that_reaches_beyond_the_budget_is_said() -> None:
    judged = build.judge(
        Budget(latency_reduction=0.25), make_latency(8), make_latency(6, 0.748, (0.74, 0.76)), Plan()
    )
    assert judged.met
    assert judged.verdict == (
        "latency -25.2% (-26.0% to -24.0%), asked -25.0%; the interval reaches beyond what was asked"
    )


def test_a_reduction_that_is_missed_is_not_met() -> None:
    judged = build.judge(
        Budget(latency_reduction=0.3), make_latency(8), make_latency(6, 0.75, (0.74, 0.76)), Plan()
    )
    assert not judged.met
    assert judged.verdict == "latency -25.0% (-26.0% to -24.0%), asked -30.0%"


@pytest.mark.parametrize(("latency_ms", "met"), [(6.1, True), (6.0, True), (5.9, False)])
def test_an_absolute_latency_is_held_against_the_original_of_the_same_measurement(
    latency_ms: float, met: bool
) -> None:
    result = make_latency(6, 0.75, (0.74, 0.76))
    judged = build.judge(Budget(latency_ms=latency_ms), make_latency(8), result, Plan())
    assert judged.met == met
    assert f"asked {latency_ms / 8 - 1:+.1%}" in judged.verdict


@pytest.mark.parametrize(("dropped", "met"), [(("a", "b"), False), (("a", "b", "c"), True)])
def test_a_number_of_blocks_is_counted(dropped: tuple[str, ...], met: bool) -> None:
    budget = Budget(drop_blocks=3)
    judged = build.judge(budget, make_latency(8), make_latency(9, 1.1, (1.0, 1.2)), Plan(dropped))
    assert (judged.met, judged.verdict) == (met, f"{len(dropped)} of 3 blocks dropped")
    assert judged.asked == budget


# ---------------------------------------------------------------- for people


def test_the_summary_says_what_was_asked_and_what_it_cost(report: schema.Report) -> None:
    assert markdown.summary(report, "runs/practise") == [
        "practise: practise on zoo:resnet20_cifar, onnxruntime (batch 16, a processor)",
        "  dropped     layer1.1 layer2.2",
        "  latency     8.000 -> 6.000 ms   -25.0% (-26.0% to -24.0%)",
        "  top1        91.50% (89.0% to 93.0%) -> 90.50% (88.0% to 92.0%)   (before recovery 50.0%)",
        "  agreement   96.00% (94.0% to 98.0%) with the original",
        "  parameters  270,000 -> 200,000   -25.9%",
        "  MACs        41,000,000 -> 30,000,000   -26.8%",
        "  budget      met: latency -25.0%",
        "  took        21 s: ingest 1, analyze 2, prune 3, recover 4, export 5, benchmark 6",
        "  report      runs/practise/report.md",
    ]


def test_the_summary_never_exceeds_15_lines_and_ends_with_the_report() -> None:
    report = make_report(warnings=tuple(f"warning {number}" for number in range(20)), met=False)
    lines = markdown.summary(report, "runs/x")
    assert len(lines) == 15
    assert lines[-1] == "  report      runs/x/report.md"
    assert "  budget      NOT MET: latency -25.0%" in lines
    assert "  warning     warning 0" in lines


def test_a_plan_that_drops_nothing_says_so(report: schema.Report) -> None:
    lines = markdown.summary(dataclasses.replace(report, plan=Plan()), "runs/x")
    assert lines[1] == "  dropped     nothing"


def test_the_markdown_sets_both_networks_side_by_side(report: schema.Report) -> None:
    text = markdown.render(report)
    for line in (
        "# practise: practise on zoo:resnet20_cifar",
        "Budget met: latency -25.0%.",
        "| top1 (423 images) | 91.50% (89.0% to 93.0%) | 90.50% (88.0% to 92.0%) | -1.00 points |",
        "| top5 | 99.00% | 98.00% | -1.00 points |",
        "| before recovery |  | 50.00% (45.0% to 55.0%) |  |",
        "| agreement with the original |  | 96.00% (94.0% to 98.0%) |  |",
        "| Latency, median ms (batch 16) | 8.000 | 6.000 | -25.0% (-26.0% to -24.0%) |",
        "| p90 / p95 / p99 ms | 8.800 / 9.600 / 10.400 | 6.600 / 7.200 / 7.800 | 200 pairs |",
        "| parameters | 270,000 | 200,000 | -25.9% |",
        "| ONNX bytes | 1,100,000 | 800,000 | -27.3% |",
        "- Calibration: 500 images; evaluation: 423 others.",
        f"- model.onnx: `{'d' * 64}`",
        f"- evaluation images: `{'e' * 64}`",
    ):
        assert line in text.splitlines(), line


def test_the_tables_of_a_method_are_rendered(report: schema.Report) -> None:
    text = markdown.render(report)
    assert (
        "## Blocks\n\n"
        "| block | R | dropped | why not |\n"
        "| --- | --- | --- | --- |\n"
        "| layer1.1 | 0.125 | yes |  |\n"
        "| a\\|b | 1 | no | τ is not above 0 |\n"
    ) in text


def test_every_row_of_a_table_has_as_many_cells_as_its_head(report: schema.Report) -> None:
    rows = [line for line in markdown.render(report).splitlines() if line.startswith("|")]
    counts = [row.replace("\\|", "").count("|") for row in rows]
    assert set(counts) == {5}


def test_warnings_and_a_missed_budget_stand_at_the_top() -> None:
    head = markdown.render(make_report(met=False, warnings=("3 images were skipped",))).splitlines()[:5]
    assert head[2] == "Budget **not met**: latency -25.0%."
    assert head[3] == "Warning: 3 images were skipped."
