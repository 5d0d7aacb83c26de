"""A whole sweep of a small real network: what its runs have from each other, a stop on the way, failures."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import Call
from test_pipeline import write_recipe
from whole_runs import forget, recovered_sha256, write_images

from optpipe import cli, onnx_export, pipeline, preparation, store, timing
from optpipe import recipe as recipes
from optpipe.errors import RunError, UsageError
from optpipe.pipeline import search
from optpipe.report import schema
from optpipe.results import Ingested
from optpipe.types import Budget, Event

# The module; the package has a function of its name.
stages = importlib.import_module("optpipe.pipeline.run")


@dataclass
class Swept:
    """A sweep that was stopped once and then finished: what its two commands came to, and what they did.

    ``exports`` are the files that networks were exported to; ``timings`` counts the paired timings of a run.
    """

    words: tuple[str, ...]
    out: Path
    calls: list[tuple[int, str, str]] = field(default_factory=list)
    exports: list[Path] = field(default_factory=list)
    timings: Counter[str] = field(default_factory=Counter)

    def details(self, name: str, kind: str) -> list[tuple[str, str]]:
        """(name, detail) of a run's events of a kind."""
        text = (self.out / name / "events.jsonl").read_text(encoding="utf-8").splitlines()
        told = [json.loads(line) for line in text]
        return [(one["name"], one.get("detail", "")) for one in told if one["kind"] == kind]

    def origins(self, name: str) -> set[str]:
        """Where a run's answers came from."""
        return {detail for _, detail in self.details(name, "trial")}


def called(words: tuple[str, ...]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    code: int | str | None = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            cli.main(words)
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.toml, and other.toml with other calibration images for the same network."""
    folder = tmp_path_factory.mktemp("sweep")
    text = write_recipe(folder).read_text()
    write_images(folder / "more.npz", 16, seed=5)
    (folder / "other.toml").write_text(text.replace("calibration.npz", "more.npz"))
    return folder


@pytest.fixture(scope="module")
def swept(home: Path) -> Swept:
    """Both recipes at a budget that they meet and one that nothing does; stopped in the third run."""
    recipe, out = ("small.toml", "other.toml"), home / "out"
    paths = [str(home / name) for name in recipe]
    words = ("sweep", *paths, "--latency", "0.05,0.99", "--out", str(out), "--set", "export.precisions=[]")
    found = Swept(words, out)
    with pytest.MonkeyPatch.context() as patch:
        count(patch, found)
        with pytest.MonkeyPatch.context() as stop:
            press_ctrl_c(stop)
            found.calls.append(called(words))
        found.calls.append(called(words))
    return found


def press_ctrl_c(patch: pytest.MonkeyPatch) -> None:
    """Send SIGINT when a recovery begins for the second time."""
    recover, calls = stages.recover, 0

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGINT)
        return recover(*arguments)

    patch.setattr(stages, "recover", interrupted)


def prepared(home: Path) -> preparation.Setup:
    """The third run's setup, as the sweep made it."""
    setup = preparation.prepare(recipes.load(home / "other.toml", ["export.precisions=[]"]))
    return setup.with_budget(Budget(latency_reduction=0.05), "other-0.05")


def count(patch: pytest.MonkeyPatch, found: Swept) -> None:
    """Note every export and every paired timing."""
    current = ""
    run, export, paired = pipeline.run, onnx_export.export, timing.paired

    def noted_run(setup: preparation.Setup, folder: Path, **rest: object) -> schema.Report:
        nonlocal current
        current = folder.name
        return run(setup, folder, **rest)  # type: ignore[arg-type]

    def noted_export(*arguments: object) -> object:
        path = arguments[3]
        assert isinstance(path, Path)
        found.exports.append(path)
        return export(*arguments)  # type: ignore[arg-type]

    def noted_timing(*arguments: object, **rest: object) -> timing.PairedMeasurement:
        found.timings[current] += 1
        return paired(*arguments, **rest)  # type: ignore[arg-type]

    patch.setattr(pipeline, "run", noted_run)
    patch.setattr(onnx_export, "export", noted_export)
    patch.setattr(timing, "paired", noted_timing)


@pytest.fixture
def copied(swept: Swept, tmp_path: Path) -> Path:
    """A copy of the sweep's folder."""
    shutil.copytree(swept.out, tmp_path / "out")
    return tmp_path / "out"


# ---------------------------------------------------------------- stopped and gone on with


def test_a_sweep_that_is_stopped_says_how_to_go_on(swept: Swept) -> None:
    code, out, err = swept.calls[0]
    assert (code, out) == (130, "")
    told = err.splitlines()[-1]
    assert told.startswith(
        f"Interrupted in recover: the pruned network is kept in {swept.out}/other-0.05; `optpipe"
    )
    assert told.endswith(" goes on from here")
    assert " ".join(swept.words[:3]) in told


def test_the_same_command_goes_on_where_it_was(swept: Swept) -> None:
    code, out, _ = swept.calls[1]
    assert code == 0
    assert [line.split(" | ")[0] for line in out.splitlines()[2:6]] == [
        "| small-0.05",
        "| small-0.99",
        "| other-0.05",
        "| other-0.99",
    ]
    done = [name for name, detail in swept.details("small-0.05", "stage") if detail == "reused"]
    assert done == list(store.STAGES), "the finished run is reused"
    done = [name for name, detail in swept.details("other-0.05", "stage") if detail == "reused"]
    assert done == ["ingest", "analyze", "prune"], "that it was stopped in goes on"


def test_what_cannot_be_met_is_a_row_that_says_why(swept: Swept) -> None:
    _, out, err = swept.calls[1]
    for name in ("small-0.99", "other-0.99"):
        assert f"| {name} | practise | -99% | failed |" in out
        assert f"- {name} failed: no plan meets the budget" in out
        assert f"{name} failed: no plan meets the budget" in err
    assert "| -99% | none of the runs meets it |" in out
    found = json.loads((swept.out / "sweep.json").read_text(encoding="utf-8"))
    assert (found["finished"], found["failed"]) == (2, 2)
    assert [line["state"] for line in found["lines"]] == ["finished", "failed"] * 2
    assert out in (swept.out / "sweep.md").read_text(encoding="utf-8")
    assert "95% interval" in (swept.out / "sweep.svg").read_text(encoding="utf-8")


def test_every_run_is_an_ordinary_one(swept: Swept, optpipe: Call) -> None:
    runs = swept.out / "small-0.05", swept.out / "other-0.05"
    assert optpipe("gate", runs[0], "--min-latency-reduction", 2)[0] == 0
    assert optpipe("compare", *runs)[0] == 0
    assert optpipe("verify", runs[1])[0] == 0
    assert optpipe("report", runs[1])[0] == 0


# ---------------------------------------------------------------- what runs have from each other


def test_the_original_is_exported_and_ingested_once(swept: Swept) -> None:
    ingests = [path for path in swept.exports if path.parent.name == "01-ingest"]
    assert ingests == [swept.out / "small-0.05" / "01-ingest" / "model.onnx"]
    noted = [swept.details(name, "note") for name in ("small-0.05", "small-0.99", "other-0.05", "other-0.99")]
    told = ("ingest", "the original as another run of this sweep measured it")
    assert [told in one for one in noted] == [False, True, True, True]
    for name in ("small-0.99", "other-0.05", "other-0.99"):
        checked = [detail for told, detail in swept.details(name, "note") if told == "baseline"]
        assert checked and "since the run began: latencies stay" in checked[0]


def test_another_budget_computes_nothing_that_the_first_did(swept: Swept) -> None:
    assert "computed" in swept.origins("small-0.05")
    assert "computed" not in swept.origins("small-0.99")
    assert not [path for path in swept.exports if "small-0.99" in str(path)]
    assert swept.timings["small-0.05"] > 1
    assert swept.timings["small-0.99"] == 0


def test_another_recipe_times_no_structure_again(swept: Swept) -> None:
    assert swept.timings["other-0.05"] == 1, "only its final benchmark"
    first, other = (store.Run(swept.out / name, None) for name in ("small-0.05", "other-0.05"))
    ingested = [run.stage_result("ingest", Ingested) for run in (first, other)]
    assert ingested[0] is not None and ingested[1] is not None
    assert (ingested[0].borrowed, ingested[1].borrowed) == (False, True)
    assert ingested[0].latency == ingested[1].latency


def test_a_run_needs_neither_the_cache_nor_the_others(swept: Swept, copied: Path, home: Path) -> None:
    shutil.rmtree(copied / store.CACHE)
    shutil.rmtree(copied / "small-0.05")
    folder = copied / "other-0.05"
    before = recovered_sha256(folder)
    forget(folder, "prune", "recover", "export", "benchmark")
    pipeline.run(prepared(home), folder, fresh=False, emit=lambda _: None)
    assert recovered_sha256(folder) == before


def test_an_original_that_drifted_is_timed_afresh(
    swept: Swept, copied: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "analyze", stopped)
    setup = preparation.prepare(recipes.load(home / "small.toml", ["timing.drift=1e-9"]))
    told: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(setup, copied / "new", fresh=False, emit=told.append, shared=copied / store.CACHE)
    assert any(event.name == "baseline" and "taken afresh" in event.detail for event in told)
    found = store.Run(copied / "new", None).stage_result("ingest", Ingested)
    assert found is not None
    assert (found.borrowed, found.epoch) == (True, 1)
    setup = preparation.prepare(recipes.load(home / "small.toml"))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(setup, copied / "next", fresh=False, emit=told.append, shared=copied / store.CACHE)
    following = store.Run(copied / "next", None).stage_result("ingest", Ingested)
    assert following is not None
    assert (following.epoch, following.latency) == (1, found.latency), "those after it are held against that"


def stopped(*arguments: object) -> object:
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["another version", "a bit of the logits", "a folder for an engine"])
def test_a_lent_ingest_that_is_damaged_is_measured_anew(
    swept: Swept, copied: Path, home: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    (lent,) = (copied / store.CACHE / "ingest").glob("*/lent.json")
    if damage == "another version":
        lent.write_text("{}")
    elif damage == "a bit of the logits":
        logits = lent.with_name("logits.npy")
        logits.write_bytes(logits.read_bytes()[:-1] + b"x")
    else:
        lent.with_name("model.onnx").unlink()
        lent.with_name("model.onnx").mkdir()
    monkeypatch.setattr(stages, "analyze", stopped)
    setup = preparation.prepare(recipes.load(home / "small.toml"))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(setup, copied / "new", fresh=False, emit=lambda _: None, shared=copied / store.CACHE)
    found = store.Run(copied / "new", None).stage_result("ingest", Ingested)
    assert found is not None
    assert not found.borrowed


def test_an_ingest_depends_on_calibration_images_only_where_they_choose_an_engines_ranges(home: Path) -> None:
    def key(name: str, *overrides: str) -> str:
        return search._original_key(preparation.prepare(recipes.load(home / name, overrides)))

    assert key("small.toml") == key("other.toml")
    assert key("small.toml") == key("small.toml", "recover.steps=3", "budget.drop_blocks=1")
    int8 = 'target.precision="int8"'
    assert len({key("small.toml"), key("small.toml", int8), key("other.toml", int8)}) == 3
    others = (
        "target.batch=4",
        "target.threads=2",
        "timing.budget_s=0.1",
        "timing.tolerance=0.4",
        "run.seed=1",
    )
    assert len({key("small.toml"), *(key("small.toml", other) for other in others)}) == 6


# ---------------------------------------------------------------- failures


def test_fresh_measures_all_anew_and_none_that_succeeds_is_a_failure(
    swept: Swept, copied: Path, home: Path, optpipe: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misses(*arguments: object) -> object:
        raise RunError("no plan meets the budget")

    monkeypatch.setattr(stages, "analyze", misses)
    words = (
        "sweep",
        home / "small.toml",
        "--latency",
        "0.99",
        "--out",
        copied,
        "--set",
        "export.precisions=[]",
    )
    code, out, err = optpipe(*words, "--fresh", "--json")
    assert code == 4
    assert err.endswith(f"Error: {copied}: none of the 1 runs succeeded; sweep.md says why of each\n")
    assert json.loads(out)["lines"][0]["reason"] == "no plan meets the budget"
    assert {path.name for path in copied.glob("*small-0.99*")} >= {"small-0.99", "small-0.99.old-1"}
    assert (copied / f"{store.CACHE}.old-1" / "ingest").is_dir()
    ingested = store.Run(copied / "small-0.99", None).stage_result("ingest", Ingested)
    assert ingested is not None
    assert not ingested.borrowed


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("out of\nmemory"), "unexpected RuntimeError: out of memory"),
        (MemoryError(), "this takes more memory than there is"),
    ],
)
def test_an_unexpected_failure_costs_one_run_alone(
    error: Exception, told: str, home: Path, tmp_path: Path, optpipe: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def broken(setup: preparation.Setup, opened: store.Run, emit: object) -> Ingested:
        tried.append(opened.folder.name)
        raise error

    monkeypatch.setattr(stages, "ingest", broken)
    words = ("sweep", home / "small.toml", "--latency", "0.1,0.2", "--out", tmp_path / "out")
    code, _, err = optpipe(*words)
    assert (code, tried) == (4, ["small-0.1", "small-0.2"])
    assert f"small-0.1 failed: {told}\n" in err
    assert "Traceback" not in err
    assert "Traceback" in optpipe(*words, "--debug")[2]


def test_a_second_sweep_in_the_folder_is_refused(home: Path, tmp_path: Path, optpipe: Call) -> None:
    with store.locked(tmp_path / "out"):
        code, _, err = optpipe("sweep", home / "small.toml", "--latency", "0.1", "--out", tmp_path / "out")
    assert (code, "another optpipe is running in this folder" in err) == (2, True)


def test_images_that_changed_since_are_refused_before_anything_runs(
    swept: Swept, copied: Path, home: Path
) -> None:
    setup = prepared(home)
    pipeline.check(setup, copied / "other-0.05")
    changed = setup.with_calibration(replace(setup.calibration, digest="0" * 64))
    with pytest.raises(UsageError, match="was begun with other calibration data"):
        pipeline.check(changed, copied / "other-0.05")
