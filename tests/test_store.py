from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from optpipe import files, store
from optpipe.errors import RunError, UsageError
from optpipe.types import Event, Plan, StepResult, Target, Tune

ROOT = Path(__file__).resolve().parents[1]
RECIPE = '[model]\nname = "a"\n\n[run]\nseed = 0\n'
RESULT = StepResult("key", "scores", (1.0, 2.5), 0.5)


def opened(
    folder: Path, recipe: str = RECIPE, *, fresh: bool = False, cache: Path | None = None
) -> store.Run:
    """A run that was opened and closed again, as a finished process leaves it."""
    with store.open_run(folder, recipe, fresh=fresh, cache=cache) as run:
        return run


def refusal(folder: Path, recipe: str = RECIPE, *, fresh: bool = False) -> str:
    with pytest.raises(UsageError) as error:
        opened(folder, recipe, fresh=fresh)
    return str(error.value)


# ---------------------------------------------------------------- atomic writes


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    files.write_atomically(path, "old")

    def fail_half_way() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half of the ne", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    files.write_atomically(path, "old")
    code = (
        "import os, sys; from pathlib import Path; from optpipe import files\n"
        "with files.replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment(), check=False)
    assert done.returncode == -9
    assert path.read_text(encoding="utf-8") == "old"


def test_a_written_file_has_the_content_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    files.write_atomically(path, "größer")
    files.write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    files.write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RunError) as error:
        files.write_atomically(path, "new")
    assert str(error.value) == (
        f"{path}: the disk is full; free some space and run again: it goes on from here"
    )
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_a_write_beyond_the_limit_of_the_system_fails_as_a_run_does(tmp_path: Path, kind: str) -> None:
    """Where a file cannot grow, whatever is written, the failure is one line and not a traceback."""
    write = {
        "text": "files.write_atomically(path, 'x' * 100_000)",
        "tensors": "import torch; store.save_tensors(path, {'a': torch.zeros(100_000)})",
    }[kind]
    code = (
        "import resource, signal, sys; from pathlib import Path; from optpipe import errors, files, store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); path = Path(sys.argv[1])\n"
        f"try:\n    {write}\n"
        "except errors.RunError as error:\n    print(error)\n"
    )
    path = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{path}: cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    path = tmp_path / "file" / "inner"
    with pytest.raises(RunError) as error:
        files.write_atomically(path, "")
    assert str(error.value).startswith(f"{path}: cannot be written: ")


def raising(error: OSError) -> Callable[[int], NoReturn]:
    def fail(_: int) -> NoReturn:
        raise error

    return fail


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# ---------------------------------------------------------------- opening a run


def test_a_new_run_keeps_its_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    assert opened(folder).folder == folder
    assert (folder / "recipe.toml").read_text(encoding="utf-8") == RECIPE


def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    code = (
        "import sys, time; from pathlib import Path; from optpipe import store\n"
        "with store.open_run(Path(sys.argv[1]), sys.argv[2], fresh=False, cache=None):\n"
        "    print('open', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder), RECIPE],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        expected = f"{folder}: another optpipe is running in this folder; wait for it or name another --out"
        assert refusal(folder) == expected
        assert refusal(folder, fresh=True) == expected
        other.kill()
    assert opened(folder).folder == folder, "the lock must go with the process that held it"


def test_the_lock_is_released_when_the_run_fails(tmp_path: Path) -> None:
    folder = tmp_path / "mine"

    def fail() -> None:
        with store.open_run(folder, RECIPE, fresh=False, cache=None):
            raise RunError("a stage failed")

    with pytest.raises(RunError, match=r"^a stage failed$"):
        fail()
    assert opened(folder).folder == folder


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("sea", encoding="utf-8")
    expected = f"{folder}: holds files that are no optpipe run; name another folder with --out"
    assert refusal(folder) == expected
    assert refusal(folder, fresh=True) == expected
    assert [path.name for path in folder.iterdir()] == ["holiday.jpg"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept", encoding="utf-8")
    assert refusal(path) == f"{path}: is a file; name a folder with --out"
    assert path.read_text(encoding="utf-8") == "kept"


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    folder = tmp_path / "file" / "inner"
    assert refusal(folder).startswith(f"{folder}: cannot be ")


def test_the_root_folder_is_refused() -> None:
    assert refusal(Path("/")) == "/: cannot hold a run; name another folder with --out"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert opened(tmp_path / "empty").folder.name == "empty"


def test_a_folder_whose_first_write_was_killed_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / ".recipe.toml.4711.tmp").write_text("[mod", encoding="utf-8")
    opened(folder)
    assert [path.name for path in folder.iterdir()] == ["recipe.toml"]


def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    opened(folder).store_answer("trials", "k", "step.json", RESULT)
    (folder / "trials" / "k" / ".weights.safetensors.4711.tmp").write_bytes(b"half")
    opened(folder)
    assert [path.name for path in (folder / "trials" / "k").iterdir()] == ["step.json"]


def test_another_recipe_is_refused_naming_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    opened(folder)
    other = RECIPE.replace("seed = 0", "seed = 1")
    assert refusal(folder, other) == (
        f"{folder}: holds another run (it differs in run.seed: 0 there, 1 here); "
        "name another folder with --out, or move that run aside with --fresh"
    )


def test_a_key_that_is_new_or_gone_differs_too(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    opened(folder)
    assert "(it differs in model.classes: None there, 10 here)" in refusal(
        folder, RECIPE.replace('name = "a"', 'name = "a"\nclasses = 10')
    )


def test_the_same_recipe_in_another_order_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    opened(folder)
    assert opened(folder, '[run]\nseed = 0\n[model]\nname = "a"\n').folder == folder


@pytest.mark.parametrize("damage", ["bytes", "folder"])
def test_a_recorded_recipe_that_cannot_be_read_is_refused(tmp_path: Path, damage: str) -> None:
    run = opened(tmp_path / "mine")
    recorded = run.folder / "recipe.toml"
    recorded.unlink()
    recorded.mkdir() if damage == "folder" else recorded.write_bytes(b"\xff\xfe")
    assert "recipe.toml: cannot be read" in refusal(run.folder)


def test_a_recorded_recipe_that_was_broken_by_hand_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    opened(folder)
    (folder / "recipe.toml").write_text("[model", encoding="utf-8")
    assert refusal(folder).startswith(f"{folder}/recipe.toml: is not valid TOML: ")


def test_fresh_moves_an_earlier_run_aside_and_deletes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    opened(folder).finish_stage("ingest", RESULT)
    other = RECIPE.replace("seed = 0", "seed = 1")
    assert opened(folder, other, fresh=True).stage_result("ingest", StepResult) is None
    opened(folder, RECIPE, fresh=True)
    assert store.Run(tmp_path / "mine.old-1", None).stage_result("ingest", StepResult) == RESULT
    assert (tmp_path / "mine.old-1" / "recipe.toml").read_text(encoding="utf-8") == RECIPE
    assert (tmp_path / "mine.old-2" / "recipe.toml").read_text(encoding="utf-8") == other


# ---------------------------------------------------------------- stages


def test_a_finished_stage_is_read_back_by_the_next_process(tmp_path: Path) -> None:
    opened(tmp_path / "mine").finish_stage("analyze", RESULT)
    assert opened(tmp_path / "mine").stage_result("analyze", StepResult) == RESULT
    assert (tmp_path / "mine" / "02-analyze" / "result.json").is_file()


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": "k"}', b"\xff\xfe", b"[]", b"null"])
def test_a_broken_result_is_not_done(tmp_path: Path, content: bytes) -> None:
    run = opened(tmp_path / "mine")
    run.finish_stage("analyze", RESULT)
    (run.stage_folder("analyze") / "result.json").write_bytes(content)
    assert run.stage_result("analyze", StepResult) is None


def test_a_failure_is_recorded_and_never_counts_as_done(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine")
    run.fail_stage("recover", RunError("the loss is not finite"))
    assert run.stage_result("recover", StepResult) is None
    record = json.loads((run.stage_folder("recover") / "failure.json").read_text(encoding="utf-8"))
    assert (record["error"], record["message"]) == ("RunError", "the loss is not finite")
    run.finish_stage("recover", RESULT)
    assert run.stage_result("recover", StepResult) == RESULT
    assert not (run.stage_folder("recover") / "failure.json").exists()


# ---------------------------------------------------------------- answers


def test_an_answer_is_found_again_in_its_own_run(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine")
    assert run.answer("trials", "k", "step.json", StepResult) is None
    run.store_answer("trials", "k", "step.json", RESULT)
    assert run.answer("trials", "k", "step.json", StepResult) == (RESULT, False)
    assert run.answer("trials", "other", "step.json", StepResult) is None


def test_an_answer_of_another_run_comes_from_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    opened(tmp_path / "first", cache=cache).store_answer("trials", "k", "step.json", RESULT)
    second = opened(tmp_path / "second", cache=cache)
    assert second.answer("trials", "k", "step.json", StepResult) == (RESULT, True)
    assert second.answer("engines", "k", "step.json", StepResult) is None
    without = opened(tmp_path / "third")
    assert without.answer("trials", "k", "step.json", StepResult) is None


def test_the_runs_of_a_sweep_have_each_others_files_and_keep_them(tmp_path: Path) -> None:
    first = store.Run(tmp_path / "first", tmp_path / "cache", lends=True)
    second = store.Run(tmp_path / "second", tmp_path / "cache", lends=True)
    assert not second.borrow("trained", "k", second.folder / "weights")
    for path, text in ((first.folder / "weights", "w"), (first.folder / "stage" / "a" / "engine", "e")):
        files.write_atomically(path, text)
    first.lend("trained", "k", first.folder / "weights")
    first.lend("ingest", "k", first.folder / "stage")
    assert second.borrow("trained", "k", second.folder / "weights")
    files.write_atomically(first.folder / "stage" / "result.json", "{}")
    files.write_atomically(first.folder / "stage" / "a" / "engine", "f")
    first.lend("ingest", "k", first.folder / "stage")
    assert (tmp_path / "cache" / "ingest" / "k" / "a" / "engine").read_text() == "e", "the first stays"
    first.lend("ingest", "k", first.folder / "stage", anew=True)
    assert second.borrow("ingest", "k", second.folder / "stage")
    assert [path.name for path in (second.folder / "stage").iterdir()] == ["a"], "it is not done by that"
    shutil.rmtree(tmp_path / "cache")
    assert (second.folder / "weights").read_text() == "w"
    (second.folder / "stage" / "a" / "engine").write_text("built anew here")
    assert (first.folder / "stage" / "a" / "engine").read_text() == "f"


def test_a_folder_that_is_lent_again_and_again_is_never_half_of_two(tmp_path: Path) -> None:
    """Others lend it anew, as when an original is timed again, while it is borrowed."""
    cache, names = tmp_path / "cache", [f"file{number}" for number in range(20)]
    wrong: list[str] = []

    def lend(which: int) -> None:
        run = store.Run(tmp_path / f"lender{which}", cache, lends=True)
        for name in names:
            files.write_atomically(run.folder / "stage" / name, f"{which}")
        for _ in range(15):
            run.lend("ingest", "k", run.folder / "stage", anew=True)

    def borrow(which: int) -> None:
        run = store.Run(tmp_path / f"borrower{which}", cache, lends=True)
        for _ in range(15):
            if run.borrow("ingest", "k", run.folder / "stage"):
                found = sorted(path.read_text() for path in (run.folder / "stage").iterdir())
                if len(found) != len(names) or len(set(found)) != 1:
                    wrong.append(f"{which}: {found}")

    lend(0)
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(one, number) for number in (1, 2) for one in (lend, borrow)]
    for one in work:
        one.result()
    assert wrong == []
    assert [path.name for path in tmp_path.rglob(".*.tmp")] == []


def test_what_was_left_half_written_in_a_cache_goes_a_day_later(tmp_path: Path) -> None:
    room = tmp_path / "cache" / "trained"
    for name, age_s in ((".old.1.tmp", 25 * 3600), (".new.1.tmp", 60), ("kept", 10**6)):
        path = room / name
        path.mkdir(parents=True)
        os.utime(path, (time.time() - age_s,) * 2)
    with store.open_run(tmp_path / "run", RECIPE, fresh=False, cache=tmp_path / "cache"):
        assert sorted(path.name for path in room.iterdir()) == [".new.1.tmp", "kept"]


def test_runs_outside_a_sweep_lend_no_files(tmp_path: Path) -> None:
    first = store.Run(tmp_path / "first", tmp_path / "cache")
    files.write_atomically(first.folder / "weights", "w")
    first.lend("trained", "k", first.folder / "weights")
    assert not (tmp_path / "cache").exists()
    files.write_atomically(tmp_path / "cache" / "trained" / "k", "w")
    assert not store.Run(tmp_path / "second", tmp_path / "cache").borrow("trained", "k", tmp_path / "weights")
    assert not store.Run(tmp_path / "third", None, lends=True).borrow("trained", "k", tmp_path / "weights")


def test_a_file_is_copied_where_the_disk_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*paths: Path) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refused)
    run = store.Run(tmp_path / "run", tmp_path / "cache", lends=True)
    files.write_atomically(run.folder / "weights", "w")
    run.lend("trained", "k", run.folder / "weights")
    assert run.borrow("trained", "k", run.folder / "again")
    assert (run.folder / "again").read_text() == "w"


def test_what_a_killed_process_had_half_copied_goes_when_the_run_is_opened(tmp_path: Path) -> None:
    with store.open_run(tmp_path / "run", RECIPE, fresh=False, cache=None) as run:
        (run.folder / ".01-ingest.1.tmp" / "engines").mkdir(parents=True)
        (run.folder / ".01-ingest.1.tmp" / ".model.onnx.1.tmp").write_text("half")
    with store.open_run(tmp_path / "run", RECIPE, fresh=False, cache=None) as run:
        assert [path.name for path in run.folder.iterdir()] == ["recipe.toml"]


def test_a_broken_answer_is_none(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine", cache=tmp_path / "cache")
    run.store_answer("trials", "k", "step.json", RESULT)
    for path in tmp_path.rglob("*step.json"):
        path.write_bytes(path.read_bytes()[:20])
    assert run.answer("trials", "k", "step.json", StepResult) is None


def test_a_stage_that_was_made_from_something_else_is_not_done(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine")
    run.finish_stage("prune", RESULT, "one choice")
    assert run.stage_result("prune", StepResult, "one choice") == RESULT
    assert run.stage_result("prune", StepResult) == RESULT
    assert run.stage_result("prune", StepResult, "another choice") is None
    run.finish_stage("recover", RESULT)  # as an older optpipe did, which did not say
    assert run.stage_result("recover", StepResult, "one choice") == RESULT


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine")
    (run.trial_folder("k") / "step.json").mkdir(parents=True)
    with pytest.raises(RunError, match=r"k/step.json: cannot be read: Is a directory; mend or remove it"):
        run.answer("trials", "k", "step.json", StepResult)
    (run.folder / "checkpoint").mkdir()
    with pytest.raises(RunError, match=r"checkpoint: cannot be read: Is a directory; remove it and run"):
        store.DiskCheckpoint(run.folder / "checkpoint", 1).load()


def test_damaged_tensors_that_were_lent_are_withdrawn(tmp_path: Path) -> None:
    import torch

    first = store.Run(tmp_path / "first", tmp_path / "cache", lends=True)
    second = store.Run(tmp_path / "second", tmp_path / "cache", lends=True)
    store.save_tensors(first.folder / "weights", {"a": torch.ones(3)})
    first.lend("trained", "k", first.folder / "weights")
    lent = tmp_path / "cache" / "trained" / "k"
    lent.write_bytes(lent.read_bytes()[:-1] + b"x")
    assert not second.borrow_tensors("trained", "k", second.folder / "weights")
    assert not lent.exists()
    store.save_tensors(second.folder / "weights", {"a": torch.ones(3)})
    second.lend("trained", "k", second.folder / "weights")
    assert first.borrow_tensors("trained", "k", first.folder / "weights")


def test_what_was_lent_and_cannot_be_read_is_not_borrowed(tmp_path: Path) -> None:
    run = store.Run(tmp_path / "run", tmp_path / "cache", lends=True)
    (tmp_path / "cache" / "ingest" / "k").mkdir(parents=True)
    (tmp_path / "cache" / "ingest" / "k" / "engine").symlink_to(tmp_path / "nowhere")
    run.folder.mkdir()
    assert not run.borrow("ingest", "k", run.folder / "stage")
    assert list(run.folder.iterdir()) == []


def test_what_goes_to_the_cache_is_made_in_the_runs_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = opened(tmp_path / "mine", cache=tmp_path / "cache"), list[Path]()
    replace = Path.replace

    def watched(path: Path, target: Path) -> Path:
        seen.append(path)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    run.store_answer("trials", "k", "step.json", RESULT)
    assert [path.is_relative_to(run.folder) for path in seen] == [True, True]
    assert [path.name for path in (tmp_path / "cache" / "trials").iterdir()] == ["k-step.json"]


def test_a_cache_on_another_disk_is_written_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(tmp_path / "mine", cache=tmp_path / "cache")
    replace = Path.replace

    def across(path: Path, target: Path) -> Path:
        if path.is_relative_to(run.folder) and not target.is_relative_to(run.folder):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", across)
    run.store_answer("trials", "k", "step.json", RESULT)
    assert opened(tmp_path / "other", cache=tmp_path / "cache").answer(
        "trials", "k", "step.json", StepResult
    ) == (RESULT, True)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_line_that_was_torn_ends_where_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    files.append_line(path, "one")
    path.write_bytes(path.read_bytes() + b'{"kin')
    files.append_line(path, "two")
    assert path.read_text() == 'one\n{"kin\ntwo\n'


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = (
        "import resource, sys; from pathlib import Path; from optpipe import files; from optpipe.errors "
        "import RunError\n"
        "path = Path(sys.argv[1]); files.append_line(path, 'one')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: files.append_line(path, 'a line that is too long')\n"
        "except RunError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "events.jsonl: cannot be written: File too large" in done.stdout
    assert path.read_text() == "one\n"


def test_events_are_appended_a_line_each(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine")
    run.emit(Event("trial", "without layer1.0", "computed", 0, 3, 0.5, (("key", "k"),)))
    run.emit(Event("note", "engine"))
    lines = (run.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first.pop("at") <= second.pop("at")
    assert first == {
        "kind": "trial",
        "name": "without layer1.0",
        "detail": "computed",
        "done": 0,
        "total": 3,
        "seconds": 0.5,
        "fields": {"key": "k"},
    }
    assert second == {"kind": "note", "name": "engine", "fields": {}}


# ---------------------------------------------------------------- keys and values


def test_a_digest_is_the_same_for_ever() -> None:
    """Pinned, since another digest would lose every stored answer: sha256 of the compact JSON

    [1,"trial","ab",{"drop_blocks":["layer1.0"],"input_hw":null,"keep_channels":[]},null,0.5]
    """
    assert store.digest(1, "trial", "ab", Plan(drop_blocks=("layer1.0",)), None, 0.5) == (
        "3c7359fa1dfd753ce3e970555c3b3bb627650986d883c4200a59c23f95e586c0"
    )


def test_a_digest_does_not_depend_on_the_process() -> None:
    code = (
        "from optpipe import store; from optpipe.types import Plan; "
        "print(store.digest(Plan(drop_blocks=('a',)), 'x'))"
    )
    seeds = [{**environment(), "PYTHONHASHSEED": seed} for seed in ("0", "1")]
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout
        for env in seeds
    }
    assert printed == {store.digest(Plan(drop_blocks=("a",)), "x") + "\n"}


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(Tune(steps=5), steps=6),
        dataclasses.replace(Tune(steps=5), lr=0.020000001),
        dataclasses.replace(Tune(steps=5), schedule="cosine"),
        dataclasses.replace(Tune(steps=5), augment="none"),
    ],
)
def test_a_digest_changes_with_every_field(other: Tune) -> None:
    assert store.digest(other) != store.digest(Tune(steps=5))


def test_a_digest_keeps_parts_apart() -> None:
    assert store.digest("ab", "c") != store.digest("a", "bc")
    assert store.digest(Plan(("a", "b"))) != store.digest(Plan(("b", "a")))
    assert store.digest(None) != store.digest("None")
    assert store.digest(1) != store.digest("1")


def test_a_digest_refuses_what_has_no_one_representation() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        store.digest(float("nan"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.digest({1, 2})


def test_values_come_back_as_they_were() -> None:
    target = Target("onnxruntime", 16, (3, 32, 32), options=(("level", "high"),))
    assert store.from_json(Target, store.to_json(target)) == target
    plan = Plan(("a",), (("conv", (0, 2)),), (24, 24))
    assert store.from_json(Plan, store.to_json(plan)) == plan


def test_a_file_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert store.file_sha256(tmp_path / "file") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


# ---------------------------------------------------------------- tensors


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    import torch

    checkpoint = store.DiskCheckpoint(tmp_path / "recover" / "checkpoint.safetensors", 50)
    assert checkpoint.load() is None
    checkpoint.save({"step": torch.tensor(50), "weight": torch.arange(6.0).view(2, 3).T})
    checkpoint.save({"step": torch.tensor(100), "weight": torch.arange(6.0).view(2, 3).T})
    state = checkpoint.load()
    assert state is not None
    assert int(state["step"]) == 100
    assert torch.equal(state["weight"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


@pytest.mark.parametrize("kept", [0, 4, 30, -1])
def test_a_truncated_checkpoint_is_none(tmp_path: Path, kept: int) -> None:
    import torch

    checkpoint = store.DiskCheckpoint(tmp_path / "checkpoint.safetensors", 50)
    checkpoint.save({"weight": torch.arange(100.0)})
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:kept])
    assert checkpoint.load() is None


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    import torch

    a, b = torch.arange(12.0).view(3, 4), torch.arange(4)
    store.save_tensors(tmp_path / "one", {"a": a, "b": b})
    store.save_tensors(tmp_path / "two", {"b": b.clone(), "a": a.T.contiguous().T})
    store.save_tensors(tmp_path / "three", {"a": a + 1, "b": b})
    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_tensors_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    tied = torch.arange(4.0)
    store.save_tensors(tmp_path / "tied", {"embedding": tied, "head": tied})
    loaded = load_file(tmp_path / "tied")
    assert torch.equal(loaded["embedding"], tied)
    assert torch.equal(loaded["head"], tied)
