"""``optpipe compare`` and ``optpipe report`` on reports made by hand."""

from __future__ import annotations

import json
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest
from conftest import Call, make_report

from optpipe import comparison, store
from optpipe.report import build, schema
from optpipe.types import Budget


class WriteRun(Protocol):
    """Writes a finished run of a name, by default measured as all others are, and returns its folder."""

    def __call__(
        self,
        name: str,
        *,
        top1: float = ...,
        ratio: float = ...,
        threads: int = ...,
        batch: int = ...,
        weights: str = ...,
        images: str = ...,
        asked: Budget | None = ...,
    ) -> Path: ...


def save(run: Path, report: schema.Report) -> None:
    """Write report.json alone, which is all that is read."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "report.json").write_text(store.to_json(report), encoding="utf-8")


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    def write(
        name: str,
        *,
        top1: float = 0.905,
        ratio: float = 0.75,
        threads: int = 2,
        batch: int = 16,
        weights: str = "a" * 64,
        images: str = "e" * 64,
        asked: Budget | None = None,
    ) -> Path:
        report = make_report(result_top1=top1, ratio=ratio, ci95=(ratio - 0.01, ratio + 0.01))
        latency = report.result.latency
        measured = replace(latency, fingerprint=replace(latency.fingerprint, threads=threads))
        report = replace(
            report,
            name=name,
            target=replace(report.target, batch=batch),
            budget=report.budget if asked is None else replace(report.budget, asked=asked),
            result=replace(report.result, latency=measured),
            sha256={"original weights": weights},
            data=replace(report.data, evaluation_sha256=images),
        )
        save(tmp_path / name, report)
        return tmp_path / name

    return write


def cells(out: str, run: str) -> list[str]:
    """The cells of a run's line."""
    (line,) = [line for line in out.splitlines() if f"| {run} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---------------------------------------------------------------- what is shown


def test_runs_stand_side_by_side(optpipe: Call, write_run: WriteRun) -> None:
    code, out, err = optpipe("compare", write_run("a"), write_run("b", top1=0.9, ratio=0.8))
    assert (code, err) == (0, "")
    assert cells(out, "a") == [
        "1",
        "a",
        "practise",
        "latency -22%",
        "top1 91.50% (89.0% to 93.0%) -> 90.50% (88.0% to 92.0%)",
        "8.000 -> 6.000",
        "-25.0% (-26.0% to -24.0%)",
        "30,000,000 (-26.8%)",
        "200,000 (-25.9%)",
        "yes",
        "fp32",
        "onnxruntime",
        cells(out, "b")[12],
        "yes",
    ]
    assert cells(out, "b")[6] == "-20.0% (-21.0% to -19.0%)"
    assert "differs" not in out
    assert f"Machine {cells(out, 'a')[12]}: a processor, Linux 6, threads 2, onnxruntime 1.22." in out


@pytest.mark.parametrize(
    ("budget", "shown"),
    [
        (Budget(latency_reduction=0.22), "latency -22%"),
        (Budget(latency_reduction=0.225), "latency -22.5%"),
        (Budget(latency_ms=5.5), "latency 5.5 ms"),
        (Budget(macs_reduction=0.4), "MACs -40%"),
        (Budget(parameters_reduction=0.5), "parameters -50%"),
        (Budget(sparsity=0.9), "zeros 90%"),
        (Budget(drop_blocks=3), "3 blocks dropped"),
    ],
)
def test_each_budget_is_named(optpipe: Call, write_run: WriteRun, budget: Budget, shown: str) -> None:
    _, out, _ = optpipe("compare", write_run("a", asked=budget), write_run("b"))
    assert cells(out, "a")[3] == shown


def test_a_run_that_another_or_the_original_beats_is_not_in_front(write_run: WriteRun) -> None:
    runs = [
        write_run("accurate", top1=0.91, ratio=0.8),
        write_run("fast", top1=0.88, ratio=0.6),
        write_run("beaten", top1=0.87, ratio=0.7),
        write_run("slower", top1=0.90, ratio=1.05),
    ]
    compared = comparison.compare(runs, comparison.Allowed())
    assert [row.in_front for row in compared.rows] == [True, True, False, False]
    (front,) = [curve for curve in comparison.figure(compared).curves if curve.name == "Pareto front"]
    assert front.x == pytest.approx((60, 80, 100))
    assert front.y == pytest.approx((88, 91, 91.5)), "the original is the most accurate"


def test_the_figure_has_each_accuracys_and_each_latencys_interval(write_run: WriteRun) -> None:
    compared = comparison.compare([write_run("a"), write_run("b", top1=0.9, ratio=0.8)], comparison.Allowed())
    drawn = comparison.figure(compared).curves
    bars = [(curve.x, curve.y) for curve in drawn if curve.style == "interval"]
    expected = [
        ((100, 100), (89, 93)),  # the common original, once
        ((75, 75), (88, 92)),
        ((74, 76), (90.5, 90.5)),
        ((80, 80), (88, 92)),
        ((79, 81), (90, 90)),
    ]
    assert [round(end, 9) for bar in bars for ends in bar for end in ends] == [
        end for bar in expected for ends in bar for end in ends
    ]


def test_intervals_in_milliseconds_are_as_wide_as_the_ratios(write_run: WriteRun) -> None:
    runs = [write_run("a"), write_run("b", weights="b" * 64)]
    compared = comparison.compare(runs, comparison.Allowed(models=True))
    bars = [curve for curve in comparison.figure(compared).curves if curve.name == "95% interval"]
    across = [curve.x for curve in bars if curve.y[0] == curve.y[1]]
    assert across == [pytest.approx((8 * 0.74, 8 * 0.76))], "both are 6 ms of 8, at the same accuracy"


def test_runs_of_one_name_look_alike(write_run: WriteRun) -> None:
    runs = [write_run("a"), write_run("b", top1=0.9, ratio=0.8), write_run("c", top1=0.8)]
    drawn = comparison.figure(comparison.compare(runs, comparison.Allowed()), ["one", "one", "other"]).curves
    dots = {curve.name: curve.x for curve in drawn if curve.style == "dots"}
    assert dots == {"original": (100,), "one": pytest.approx((75, 80)), "other": pytest.approx((75,))}


def test_of_two_runs_that_are_equal_both_are_in_front(write_run: WriteRun) -> None:
    compared = comparison.compare([write_run("a"), write_run("b")], comparison.Allowed())
    assert [row.in_front for row in compared.rows] == [True, True]


def test_runs_of_one_name_are_told_apart_by_their_paths(optpipe: Call, write_run: WriteRun) -> None:
    first, second = write_run("x/same"), write_run("y/same")
    _, out, _ = optpipe("compare", first, second / "report.json")
    assert cells(out, str(first))[0] == "1"
    assert cells(out, str(second))[0] == "2"


def test_json_holds_the_same(optpipe: Call, write_run: WriteRun) -> None:
    code, out, _ = optpipe("compare", write_run("a"), write_run("b", ratio=0.5), "--json")
    found = json.loads(out)
    assert (code, found["schema"]) == (0, "optpipe.comparison/1")
    assert [row["latency_ratio"] for row in found["rows"]] == [0.75, 0.5]
    assert [row["in_front"] for row in found["rows"]] == [False, True]
    assert found["rows"][0]["model"] == "a" * 64


def test_out_gets_the_table_the_numbers_and_the_figure(
    optpipe: Call, write_run: WriteRun, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "folder"
    _, out, _ = optpipe("compare", write_run("a"), write_run("b", top1=0.91, ratio=0.9), "--out", folder)
    table = (folder / "compare.md").read_text(encoding="utf-8")
    assert table.startswith(out)
    assert "(compare.svg)" in table
    assert len(json.loads((folder / "compare.json").read_text(encoding="utf-8"))["rows"]) == 2
    drawn = (folder / "compare.svg").read_text(encoding="utf-8")
    for text in ("1 practise, front", "2 practise, front", "original", "Pareto front", "latency, % of the"):
        assert text in drawn


# ---------------------------------------------------------------- what does not compare


def test_latencies_of_different_machines_are_refused(optpipe: Call, write_run: WriteRun) -> None:
    first, other = write_run("a"), write_run("b", threads=1)
    code, out, err = optpipe("compare", first, other)
    assert (code, out) == (2, "")
    assert err == (
        f"Error: {other}: its latencies were not measured as those of {first} were (threads 1, not 2); "
        "--across-machines shows them all the same, marked\n"
    )


def test_latencies_of_different_batches_are_refused(optpipe: Call, write_run: WriteRun) -> None:
    code, _, err = optpipe("compare", write_run("a"), write_run("b", batch=1))
    assert (code, "(batch 1, not 16)" in err) == (2, True)


def test_latencies_by_different_versions_are_refused(optpipe: Call, write_run: WriteRun) -> None:
    first, other = write_run("a"), write_run("b")
    report = build.read(other)
    latency = report.result.latency
    newer = replace(latency.fingerprint, versions=(("onnxruntime", "1.23"),))
    latency = replace(latency, fingerprint=newer)
    save(other, replace(report, result=replace(report.result, latency=latency)))
    code, _, err = optpipe("compare", first, other)
    assert (code, "(onnxruntime 1.23, not onnxruntime 1.22)" in err) == (2, True)


def test_across_machines_shows_and_marks_them_and_holds_none_against_another(
    optpipe: Call, write_run: WriteRun, tmp_path: Path
) -> None:
    runs = write_run("a"), write_run("b", threads=1, top1=0.88, ratio=0.9)
    code, out, _ = optpipe("compare", *runs, "--across-machines")
    assert code == 0
    assert cells(out, "a")[-1] == ""
    assert cells(out, "b")[-1] == "measured otherwise: threads 1, not 2"
    assert [cells(out, name)[13] for name in "ab"] == ["yes", "yes"], "each is the best on its machine"
    assert cells(out, "a")[12] != cells(out, "b")[12]
    assert out.count("\nMachine ") == 2
    optpipe("compare", *runs, "--across-machines", "--out", tmp_path / "out")
    drawn = (tmp_path / "out" / "compare.svg").read_text(encoding="utf-8")
    assert "of runs that differ: the table says in what" in drawn


def test_other_models_are_refused_or_marked(optpipe: Call, write_run: WriteRun) -> None:
    first, other = write_run("a"), write_run("b", weights="b" * 64)
    code, out, err = optpipe("compare", first, other)
    assert (code, out) == (2, "")
    assert err == (
        f"Error: {other}: is of another model than {first} (sha256 of the original's weights bbbbbbbb, not "
        "aaaaaaaa); --across-models shows them all the same, marked\n"
    )
    code, out, _ = optpipe("compare", first, other, "--across-models", "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["marks"] for row in found["rows"]] == [[], ["another model: bbbbbbbb"]]
    assert found["by_ratio"] is False, "one machine timed both models: milliseconds compare"


def test_other_evaluation_images_are_refused_or_marked(optpipe: Call, write_run: WriteRun) -> None:
    first, other = write_run("a"), write_run("b", images="f" * 64)
    code, out, err = optpipe("compare", first, other, "--across-models", "--across-machines")
    assert (code, out) == (2, "")
    assert err == (
        f"Error: {other}: its accuracy is that on other evaluation images than in {first} (sha256 ffffffff, "
        "not eeeeeeee); --across-images shows them all the same, marked\n"
    )
    _, out, _ = optpipe("compare", first, other, "--across-images")
    assert cells(out, "b")[-1] == "other evaluation images: 423 of sha256 ffffffff"


def test_one_run_is_nothing_to_compare(optpipe: Call, write_run: WriteRun) -> None:
    run = write_run("a")
    code, out, err = optpipe("compare", run)
    assert (code, out, err) == (2, "", f"Error: {run}: name at least two runs to compare\n")


def test_a_run_without_a_report_is_refused(optpipe: Call, write_run: WriteRun, tmp_path: Path) -> None:
    code, out, err = optpipe("compare", write_run("a"), tmp_path / "none")
    assert (code, out) == (2, "")
    assert err == f"Error: {tmp_path}/none/report.json: there is no report; has the run finished?\n"


# ---------------------------------------------------------------- report


def test_report_writes_what_is_lost_and_says_where(optpipe: Call, write_run: WriteRun) -> None:
    run = write_run("a")
    before = (run / "report.json").read_bytes() + b" "
    (run / "report.json").write_bytes(before)
    code, out, err = optpipe("report", run)
    assert (code, out, err) == (0, f"{run}/report.html\n", "")
    assert "<svg" in (run / "report.html").read_text(encoding="utf-8")
    assert (run / "report.json").read_bytes() == before, "what was measured stays as it was written"
    assert (run / "report.md").read_text(encoding="utf-8").startswith("# a: practise on zoo:resnet20_cifar\n")


def test_report_follows_report_json_alone(optpipe: Call, write_run: WriteRun) -> None:
    run = write_run("a")
    report: schema.Report = replace(build.read(run), reason="since the moon was full")
    save(run, report)
    (run / "report.md").write_text("old", encoding="utf-8")
    optpipe("report", run / "report.json")
    assert "since the moon was full" in (run / "report.md").read_text(encoding="utf-8")


def test_report_opens_in_the_browser(
    optpipe: Call, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def browser(address: str) -> bool:
        opened.append(address)
        return len(opened) == 1

    monkeypatch.setattr(webbrowser, "open", browser)
    run = write_run("a")
    code, out, _ = optpipe("report", run, "--open")
    assert (code, opened) == (0, [Path(out.strip()).as_uri()])
    code, again, err = optpipe("report", run, "--open")
    assert (code, again) == (3, out)
    assert err.startswith(f"Error: {out.strip()}: there is no browser to open it with")


def test_report_of_a_run_that_has_none_is_refused(optpipe: Call, tmp_path: Path) -> None:
    code, out, err = optpipe("report", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"Error: {tmp_path}/report.json: there is no report; has the run finished?\n"
    other = tmp_path / "compare.json"
    other.write_text("{}", encoding="utf-8")
    code, _, err = optpipe("report", other)
    assert (code, err) == (2, f"Error: {other}: is no run; name its folder or the report.json in it\n")
