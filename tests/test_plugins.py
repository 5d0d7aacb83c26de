from __future__ import annotations

import sys
from pathlib import Path

import pytest

from optpipe import plugins
from optpipe.errors import UsageError


def test_a_name_is_the_file_of_that_name() -> None:
    assert plugins.names("backends") == sorted(
        path.stem for path in (Path(plugins.__file__).parent / "backends").glob("[!_]*.py")
    )
    assert vars(plugins.backend("onnxruntime"))["__name__"] == "optpipe.backends.onnxruntime"


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(UsageError) as error:
        plugins.backend("onnxruntme")
    assert str(error.value) == (
        '[target] backend = "onnxruntme": there is no such backend; did you mean onnxruntime?'
    )


def test_an_unknown_method_that_is_near_to_none_lists_all() -> None:
    with pytest.raises(UsageError) as error:
        plugins.method("zzz")
    listed = ", ".join(plugins.names("methods"))
    assert str(error.value) == f'[method] name = "zzz": there is no such method; there are: {listed}'
    assert "practise" in listed


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that offers the backends ``theirs`` and ``broken``; its modules' folder."""
    folder = tmp_path / "theirs-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n", encoding="utf-8")
    (folder / "entry_points.txt").write_text(
        "[optpipe.backends]\ntheirs = their_backend\nbroken = broken_backend\n", encoding="utf-8"
    )
    (tmp_path / "their_backend.py").write_text("HERE = True\n", encoding="utf-8")
    (tmp_path / "broken_backend.py").write_text("raise ValueError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("third_party")
def test_a_third_party_adds_a_backend_through_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "theirs" in plugins.names("backends")
    assert "theirs" not in plugins.names("methods")
    assert vars(plugins.backend("theirs"))["HERE"] is True
    monkeypatch.delitem(sys.modules, "their_backend")


@pytest.mark.usefixtures("third_party")
def test_only_the_named_module_is_imported() -> None:
    assert "broken" in plugins.names("backends")
    assert plugins.backend("onnxruntime")
    with pytest.raises(ValueError, match=r"^imported$"):
        plugins.backend("broken")
