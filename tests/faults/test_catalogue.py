"""Each bad input of the catalogue ends in one clear line, with its exit code and nothing lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from faults import cases, inputs, report, workspace
from faults.cases import Case, Outcome
from faults.catalogue import CATALOGUE
from faults.networks import MARK

ALL = [case for group in CATALOGUE.values() for case in group]


def test_the_catalogue_is_large_and_names_each_case_once() -> None:
    names = [case.name for case in ALL]
    assert len(names) > 500
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_a_bad_input_ends_in_one_clear_line(case: Case, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    found = cases.run(case, good, folder)
    assert cases.faults(case, found) == []
    assert not (folder / MARK).exists(), "code that came with the input was run"
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "small.toml", "--dry-run"),
        ("inspect", "small.toml"),
        ("verify", "run"),
        ("gate", "run", "--max-accuracy-drop", "5"),
        ("load",),
        ("run_engine",),
        ("bench", "model.onnx", "--duration", "0.1", "--warmUp", "1"),
    ],
    ids=lambda words: words[0],
)
def test_the_folder_that_is_spoilt_is_fine_before(words: tuple[str, ...], good: Path, tmp_path: Path) -> None:
    """Else a case could pass for a fault that the folder has anyway."""
    found = cases.run(Case("fine", workspace.nothing, words, 0, ""), good, tmp_path / "case")
    assert (found.code, found.spoilt) == (0, ())


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        (Outcome(2, "", "Error: a\n", ()), []),
        (Outcome(2, "", "Usage: optpipe run\n\nError: a\n", ()), []),
        (Outcome(4, "", "Usage: optpipe run\n\nError: a\n", ()), ["3 lines, 1 of them errors"]),
        (Outcome(4, "", "", ()), ["0 lines, 0 of them errors"]),
        (Outcome(4, "", "Error: a\nError: b\n", ()), ["2 lines, 2 of them errors"]),
        (Outcome(4, "", "Error: unexpected KeyError: x\n", ()), ["nobody foresaw it"]),
        (Outcome(4, "", "Error: \x1b[2J\n", ()), ["a control character"]),
        (Outcome(4, "", f"Error: {'a' * 2000}\n", ()), ["a line of 2007 characters"]),
        (Outcome(4, "", "Error: a\n", ("model.onnx",)), ["spoilt: model.onnx"]),
        (Outcome(0, "", "", ("model.onnx",)), ["spoilt: model.onnx"]),
        (Outcome(139, "", "Error: a\n", ()), ["exit code 139"]),
    ],
)
def test_what_is_no_clear_line_is_found(found: Outcome, wrong: list[str]) -> None:
    assert cases.strange(found)[: len(wrong)] == wrong
    assert bool(cases.strange(found)) == bool(wrong)


def test_a_case_that_ends_otherwise_is_found(good: Path, tmp_path: Path) -> None:
    case = Case("fine", workspace.nothing, ("verify", "run"), 2, "never said")
    wrong = cases.faults(case, cases.run(case, good, tmp_path / "case"))
    assert wrong[0] == "exit code 0, not 2"
    assert "the error does not say 'never said'" in wrong


def test_a_file_that_is_lost_is_found(good: Path, tmp_path: Path) -> None:
    """``report`` writes its pages anew; one that was changed by hand is not what it was."""
    case = Case("changed", workspace.wrote("run/report.md", "mine"), ("report", "run"), 0, "")
    assert cases.run(case, good, tmp_path / "case").spoilt == ("run/report.md",)


def test_the_page_says_what_the_catalogue_holds() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.replaced(page, inputs.section()) == page, "run `make faults`"
