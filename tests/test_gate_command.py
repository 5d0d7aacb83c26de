"""``optpipe gate`` as a CI stage meets it: exit codes, what it prints where, what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Call, make_report

from optpipe import files, store
from optpipe.report import limits
from optpipe.report.schema import Report
from optpipe.types import Limits, Quality


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished run that saves 25% for one point, of a recipe without limits."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return written(tmp_path / "run", make_report())


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """An older run, 9 points more accurate."""
    report = make_report()
    quality = Quality("top1", 0.995, (0.98, 0.999), 423, "evaluation")
    return written(tmp_path / "older", replace(report, result=replace(report.result, quality=quality)))


def written(folder: Path, report: Report) -> Path:
    """A run's folder with its report.json alone, which is all that the gate reads."""
    files.write_atomically(folder / "report.json", store.to_json(report))
    return folder


@pytest.mark.parametrize(
    ("reduction", "words", "code", "outcome"),
    [
        (20, (), 0, "PASSED"),
        (25.5, (), 0, "UNCERTAIN"),
        (25.5, ("--strict",), 1, "FAILED"),
        (30, (), 1, "FAILED"),
    ],
)
def test_met_uncertain_and_missed_have_their_exit_codes(
    optpipe: Call, finished: Path, reduction: float, words: tuple[str, ...], code: int, outcome: str
) -> None:
    found, out, err = optpipe("gate", finished, "--min-latency-reduction", reduction, *words)
    assert (found, out.split()[0]) == (code, outcome)
    assert err == (f"Error: {finished}: latency not met\n" if code else "")


@pytest.mark.parametrize("text", ["", '{"schema": ', "{}", "[]", '{"schema": "optpipe.report/0"}'])
def test_a_corrupt_report_exits_2(optpipe: Call, finished: Path, text: str) -> None:
    (finished / "report.json").write_text(text)
    code, out, err = optpipe("gate", finished, "--min-latency-reduction", 20)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {finished}/report.json: is no report of this version: ")
    assert err.count("\n") == 1


def test_a_report_that_was_cut_short_exits_2(optpipe: Call, finished: Path) -> None:
    path = finished / "report.json"
    path.write_bytes(path.read_bytes()[:-200])
    code, out, err = optpipe("gate", finished, "--min-latency-reduction", 20)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_corrupt_baseline_exits_2(optpipe: Call, finished: Path, older: Path) -> None:
    (older / "report.json").write_text("{")
    code, out, err = optpipe("gate", finished, "--baseline", older)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {older}/report.json: ")


def test_the_recipes_limits_hold_where_none_is_given(optpipe: Call, finished: Path) -> None:
    code, _, err = optpipe("gate", finished)
    assert (code, err.startswith(f"Error: {finished}: there is nothing to hold it against")) == (2, True)
    limits.write(finished, Limits(min_agreement=99.0, min_latency_reduction=30.0))
    code, _, err = optpipe("gate", finished)
    assert (code, err) == (1, f"Error: {finished}: agreement and latency not met\n")
    code, _, err = optpipe("gate", finished, "--min-latency-reduction", 20)
    assert (code, err) == (1, f"Error: {finished}: agreement not met\n")
    code, _, _ = optpipe("gate", finished, "--min-latency-reduction", 20, "--min-agreement", 90)
    assert code == 0


def test_a_regression_exits_1(optpipe: Call, finished: Path, older: Path) -> None:
    code, out, err = optpipe("gate", finished, "--baseline", older)
    assert (code, err) == (1, f"Error: {finished}: accuracy against the baseline not met\n")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "FAILED accuracy against the baseline",
        "SKIPPED latency against the baseline",
    ]
    assert optpipe("gate", finished, "--baseline", older, "--max-accuracy-regression", 9)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--min-latency-reduction", 0.2),
            "--min-latency-reduction 0.2: is in percent: write 20 for a share",
        ),
        (("--min-agreement", "nan"), "--min-agreement nan: must be finite"),
        (("--max-latency-regression", 5), "--max-latency-regression 5: needs the older run, --baseline"),
    ],
)
def test_limits_that_cannot_be_meant_exit_2(
    optpipe: Call, finished: Path, words: tuple[object, ...], message: str
) -> None:
    code, out, err = optpipe("gate", finished, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("reduction", "code"), [(20, 0), (30, 1)])
def test_json_is_all_that_stdout_gets(optpipe: Call, finished: Path, reduction: int, code: int) -> None:
    found, out, _ = optpipe("gate", finished, "--min-latency-reduction", reduction, "--json")
    assert found == code
    read = json.loads(out)
    assert (read["run"], read["passed"]) == (str(finished), code == 0)


def test_the_summary_is_appended_where_github_names_a_file(
    optpipe: Call, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = finished / "summary.md"
    page.write_text("# Before\n\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    assert optpipe("gate", finished, "--min-latency-reduction", 30)[0] == 1
    assert optpipe("gate", finished, "--min-latency-reduction", 20)[0] == 0
    text = page.read_text()
    assert text.startswith("# Before\n\n### optpipe gate: practise FAILED\n")
    assert text.count("### optpipe gate: practise passed\n") == 1


def test_an_empty_name_of_a_summary_is_none(
    optpipe: Call, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "")
    assert optpipe("gate", finished, "--min-latency-reduction", 20)[0] == 0


def test_a_summary_that_cannot_be_written_exits_4(
    optpipe: Call, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(finished))
    code, _, err = optpipe("gate", finished, "--min-latency-reduction", 20)
    assert (code, err) == (4, f"Error: {finished}: Is a directory\n")
