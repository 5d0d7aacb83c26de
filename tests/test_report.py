from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_latency, make_report

from optpipe import store
from optpipe.errors import UsageError
from optpipe.report import build, markdown, reliability, schema
from optpipe.types import (
    Budget,
    Calibration,
    CalibrationBin,
    Curve,
    DeviceState,
    EngineCount,
    Figure,
    Latency,
    Plan,
    Precision,
    Reliability,
    Selective,
    Surface,
    Table,
    Tune,
)

# ---------------------------------------------------------------- report.json


def test_a_report_comes_back_from_json_as_it_was(report: schema.Report, tmp_path: Path) -> None:
    build.write(tmp_path, report)
    assert build.read(tmp_path) == report
    assert build.read(tmp_path / "report.json") == report


def test_a_report_with_a_changed_digit_is_refused(report: schema.Report, tmp_path: Path) -> None:
    build.write(tmp_path, report)
    path = tmp_path / "report.json"
    path.write_text(path.read_text().replace("0.905", "0.915", 1))
    with pytest.raises(
        UsageError, match=r"report.json: it is not what was written: .*; give the same optpipe"
    ):
        build.read(tmp_path)


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


FASTER = make_latency(6, 0.75, (0.74, 0.76))


def judge(
    budget: Budget,
    latency: Latency = FASTER,
    *,
    macs: int = 70,
    parameters: int = 900,
    dropped: tuple[str, ...] = (),
) -> schema.BudgetReport:
    """The verdict on a network beside an original of 8 ms, 100 MACs and 1000 parameters."""
    made = make_report()
    original = replace(made.original, latency=make_latency(8), macs=100, parameters=1000)
    result = replace(made.result, latency=latency, macs=macs, parameters=parameters)
    return build.judge(budget, original, result, Plan(dropped))


def test_a_reduction_is_met_by_the_median_ratio() -> None:
    judged = judge(Budget(latency_reduction=0.22))
    assert judged.met
    assert judged.verdict == "latency -25.0% (-26.0% to -24.0%), asked -22.0%"


def test_an_interval_that_reaches_beyond_the_budget_is_said() -> None:
    judged = judge(Budget(latency_reduction=0.25), make_latency(6, 0.748, (0.74, 0.76)))
    assert judged.met
    assert judged.verdict == (
        "latency -25.2% (-26.0% to -24.0%), asked -25.0%; the interval reaches beyond what was asked"
    )


def test_a_reduction_that_is_missed_is_not_met() -> None:
    judged = judge(Budget(latency_reduction=0.3))
    assert not judged.met
    assert judged.verdict == "latency -25.0% (-26.0% to -24.0%), asked -30.0%"


@pytest.mark.parametrize(("latency_ms", "met"), [(6.1, True), (6.0, True), (5.9, False)])
def test_an_absolute_latency_is_held_against_the_original_of_the_same_measurement(
    latency_ms: float, met: bool
) -> None:
    judged = judge(Budget(latency_ms=latency_ms))
    assert judged.met == met
    assert f"asked {latency_ms / 8 - 1:+.1%}" in judged.verdict


@pytest.mark.parametrize(("macs", "met"), [(9, True), (10, True), (11, False)])
def test_macs_are_counted_whatever_the_latency(macs: int, met: bool) -> None:
    judged = judge(Budget(macs_reduction=0.9), make_latency(9, 1.1, (1.0, 1.2)), macs=macs)
    assert (judged.met, judged.verdict) == (met, f"MACs {macs / 100 - 1:+.1%}, asked -90.0%")


@pytest.mark.parametrize(("parameters", "met"), [(899, True), (900, True), (901, False)])
def test_parameters_are_counted_whatever_the_macs(parameters: int, met: bool) -> None:
    judged = judge(Budget(parameters_reduction=0.1), macs=100, parameters=parameters)
    assert (judged.met, judged.verdict) == (met, f"parameters {parameters / 1000 - 1:+.1%}, asked -10.0%")


@pytest.mark.parametrize(("dropped", "met"), [(("a", "b"), False), (("a", "b", "c"), True)])
def test_a_number_of_blocks_is_counted(dropped: tuple[str, ...], met: bool) -> None:
    budget = Budget(drop_blocks=3)
    judged = judge(budget, make_latency(9, 1.1, (1.0, 1.2)), dropped=dropped)
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


# ---------------------------------------------------------------- figures


def titled(*titles: str) -> tuple[Figure, ...]:
    """A figure of each title, with a curve over a surface that has a hole."""
    surface = Surface((0.5, 1.0), (0.5, 1.0), ((1.0, 2.0), (2.0, None)), "latency, ms")
    curve = Curve("depth", (0.5, 1.0), (0.5, 0.75))
    return tuple(Figure(title, "width", "depth", (curve,), surface) for title in titles)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_figures_lie_beside_the_report_and_their_numbers_in_it(report: schema.Report, tmp_path: Path) -> None:
    whole = replace(report, figures=titled("Accuracy along depth", "Latency: w/r"))
    build.write(tmp_path, whole)
    drawn = ["figures/accuracy-along-depth.svg", "figures/latency-w-r.svg"]
    assert files_in(tmp_path) == [*drawn, "report.html", "report.json", "report.md"]
    assert "Latency: w/r" in (tmp_path / drawn[1]).read_text(encoding="utf-8")
    assert build.read(tmp_path) == whole
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("![")] == [
        f"![Accuracy along depth]({drawn[0]})",
        f"![Latency: w/r]({drawn[1]})",
    ]


def test_writing_again_gives_the_same_bytes(report: schema.Report, tmp_path: Path) -> None:
    whole = replace(report, figures=titled("Accuracy"))
    build.write(tmp_path, whole)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    build.write(tmp_path, build.read(tmp_path))
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before


def test_a_figure_stands_below_the_table_of_its_title_or_below_all(report: schema.Report) -> None:
    tables = (*report.tables, Table("Layers", ("layer",), (("conv1",),)))
    lines = markdown.render(replace(report, tables=tables, figures=titled("Optimum", "Blocks"))).splitlines()
    shown = [line for line in lines if line.startswith(("## ", "!["))]
    assert shown[:5] == [
        "## Blocks",
        "![Blocks](figures/blocks.svg)",
        "## Layers",
        "## Optimum",
        "![Optimum](figures/optimum.svg)",
    ]


def test_a_report_from_before_there_were_figures_reads_and_renders_the_same(
    report: schema.Report, tmp_path: Path
) -> None:
    build.write(tmp_path, report)
    assert files_in(tmp_path) == ["report.html", "report.json", "report.md"]
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert values.pop("figures") == []
    (tmp_path / "report.json").write_text(json.dumps(values), encoding="utf-8")
    assert build.read(tmp_path) == report
    text = markdown.render(build.read(tmp_path))
    assert text == (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| a\\|b | 1 | no | τ is not above 0 |\n\n## Conditions\n" in text


def test_each_figure_has_a_safe_path_of_its_own() -> None:
    odd = titled("../../etc/passwd", "τ", "測定", "A b", "a-b", "a b 2", "", "x" * 300)
    assert markdown.figure_paths(odd) == (
        "figures/etc-passwd.svg",
        "figures/figure.svg",
        "figures/figure-2.svg",
        "figures/a-b.svg",
        "figures/a-b-2.svg",
        "figures/a-b-2-2.svg",
        "figures/figure-3.svg",
        f"figures/{'x' * 60}.svg",
    )


def test_a_title_with_brackets_or_lines_stays_one_link(report: schema.Report) -> None:
    text = markdown.render(replace(report, figures=titled("loss [nats]\nby\\depth")))
    assert "\n\n## loss [nats] by\\depth\n\n" in text
    assert "\n![loss \\[nats\\] by\\\\depth](figures/loss-nats-by-depth.svg)\n" in text


# ---------------------------------------------------------------- precisions and engines


def at(precision: Precision, latency: Latency | None) -> schema.PrecisionReport:
    """The result at a precision, as good as the report's."""
    result = make_report().result
    return schema.PrecisionReport(precision, latency, result.quality, result.agreement, 800, 900, 1.0, 0.01)


def timed(ratio: float) -> Latency:
    return make_latency(8 * ratio, ratio, (ratio - 0.01, ratio + 0.01))


def table_rows(text: str, title: str) -> list[list[str]]:
    """The cells of a table below its title, the head first."""
    lines = text.split(f"## {title}")[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in [lines[0], *lines[2:]]]


def test_what_pruning_and_int8_save_stands_in_one_table(report: schema.Report) -> None:
    precisions = (at("fp32", timed(0.75)), at("int8", timed(0.3)))
    rows = table_rows(markdown.render(replace(report, precisions=precisions)), "Precisions")
    assert rows[0] == [
        "network",
        "top1 (423 images)",
        "agreement with the original",
        "Latency, median ms",
        "against the original",
        "engine bytes",
        "notes",
    ]
    assert [row[0] for row in rows[1:]] == ["original, fp32", "result, fp32", "result, int8"]
    assert [row[3] for row in rows[1:]] == ["8.000", "6.000", "2.400"]
    assert [row[4] for row in rows[1:]] == ["", "-25.0% (-26.0% to -24.0%)", "-70.0% (-71.0% to -69.0%)"]


def test_a_gpus_other_figures_stand_beside_its_compute_time_by_trtexecs_names(report: schema.Report) -> None:
    cool, hot = DeviceState(1980, 3201, 45), DeviceState(1200, 3201, 88, throttle=("thermal",))

    def on_gpu(latency: Latency) -> Latency:
        return replace(
            latency,
            headline="GPU Compute Time",
            enqueue_ms=0.1,
            h2d_ms=0.5,
            d2h_ms=0.25,
            end_to_end_ms=8.75,
            before=cool,
            after=hot,
            notes=("CUDA graph",),
        )

    original = replace(report.original, latency=on_gpu(report.original.latency))
    fp16 = at("fp16", on_gpu(timed(0.4)))
    text = markdown.render(replace(report, original=original, precisions=(fp16,)))
    head, first, result = table_rows(text, "Precisions")
    assert head[3:9] == [
        "GPU Compute Time, median ms",
        "against the original",
        "Enqueue Time, median ms",
        "H2D Latency, median ms",
        "D2H Latency, median ms",
        "Latency, median ms",
    ]
    assert first[5:9] == result[5:9] == ["0.1", "0.5", "0.25", "8.75"]
    assert first[-1] == result[-1] == "CUDA graph"
    assert (
        "- GPU before and after timing the result, fp16: SM 1980 MHz, memory 3201 MHz, 45 C; SM 1200 MHz, "
        "memory 3201 MHz, 88 C, throttled: thermal."
    ) in text.splitlines()


def test_a_reason_of_many_lines_stays_in_its_row(report: schema.Report) -> None:
    reason = "the builder failed:\n  Error Code 10 | no kernel\n\nraise the workspace"
    failed = replace(at("fp16", None), quality=None, agreement=None, failed=reason)
    text = markdown.render(
        replace(report, precisions=(at("fp32", timed(0.75)), failed), warnings=(f"fp16: {reason}",))
    )
    row = next(line for line in text.splitlines() if line.startswith("| result, fp16"))
    assert row.endswith("none: the builder failed: Error Code 10 \\| no kernel raise the workspace |")
    head = next(line for line in text.splitlines() if line.startswith("| network"))
    assert row.replace("\\|", "").count("|") == head.count("|")
    assert "Warning: fp16: the builder failed: Error Code 10 | no kernel raise the workspace." in text


@pytest.mark.parametrize(
    ("ratios", "notes"),
    [
        ((1.0, 0.5, 0.6), ("", "", "slower than fp16: deploy fp16 here")),
        ((0.5, 1.0, 0.8), ("", "slower than fp32: deploy fp32 here", "slower than fp32: deploy fp32 here")),
        (
            (0.5, 0.6, 0.8),
            ("", "slower than fp32: deploy fp32 here", "slower than fp32 and fp16: deploy fp32 here"),
        ),
        ((1.0, 0.5, 0.51), ("", "", "")),
    ],
)
def test_a_precision_that_is_slower_than_wider_ones_names_the_one_to_deploy(
    ratios: tuple[float, float, float], notes: tuple[str, str, str]
) -> None:
    names: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    found = build.with_advice(
        tuple(at(name, timed(ratio)) for name, ratio in zip(names, ratios, strict=True))
    )
    assert tuple("".join(one.notes) for one in found) == notes


def reliable(error: float) -> Reliability:
    """Two bins with images and one without; the surer half is always right."""
    bins = (
        CalibrationBin(0.0, 1 / 3, 0, None, None),
        CalibrationBin(1 / 3, 2 / 3, 2, 0.5, 0.5 - 2 * error),
        CalibrationBin(2 / 3, 1.0, 2, 1.0, 1.0),
    )
    return Reliability(Calibration(error, bins), (Selective(0.0, 4, 0.75), Selective(0.5, 2, 1.0)))


def with_reliability(report: schema.Report) -> schema.Report:
    fp32 = replace(at("fp32", timed(0.75)), reliability=reliable(0.05))
    original = replace(report.original, reliability=reliable(0.03))
    return replace(report, original=original, precisions=(fp32, at("int8", timed(0.3))))


def test_calibration_and_selective_accuracy_stand_beside_the_accuracy(report: schema.Report) -> None:
    rows = table_rows(markdown.render(with_reliability(report)), "Reliability")
    assert rows == [
        ["network", "calibration error, 3 bins", "accuracy", "the least sure 50% rejected"],
        ["original, fp32", "3.00%", "75.00%", "100.00%"],
        ["result, fp32", "5.00%", "75.00%", "100.00%"],
    ]


def test_the_reliability_diagram_is_drawn_below_its_table(report: schema.Report, tmp_path: Path) -> None:
    whole = replace(with_reliability(report), figures=titled("Accuracy"))
    build.write(tmp_path, whole)
    assert build.read(tmp_path) == whole
    name = "figures/reliability-how-sure-of-the-class-and-how-often-right.svg"
    assert files_in(tmp_path) == ["figures/accuracy.svg", name, "report.html", "report.json", "report.md"]
    figure = reliability.figure(whole)
    assert figure is not None
    assert [(curve.name, curve.style, curve.x) for curve in figure.curves] == [
        ("as sure as right", "line", (0.0, 1.0)),
        ("original, fp32", "line", (0.5, 1.0)),
        ("original, fp32", "dots", (0.5, 1.0)),
        ("result, fp32", "line", (0.5, 1.0)),
        ("result, fp32", "dots", (0.5, 1.0)),
    ]
    assert [curve.y[0] for curve in figure.curves[1::2]] == pytest.approx([0.44, 0.4])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.index("## Reliability") < text.index(f"({name})") < text.index("**Why this plan.**")
    assert text.count("![") == 2


def with_ensemble(report: schema.Report) -> schema.Report:
    """The report with an ensemble that takes three times as long as the result."""
    joined = schema.EnsembleReport(
        members=4,
        onnx_bytes=3_000,
        build_s=1.0,
        latency=timed(2.25),
        quality=report.result.quality,
        agreement=report.result.agreement,
        reliability=reliable(0.01),
        aleatoric_variance=0.02,
        expected_entropy=0.3,
        mutual_information=0.04,
        by_information=(Selective(0.0, 4, 0.75), Selective(0.5, 2, 0.5)),
        max_abs=(1e-6, 1e-7),
    )
    return replace(with_reliability(report), ensemble=joined)


def test_the_price_of_an_ensemble_is_told_beside_the_result(report: schema.Report, tmp_path: Path) -> None:
    whole = with_ensemble(report)
    build.write(tmp_path, whole)
    assert build.read(tmp_path) == whole
    text = markdown.render(whole)
    assert (
        "**The price of knowing.** `uncertainty.onnx` joins 4 networks and gives, beside the log of their"
        " mean probabilities, each image's expected entropy and mutual information in nats. An inference "
        "of its logits at fp32 takes 18.000 ms (median), +125.0% (+124.0% to +126.0%) against the "
        "original, 3.00 times the result's. top1 is 90.50% (88.0% to 92.0%), the result's 90.50% (88.0% "
        "to 92.0%). Over the evaluation images: expected entropy 0.3000 nats, mutual information 0.0400 "
        "nats, 1/d^2 (DLLP, Eq. 9) 0.02000."
    ) in text.splitlines()
    assert table_rows(text, "Reliability")[3:] == [
        ["ensemble of 4", "1.00%", "75.00%", "100.00%"],
        ["ensemble of 4, sure by mutual information", "", "75.00%", "50.00%"],
    ]


def test_an_ensemble_without_a_price_says_why(report: schema.Report) -> None:
    joined = with_ensemble(report).ensemble
    assert joined is not None
    unpriced = replace(joined, latency=None, quality=None, failed="the builder\ngave up")
    text = markdown.render(replace(report, ensemble=unpriced))
    assert "What it costs is not known: the builder gave up." in text


@pytest.mark.parametrize(
    ("recover", "line"),
    [
        (Tune(steps=300), 'recovery 300 steps of batch 64, loss "mimic" (the original\'s features).'),
        (
            Tune(steps=9, loss="kd", temperature=2.0),
            'recovery 9 steps of batch 64, loss "kd" (the original\'s answers, temperature 2).',
        ),
        (
            Tune(steps=9, loss="cross", batch=8),
            'recovery 9 steps of batch 8, loss "cross" (the original\'s features and answers, '
            "temperature 4).",
        ),
        (Tune(steps=9, loss="labels"), 'recovery 9 steps of batch 64, loss "labels" (labels).'),
        (
            Tune(steps=9, loss="labels", teachers="single"),
            'recovery 9 steps of batch 64, loss "labels" (labels and teachers (single, temperature 4)).',
        ),
        (Tune(steps=0), "no recovery."),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.loss,
)
def test_the_conditions_say_by_what_the_result_was_trained(
    report: schema.Report, recover: Tune, line: str
) -> None:
    assert f"- Seed 0; {line}\n" in markdown.render(replace(report, recover=recover))


def test_without_labels_nothing_is_said_of_reliability(report: schema.Report) -> None:
    assert "Reliability" not in markdown.render(report)
    assert markdown.all_figures(report) == ()


def test_the_engines_say_what_was_built_here_and_what_a_cache_saves(report: schema.Report) -> None:
    count = EngineCount(10, 4, 1, (2.0, 1.0, 1.5), 2.0, 0.5)
    text = markdown.render(replace(report, engines=count))
    assert (
        "**Engines.** 10 latencies were asked for; 7 of them (70%) were answered without a build: 6 by an "
        "engine of equal structure, 1 from other runs. Building took 4.5 s for 3 engines. One candidate's "
        "first build took 2.00 s, its second with a warm cache 0.50 s (-75%)."
    ) in text.splitlines()


def test_a_run_that_built_nothing_says_nothing_of_its_backends_cache(report: schema.Report) -> None:
    nothing = markdown.render(replace(report, engines=EngineCount(3, 2, 2, (), None, None)))
    assert "3 of them (100%) were answered without a build" in nothing
    assert "no cache" not in nothing
    built = markdown.render(replace(report, engines=EngineCount(3, 2, 0, (1.0, 1.0), None, None)))
    assert "This backend keeps no cache of builds." in built
