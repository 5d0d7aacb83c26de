"""Memory: a demo, sets that are streamed and refusals, in the slow suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import memory
from faults.report import PAGE


def test_the_share_of_the_pixels_that_is_held() -> None:
    assert memory.Grown("all", 900.0, 1062.0, 54.0, 216.0).share == pytest.approx(1.0)
    assert memory.Grown("none", 900.0, 900.0, 54.0, 216.0).share == 0.0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_demo_streams_and_refusals(tmp_path: Path) -> None:
    found = memory.run(tmp_path, 4, print)
    assert found.problems == ()
    assert found.section.startswith(memory.TITLE)


def test_the_page_says_what_is_done_and_what_was_mended() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for text in (memory.TITLE, memory.INTRODUCTION, memory.MENDED):
        assert text in page
