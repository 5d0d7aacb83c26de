"""Many at once: the locks in the quick suite, whole runs in the slow one."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import children, crowd
from faults.report import PAGE


@pytest.mark.parametrize("case", [one for one in crowd.CASES if not one.seldom], ids=lambda case: case.name)
def test_processes_that_share_a_device(case: crowd.Case, tmp_path: Path) -> None:
    assert case.run(tmp_path, 2).problems == ()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_few_at_once_end_as_each_alone(tmp_path: Path) -> None:
    found = crowd.run(tmp_path, 10, print)
    assert found.problems == ()
    assert found.section.startswith(crowd.TITLE)


def test_what_is_torn_or_left_is_found(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "whole.json").write_text("{}")
    assert children.torn(tmp_path) == []
    (tmp_path / "run" / "half.json").write_text('{"a": ')
    (tmp_path / "run" / ".model.onnx.0.tmp").write_text("")
    assert len(children.torn(tmp_path)) == 2


def test_an_end_is_one_line_with_its_code() -> None:
    assert children.one_line(children.Ended(2, "", "Error: taken\n", 0.1), 2, "taken") == []
    for code, err in ((1, "Error: taken\n"), (2, "Error: taken\nmore\n"), (2, "Error: other\n"), (2, "")):
        assert len(children.one_line(children.Ended(code, "", err, 0.1), 2, "taken")) == 1


def test_the_page_says_what_is_done_and_what_was_mended() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for text in (crowd.TITLE, crowd.INTRODUCTION, crowd.MENDED):
        assert text in page
