"""The campaigns of kills, damaged files and full disks: a few cases, and that each finds what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from faults import disk, kills, rot, sittings, small_runs
from faults.report import Found
from optpipe import files, seals


def said_nothing(line: str) -> None:
    """Where a campaign's progress goes."""


@pytest.fixture(scope="module")
def practised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe in ``home`` and its finished run in ``alone``."""
    root = tmp_path_factory.mktemp("kills")
    small_runs.PRACTISE.make(root / "home")
    (root / "alone").mkdir()
    words = small_runs.PRACTISE.words(root / "alone" / "run")
    code, lines = sittings.finish(words, root / "home", root / "said", rot.light)
    assert code == 0, lines
    return root


@pytest.mark.timeout(600)
def test_killed_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    tally = kills.killed(small_runs.PRACTISE, 2, tmp_path, np.random.default_rng(1), said_nothing)
    assert tally.wrong == []
    assert tally.kills == 2
    assert tally.sittings == tally.kills + tally.runs
    lines = kills.section([tally]).splitlines()
    row = next(line for line in lines if line.startswith("| practise |"))
    assert row.split(" | ")[2] == "2"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("campaign", [kills, rot, disk])
def test_a_tenth_of_the_campaign_finds_nothing(tmp_path: Path, campaign: object) -> None:
    found = campaign.run(tmp_path, 10, said_nothing)  # type: ignore[attr-defined]
    assert isinstance(found, Found)
    assert found.problems == ()


# ---------------------------------------------------------------- what a campaign would find


def test_an_answer_that_was_made_twice_is_found(tmp_path: Path) -> None:
    answer = tmp_path / "trials" / "k" / "step.json"
    answer.parent.mkdir(parents=True)
    answer.write_text("{}")
    known: dict[Path, tuple[int, int]] = {}
    assert kills.changed(tmp_path, known) == []
    assert kills.changed(tmp_path, known) == []
    answer.unlink()
    (tmp_path / "keeps the number of the old file taken").write_text("")
    answer.write_text("{}")
    assert kills.changed(tmp_path, known) == ["trials/k/step.json was made twice"]
    answer.unlink()
    assert kills.changed(tmp_path, known) == ["trials/k/step.json is gone"]


def test_files_that_are_not_whole_are_found(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"a": ')
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    (tmp_path / ".result.json.0.tmp").write_text("{")
    assert sorted(kills.torn(tmp_path)) == ["result.json is torn", "weights.safetensors is torn"]


def test_two_outcomes_differ_where_a_figure_does(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(f'{{"x": [{value}], "seconds": {value}}}')
    (tmp_path / "b" / "left").write_text("")
    one, other = (small_runs.outcome(tmp_path / name) for name in ("a", "b"))
    assert small_runs.differences(one, one) == []
    assert small_runs.differences(one, other) == [
        "<files>: all of it is ['left', 'report.json'], not ['report.json']",
        "left is too much",
        "report.json: .x[0] is 2, not 1",
    ]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", rot.DAMAGES)
def test_damage_is_done(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "result.json"
    files.write_atomically(path, '{"value": 0.25}')
    before = path.read_bytes()
    assert rot.DAMAGES[damage](path, np.random.default_rng(0))
    if damage == "not readable":
        assert path.stat().st_mode & 0o777 == 0
    else:
        assert not path.is_file() or path.read_bytes() != before


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "damage", "ended"),
    [
        ("04-recover/weights.safetensors", "a bit flipped", "mended"),
        ("03-prune/result.json", "a digit changed", "mended"),
        ("inputs.json", "not readable", "named"),
        ("06-benchmark/samples.npy", "removed", "not read"),
    ],
)
def test_a_damaged_run_is_mended_or_names_the_file(
    practised: Path, tmp_path: Path, name: str, damage: str, ended: str
) -> None:
    shutil.copytree(practised / "home", tmp_path / "home-0")
    wanted = small_runs.outcome(practised / "alone" / "run")
    state = rot.State("finished", small_runs.EKG, practised / "alone", wanted)
    path = practised / "alone" / "run" / name
    words = small_runs.PRACTISE.words(tmp_path / "case" / "run")
    found = rot.case(state, path, rot.DAMAGES[damage], (1,), tmp_path, words)
    assert found == (ended, [])


def test_a_failure_that_does_not_name_the_file_is_found(tmp_path: Path) -> None:
    victim = tmp_path / "run" / "result.json"
    assert rot.unclear(4, [f"Error: {victim}: is damaged"], victim) == []
    assert rot.unclear(4, ["Error: something is damaged"], victim) == [
        "does not name the file: Error: something is damaged"
    ]
    assert rot.unclear(70, ["Traceback ..."], victim)[0] == "exit code 70"


# ---------------------------------------------------------------- full disks


@pytest.mark.timeout(600)
def test_a_disk_that_fills_up_ends_a_command_in_one_line(practised: Path, tmp_path: Path) -> None:
    room = tmp_path / "disk"
    shutil.copytree(practised / "alone", room)
    tally = disk.tried("report", ("report", "run"), room, tmp_path / "report", room, 2, real=False)
    assert tally.wrong == []
    assert {one.fault for one in tally.points} == set(disk.FAULTS)
    assert tally.count("full", 4) > 0
    assert tally.count("read-only", 4) > 0
    assert (
        small_runs.differences(
            small_runs.outcome(practised / "alone" / "run"), small_runs.outcome(room / "run")
        )
        == []
    )


def test_a_file_that_is_half_written_is_found(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"a": 1}\n{"b"')
    (tmp_path / "samples.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "whole.jsonl").write_text("")
    assert [line.split(" is ")[0] for line in sorted(disk.unreadable(tmp_path))] == [
        "events.jsonl",
        "samples.npy",
    ]


def test_a_disk_is_put_back_as_it_was(tmp_path: Path) -> None:
    room, kept = tmp_path / "disk", tmp_path / "kept"
    (room / "folder").mkdir(parents=True)
    for name in ("same", "changed", "folder/gone"):
        (room / name).write_text(name)
    before = disk.files_of(room)
    shutil.copytree(room, kept)
    (room / "changed").write_text("otherwise")
    shutil.rmtree(room / "folder")
    (room / "new").mkdir()
    (room / "new" / "file").write_text("")
    disk.put_back(room, kept, before)
    assert {path.relative_to(room).as_posix() for path in disk.files_of(room)} == {
        *("same", "changed", "folder", "folder/gone")
    }
    assert (room / "changed").read_text() == "changed"
    assert (room / "same").stat().st_ino == before[room / "same"][0]


def test_a_sitting_gives_up_roots_right_to_read_everything(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("{}")
    path.chmod(0)
    code, lines = sittings.finish(("report", str(path)), tmp_path, tmp_path / "said", rot.light)
    assert code == 2
    assert lines[-1].endswith(f"'{path}' is not readable.")


def test_the_digest_that_load_prints_is_of_the_weights(practised: Path, tmp_path: Path) -> None:
    run = practised / "alone" / "run"
    code, lines = sittings.finish(("load", str(run)), practised / "home", tmp_path / "said", rot.light)
    tensors = seals.read_tensors(run / "deploy" / "model.safetensors")
    assert (code, lines) == (0, [seals.tensors_sha256(tensors)])
