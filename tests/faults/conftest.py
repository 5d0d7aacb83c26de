"""The good folder that every case spoils a copy of."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import workspace


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "good"
    folder.mkdir()
    workspace.make(folder)
    return folder
