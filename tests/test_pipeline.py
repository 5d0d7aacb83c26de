"""The six stages from a recipe to a report, with a small real network and real engines."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from whole_runs import Ran, forget, interrupt, recovered_sha256, take, write_images

import optpipe
from optpipe import (
    building,
    contest,
    data,
    deploy,
    files,
    onnx_export,
    plugins,
    precision,
    preparation,
    quality,
    store,
    timing,
    tune,
    uncertainty,
)
from optpipe import recipe as recipes
from optpipe.errors import RunError, UsageError
from optpipe.lab.engines import EngineRecord
from optpipe.methods import practise
from optpipe.pipeline import engines
from optpipe.pipeline.assembly import known_beforehand
from optpipe.report import build, limits
from optpipe.results import Analyzed, Benchmarked, Exported, Ingested, Pruned, Recovered
from optpipe.types import DeviceState, Limits, Plan

ROOT = Path(__file__).resolve().parents[1]
NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def make():
    return Net()
"""
# Both blocks go, so that the plan does not hang on what is timed.
RECIPE = """
[model]
name = "small_residual_network:make"

[data]
calibration = {{ source = "{calibration}", labels = false }}
evaluation = {{ source = "{evaluation}" }}
preprocess = {{ mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25], size = [16, 16] }}

[target]
batch = 8
threads = 1

[timing]
tolerance = 0.5
budget_s = 0.05
final_budget_s = 0.05
drift = 1000

[method]
name = "practise"

[recover]
steps = 10
batch = 8

[budget]
drop_blocks = 2

[run]
checkpoint_every = 3
"""


def write_recipe(
    folder: Path, calibration: str = "calibration.npz", evaluation: str = "evaluation.npz"
) -> Path:
    """A recipe with all that it needs beside it."""
    (folder / "small_residual_network.py").write_text(NETWORK)
    write_images(folder / "calibration.npz", 20, seed=1)
    write_images(folder / "evaluation.npz", 24, seed=2)
    path = folder / "small.toml"
    path.write_text(RECIPE.format(calibration=calibration, evaluation=evaluation))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe; runs in it share a cache."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def setup(home: Path) -> preparation.Setup:
    return preparation.prepare(recipes.load(home / "small.toml"))


@pytest.fixture(scope="module")
def finished(home: Path, setup: preparation.Setup) -> Ran:
    """A run that nothing interrupted."""
    return take(setup, home / "finished")


@pytest.fixture
def copied(finished: Ran, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------- a run


def test_every_stage_leaves_its_result(finished: Ran) -> None:
    run = store.Run(finished.folder, None)
    ingested = run.stage_result("ingest", Ingested)
    pruned = run.stage_result("prune", Pruned)
    recovered = run.stage_result("recover", Recovered)
    exported = run.stage_result("export", Exported)
    final = run.stage_result("benchmark", Benchmarked)
    assert ingested is not None and pruned is not None and recovered is not None
    assert exported is not None and final is not None
    assert [block.name for block in ingested.graph.droppable] == ["blocks.0", "blocks.1"]
    assert ingested.graph.parameters - pruned.parameters == 2 * (2 * 16 * 16 * 9 + 2 * 2 * 16)
    assert recovered.weights_sha256 == recovered_sha256(finished.folder)
    assert [one.precision for one in exported.engines] == ["fp32", "int8"]
    assert all(one.parity is not None and one.parity.passed for one in exported.engines)
    assert [one.precision for one in final.results] == ["fp32", "int8"]
    assert final.results[0].latency.ratio_ci95 is not None
    assert final.results[0].latency.ratio_ci95[1] < 1
    assert ingested.quality == final.original_quality
    assert all(result.seconds > 0 for result in (ingested, pruned, recovered, exported, final))
    stages = [name for name, detail in finished.details("stage") if detail == "finished"]
    assert stages == list(store.STAGES)


def test_the_report_can_be_read_and_says_what_was_done(finished: Ran, setup: preparation.Setup) -> None:
    report = build.read(finished.folder)
    assert report == finished.report
    assert report.plan.drop_blocks == ("blocks.0", "blocks.1")
    assert (report.budget.met, report.warnings) == (True, ())
    assert (report.data.calibration_count, report.data.evaluation_count) == (20, 24)
    assert report.data.calibration_sha256 == setup.calibration.digest
    titles = [table.title for table in report.tables]
    assert titles[:2] == ["Blocks", "Predicted and measured saving"]
    assert [title.split(":")[0] for title in titles[2:]] == ["int8"] * 2
    assert [one.precision for one in report.precisions] == ["fp32", "int8"]
    assert report.precisions[0].latency == report.result.latency
    assert report.engines is not None
    assert report.engines.candidates >= report.engines.structures > 0
    assert [one.name for one in report.candidates if one.chosen] == ["without blocks.0 blocks.1"]
    assert all(one.ratio_ci95[0] <= one.ratio <= one.ratio_ci95[1] for one in report.candidates)
    assert report.original.quality.metric == "top1"
    assert (report.original.quality.count, report.original.quality.split) == (24, "evaluation")
    assert report.result.agreement is not None
    assert (finished.folder / "report.md").read_text().strip()


def test_the_report_scores_the_engines_on_the_evaluation_images(
    finished: Ran, setup: preparation.Setup
) -> None:
    labels = setup.evaluation.labels
    assert labels is not None
    original = tune.logits(setup.original, setup.evaluation).numpy()
    result = tune.logits(optpipe.load(finished.folder), setup.evaluation).numpy()
    expected = quality.score(result, labels.numpy(), original, "evaluation")
    assert finished.report.result.quality == expected
    assert finished.report.result.agreement == quality.agreement(result, original, "evaluation")
    for logits, network in ((original, finished.report.original), (result, finished.report.result)):
        wanted = uncertainty.reliability(uncertainty.probabilities(logits), labels.numpy())
        assert network.reliability is not None
        assert network.reliability.calibration.error == pytest.approx(wanted.calibration.error, abs=1e-4)
        assert network.reliability.selective == wanted.selective
        assert network.reliability.selective[0].accuracy == network.quality.value
    assert finished.report.precisions[0].reliability == finished.report.result.reliability
    assert finished.report.precisions[1].reliability is not None


def test_the_loaded_network_computes_what_the_engine_does(finished: Ran, setup: preparation.Setup) -> None:
    images = setup.evaluation.batch(slice(0, 24))
    with torch.no_grad():
        expected = optpipe.load(finished.folder)(images).numpy()
    engine = setup.backend.build(
        finished.folder / "deploy" / "model.onnx", setup.target, finished.folder / "deploy"
    )
    session = setup.backend.load(engine, setup.target)
    found = session.run(images.numpy())
    session.close()
    assert np.abs(found - expected).max() < 1e-4
    with torch.no_grad():
        assert np.abs(setup.original(images).numpy() - expected).max() > 1e-3


def test_an_engine_that_was_swapped_after_the_export_is_not_benchmarked(
    copied: Path, setup: preparation.Setup
) -> None:
    forget(copied, "benchmark")
    path = copied / "deploy" / "model.int8.onnx"
    path.write_bytes((copied / "deploy" / "model.onnx").read_bytes())
    assert deploy.verify(copied)[0].startswith("model.int8.onnx: sha256 is")
    again = take(setup, copied)
    told = "deploy/model.int8.onnx is lost or damaged: the stage is done again"
    assert ("export", told) in again.details("warning")
    assert deploy.verify(copied) == []


def test_a_precision_that_cannot_be_built_is_left_out_with_its_reason(
    copied: Path, finished: Ran, setup: preparation.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise RunError("no ranges today")

    forget(copied, "export", "benchmark")
    monkeypatch.setattr(precision, "convert", refuse)
    again = take(setup, copied)
    fp32, int8 = again.report.precisions
    assert (fp32.failed, int8.failed) == ("", "no ranges today")
    assert fp32.latency is not None and int8.latency is None
    assert "int8 is left out: no ranges today" in again.report.warnings
    assert "none: no ranges today" in (copied / "report.md").read_text()
    assert again.report.plan == finished.report.plan
    assert not (copied / "deploy" / "model.int8.onnx").exists()
    assert deploy.verify(copied) == []


def test_an_engine_that_computes_something_else_is_not_in_the_bundle(
    copied: Path, setup: preparation.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(copied, "export", "benchmark")
    monkeypatch.setitem(building.TOLERANCES, "int8", (0.0, 1e-9))
    again = take(setup, copied)
    assert "the engine differs from torch" in again.report.precisions[1].failed
    assert not (copied / "deploy" / "model.int8.onnx").exists()
    assert "model.int8.onnx" not in deploy.bundle.open_bundle(copied)[1].files
    assert (copied / "deploy" / "model.onnx").exists()
    assert deploy.verify(copied) == []


def test_the_bundle_verifies_until_a_file_of_it_changes(copied: Path) -> None:
    assert deploy.verify(copied) == []
    path = copied / "deploy" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    (problem,) = deploy.verify(copied)
    assert problem.startswith("model.safetensors: sha256 is")
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        optpipe.load(copied)


def test_the_manifest_says_what_the_bundle_was_made_of(finished: Ran, setup: preparation.Setup) -> None:
    _, manifest = deploy.bundle.open_bundle(finished.folder)
    recipe = hashlib.sha256((finished.folder / "recipe.toml").read_bytes()).hexdigest()
    fingerprint = setup.backend.fingerprint(setup.target)
    versions = manifest.origin.versions
    assert manifest.origin == deploy.Origin(fingerprint, recipe, 0, setup.calibration.names, versions)
    assert {"optpipe", "torch", "onnxruntime"} <= set(versions)
    assert len(set(manifest.origin.calibration_images)) == 20
    assert manifest.target == setup.target
    assert [entry.source for entry in manifest.engines] == ["model.onnx", "model.int8.onnx"]


@pytest.mark.slow  # int8 blocks save so little that a busy machine hides it
def test_with_int8_as_the_target_everything_is_timed_and_scored_in_int8(home: Path) -> None:
    quick = ["target.precision=int8", 'export.quantize.range_methods=["minmax"]']
    setup = preparation.prepare(recipes.load(home / "small.toml", quick))
    ran = take(setup, home / "int8")
    int8, fp32 = ran.report.precisions
    assert (int8.precision, fp32.precision) == ("int8", "fp32")
    assert int8.quality == ran.report.result.quality
    assert ran.report.budget.met
    labels = setup.evaluation.labels
    assert labels is not None
    original = scored(setup, home / "int8" / "01-ingest" / "model.int8.onnx")
    result = scored(setup, home / "int8" / "deploy" / "model.int8.onnx")
    assert np.abs(original - tune.logits(setup.original, setup.evaluation).numpy()).max() > 0
    assert ran.report.original.quality == quality.score(original, labels.numpy(), original, "evaluation")
    assert int8.quality == quality.score(result, labels.numpy(), original, "evaluation")
    assert int8.agreement == quality.agreement(result, original, "evaluation")


def scored(setup: preparation.Setup, path: Path) -> NDArray[np.float32]:
    """A file's logits of the evaluation images on an engine of the target's."""
    session = setup.backend.load(setup.backend.build(path, setup.target, path.parent), setup.target)
    logits = session.run(setup.evaluation.batch(slice(None)).numpy())
    session.close()
    return logits


def test_the_fastest_is_sought_once_and_a_resumed_run_keeps_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = {"backends": ["onnxruntime", "tensorrt"], "methods": ["practise"]}
    monkeypatch.setattr(plugins, "names", lambda room: rooms[room])
    overrides = ["target.backend=fastest", 'export.precisions=["fp32"]']
    setup = preparation.prepare(recipes.load(home / "small.toml", overrides))
    first = take(setup, home / "fastest")
    table = first.report.tables[0]
    assert [(row[0], row[-1]) for row in table.rows] == [
        ("onnxruntime", "chosen"),
        ("tensorrt", "does not run on cpu"),
    ]
    assert first.report.target.backend == "onnxruntime"
    assert not (home / "fastest" / "contest").exists()

    def again(*arguments: object, **named: object) -> None:
        raise AssertionError("a second contest")

    forget(home / "fastest", "benchmark")
    monkeypatch.setattr(contest, "hold", again)
    resumed = take(setup, home / "fastest")
    assert resumed.report.tables == first.report.tables
    path = home / "fastest" / "contest.json"
    held = store.from_json(contest.Contest, path.read_bytes())
    path.write_text(store.to_sealed(replace(held, chosen="openvino")))
    with pytest.raises(UsageError, match="was begun with openvino, which does not load here"):
        take(setup, home / "fastest")
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"contest\.json: is damaged or of another version"):
        take(setup, home / "fastest")


def test_a_report_written_again_elsewhere_says_where_it_was_measured(
    copied: Path, finished: Ran, setup: preparation.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = setup.backend.fingerprint(setup.target)
    monkeypatch.setattr(setup.backend, "fingerprint", lambda target: replace(here, device="elsewhere"))
    again = take(setup, copied)
    assert again.report.environment == finished.report.environment
    assert "elsewhere" in (copied / "environment.json").read_text()


def test_a_warning_names_the_engine_that_it_is_about(
    copied: Path, setup: preparation.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = DeviceState(1200, 3201, 88, throttle=("thermal",))
    monkeypatch.setattr("optpipe.backends.onnxruntime._CpuSession.state", lambda session: hot)
    forget(copied, "benchmark")
    warnings = take(setup, copied).report.warnings
    assert [warning.partition(": the GPU was throttled")[0] for warning in warnings] == [
        "the original at fp32",
        "the result at fp32",
        "the result at int8",
    ]


def test_events_are_kept_as_they_were_told(finished: Ran) -> None:
    lines = [json.loads(line) for line in (finished.folder / "events.jsonl").read_text().splitlines()]
    kept = [(line["kind"], line["name"], line.get("detail", "")) for line in lines]
    assert kept[: len(finished.events)] == [(e.kind, e.name, e.detail) for e in finished.events]


def test_a_finished_run_given_again_computes_nothing(
    copied: Path, finished: Ran, setup: preparation.Setup
) -> None:
    again = take(setup, copied)
    assert again.report == finished.report
    assert again.details("stage") == [(stage, "reused") for stage in store.STAGES]
    assert again.details("trial") == again.details("progress") == []


def test_another_run_of_the_recipe_gives_the_same_weights_from_the_cached_trials(
    home: Path, finished: Ran, setup: preparation.Setup
) -> None:
    other = take(setup, home / "other")
    assert {detail for _, detail in other.details("trial")} == {"cached"}
    assert len(other.details("trial")) == len(finished.details("trial"))
    assert other.report.plan == finished.report.plan
    assert recovered_sha256(other.folder) == recovered_sha256(finished.folder)


def test_a_recipe_that_was_changed_does_not_go_on_in_the_same_folder(copied: Path, home: Path) -> None:
    changed = preparation.prepare(recipes.load(home / "small.toml", ["recover.steps=11"]))
    with pytest.raises(
        UsageError, match=r"holds another run \(it differs in recover.steps: 10 there, 11 here"
    ):
        take(changed, copied)


def test_the_gates_limits_may_change_for_a_finished_run(copied: Path, home: Path, finished: Ran) -> None:
    assert limits.read(copied) == Limits()
    limited = preparation.prepare(recipes.load(home / "small.toml", ["gate.min_latency_reduction=5"]))
    assert take(limited, copied).report == finished.report
    assert limits.read(copied) == Limits(min_latency_reduction=5.0)


# ---------------------------------------------------------------- interrupted


# Where each stage is interrupted: a function called in its midst, and how many calls go well before.
INTERRUPTS: dict[str, tuple[object, str, int]] = {
    "ingest": (onnx_export, "parity", 0),
    "analyze": (timing, "paired", 1),
    "prune": (tune, "logits", 0),
    "recover": (store.DiskCheckpoint, "save", 2),
    "export": (deploy, "write_bundle", 0),
    "benchmark": (engines, "reference", 0),
}


@pytest.mark.slow
def test_a_run_interrupted_in_every_stage_ends_as_one_that_was_not(
    tmp_path: Path, finished: Ran, setup: preparation.Setup
) -> None:
    folder = tmp_path / "run"
    for number, stage in enumerate(store.STAGES):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, *INTERRUPTS[stage])
            with pytest.raises(KeyboardInterrupt):
                take(setup, folder)
        done = [path.parent.name[3:] for path in sorted(folder.glob("*/result.json"))]
        assert done == list(store.STAGES[:number])
    last = take(setup, folder)
    assert last.details("stage")[:5] == [(stage, "reused") for stage in store.STAGES[:5]]
    assert recovered_sha256(folder) == recovered_sha256(finished.folder)
    assert last.report.plan == finished.report.plan
    assert last.report.sha256 == finished.report.sha256
    assert deploy.verify(folder) == []


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=() if stage in {"analyze", "recover"} else pytest.mark.slow)
        for stage in store.STAGES
    ],
)
def test_a_run_interrupted_in_one_stage_goes_on_in_it(
    copied: Path, finished: Ran, setup: preparation.Setup, stage: str
) -> None:
    number = store.STAGES.index(stage)
    forget(copied, *store.STAGES[number:])
    for path in copied.glob("04-recover/checkpoint-*"):
        path.unlink()
    if stage == "analyze":
        shutil.rmtree(copied / "engines")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, *INTERRUPTS[stage])
        with pytest.raises(KeyboardInterrupt):
            take(setup, copied)
    again = take(setup, copied)
    details = [detail for _, detail in again.details("stage") if detail != "started"]
    assert details == ["reused"] * number + ["finished"] * (6 - number)
    assert recovered_sha256(copied) == recovered_sha256(finished.folder)
    assert again.report.plan == finished.report.plan
    # Of the two engines the first was timed before the interruption: it serves both blocks and a prefix.
    computed = [name for name, detail in again.details("trial") if detail == "computed"]
    assert computed == (["without blocks.0 blocks.1"] if stage == "analyze" else [])


def test_training_goes_on_from_its_checkpoint(copied: Path, finished: Ran, setup: preparation.Setup) -> None:
    forget(copied, "recover", "export", "benchmark")
    (checkpoint,) = copied.glob("04-recover/checkpoint-*")
    views: list[int] = []

    def counted(count: int, batch: int, seed: int, step: int) -> list[int]:
        views.append(step)
        return batch_indices(count, batch, seed, step)

    batch_indices = tune.batch_indices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "batch_indices", counted)
        take(setup, copied)
    assert checkpoint.exists()
    assert views == [9]
    assert recovered_sha256(copied) == recovered_sha256(finished.folder)


@pytest.mark.slow
def test_a_run_killed_while_it_trains_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("steps = 10", "steps = 2000"))
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "optpipe.cli", "run", str(recipe), "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            if list(folder.glob("04-recover/checkpoint-*.safetensors")) or process.poll() is not None:
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(folder.glob("04-recover/checkpoint-*.safetensors"))
    assert not (folder / "04-recover" / "result.json").exists()
    before = (folder / "events.jsonl").read_text().splitlines()

    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    later = lines[len(before) :]
    trials = [line for line in lines if line["kind"] == "trial" and line["detail"] == "computed"]
    computed = [line["fields"]["key"] for line in trials]
    assert len(computed) == len(set(computed)) == 4
    assert not any(line["kind"] == "trial" for line in later)
    steps = [line["done"] for line in later if line["kind"] == "progress" and line["name"] == "training"]
    assert steps[0] > 1
    assert steps[-1] == 2000

    uninterrupted = take(preparation.prepare(recipes.load(recipe)), tmp_path / "whole")
    assert recovered_sha256(uninterrupted.folder) == recovered_sha256(folder)


def test_a_baseline_that_moved_begins_a_new_epoch_of_latencies(
    copied: Path, setup: preparation.Setup
) -> None:
    forget(copied, *store.STAGES[1:])
    timings = replace(setup.recipe.timing, drift=1e-9)
    moved = replace(setup, recipe=replace(setup.recipe, timing=timings))
    frozen = copied / "recipe.toml"
    frozen.write_text(moved.frozen)
    again = take(moved, copied)
    (warning,) = again.details("warning")
    assert warning[0] == "baseline"
    assert "latencies are taken afresh" in warning[1]
    renewed = store.Run(copied, None).stage_result("ingest", Ingested)
    assert renewed is not None
    assert renewed.epoch == 1
    timed = [name for name, detail in again.details("trial") if detail == "computed"]
    assert "without blocks.0" in timed
    # Two structures were timed in each epoch: without one block, without both.
    assert len(list((copied / "engines").glob("*/latency.json"))) == 4


def test_a_baseline_that_stayed_keeps_its_latencies(copied: Path, setup: preparation.Setup) -> None:
    forget(copied, *store.STAGES[1:])
    again = take(setup, copied)
    assert {detail for _, detail in again.details("trial")} == {"reused"}
    assert [name for name, detail in again.details("note") if "latencies stay" in detail] == ["baseline"]
    assert again.details("warning") == []


# ---------------------------------------------------------------- damaged


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("03-prune/weights.safetensors", "prune"),
        ("04-recover/weights.safetensors", "recover"),
        ("deploy/model.safetensors", "export"),
        ("deploy/manifest.json", "export"),
        ("deploy/plan.json", "export"),
    ],
)
def test_a_stage_whose_file_was_damaged_is_done_again(
    copied: Path, finished: Ran, setup: preparation.Setup, name: str, stage: str
) -> None:
    flip(copied / name)
    again = take(setup, copied)
    assert again.details("warning")[0] == (stage, f"{name} is lost or damaged: the stage is done again")
    done = dict(again.details("stage"))
    assert [name for name, detail in done.items() if detail == "finished"] == [stage]
    assert replace(again.report, stages=finished.report.stages) == finished.report
    assert deploy.verify(copied) == []


def test_later_stages_are_done_again_for_another_choice(
    copied: Path, finished: Ran, setup: preparation.Setup
) -> None:
    analyzed = store.Run(copied, None).stage_result("analyze", Analyzed)
    assert analyzed is not None
    other = replace(analyzed.choice, plan=Plan(drop_blocks=("blocks.1",)))
    store.Run(copied, None).finish_stage("analyze", replace(analyzed, choice=other))
    again = take(setup, copied)
    done = [name for name, detail in again.details("stage") if detail == "finished"]
    assert done == ["prune", "recover", "export", "benchmark"]
    assert again.report.plan == other.plan
    assert again.report.result.parameters > finished.report.result.parameters


def test_damaged_logits_of_the_original_are_taken_again(
    copied: Path, finished: Ran, setup: preparation.Setup
) -> None:
    whole = (copied / "01-ingest" / "logits.npy").read_bytes()
    flip(copied / "01-ingest" / "logits.npy")
    forget(copied, "benchmark")
    again = take(setup, copied)
    assert ("ingest", "logits.npy is lost or damaged: the original is scored again") in again.details(
        "warning"
    )
    assert (copied / "01-ingest" / "logits.npy").read_bytes() == whole
    assert again.report.result.quality == finished.report.result.quality


def test_a_damaged_engine_of_the_original_is_built_again(copied: Path, setup: preparation.Setup) -> None:
    whole = (copied / "01-ingest" / "model.onnx").read_bytes()
    flip(copied / "01-ingest" / "model.onnx")
    forget(copied, "benchmark")
    take(setup, copied)
    assert (copied / "01-ingest" / "model.onnx").read_bytes() == whole


def test_a_lost_ingest_is_what_it_was_or_of_the_latest_epoch(copied: Path, setup: preparation.Setup) -> None:
    run = store.Run(copied, None)
    before = run.stage_result("ingest", Ingested)
    assert before is not None
    forget(copied, "ingest")
    take(setup, copied)
    left = run.stage_result("ingest", Ingested)
    assert left is not None
    assert replace(left, seconds=before.seconds) == before
    for path in (copied / "engines").glob("*/latency.json"):
        record = store.read_answer(path, EngineRecord)
        assert record is not None
        files.write_atomically(path, store.to_sealed(replace(record, epoch=3)))
    forget(copied, "ingest")
    (copied / "01-ingest" / "lent.json").unlink()
    take(setup, copied)
    anew = run.stage_result("ingest", Ingested)
    assert anew is not None
    assert anew.epoch == 3


def test_inputs_that_cannot_be_told_are_refused(copied: Path, setup: preparation.Setup) -> None:
    flip(copied / "inputs.json")
    with pytest.raises(UsageError, match=r"inputs.json: is damaged, and what the run was begun with"):
        take(setup, copied)


def test_what_a_killed_process_left_of_an_engine_goes(copied: Path, setup: preparation.Setup) -> None:
    forget(copied, *store.STAGES[1:])
    (copied / "engines" / "baseline").mkdir()
    for folder in (copied / "engines").iterdir():
        (folder / "model.onnx").write_bytes(b"left")
    take(setup, copied)
    assert not list((copied / "engines").rglob("model.onnx"))
    assert not (copied / "engines" / "baseline").exists()


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("stage", ["recover", "benchmark"])
def test_a_full_disk_leaves_the_stages_before_it_intact(
    copied: Path, setup: preparation.Setup, finished: Ran, stage: str
) -> None:
    number = store.STAGES.index(stage)
    forget(copied, *store.STAGES[number:])
    before = {path: path.read_bytes() for path in copied.glob("*/result.json")}
    replacing = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target == copied / f"{number + 1:02d}-{stage}" / "result.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replacing(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(RunError, match=r"result.json: the disk is full; free some space and run again"):
            take(setup, copied)
    assert {path: path.read_bytes() for path in copied.glob("*/result.json")} == before
    assert not list(copied.rglob(".*.tmp"))
    again = take(setup, copied)
    assert again.details("stage")[:number] == [(name, "reused") for name in store.STAGES[:number]]
    assert recovered_sha256(copied) == recovered_sha256(finished.folder)


def test_a_failure_is_recorded_beside_its_stage_until_it_goes_well(
    copied: Path, setup: preparation.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(copied, "benchmark")

    def refuse(*_: object, **__: object) -> None:
        raise RunError("the engine went away")

    with monkeypatch.context() as patch:
        patch.setattr(timing, "paired", refuse)
        with pytest.raises(RunError, match="went away"):
            take(setup, copied)
    failure = json.loads((copied / "06-benchmark" / "failure.json").read_text())
    assert (failure["error"], failure["message"]) == ("RunError", "the engine went away")
    take(setup, copied)
    assert not (copied / "06-benchmark" / "failure.json").exists()


# ---------------------------------------------------------------- the images


def prepare_with(tmp_path: Path, **sources: str) -> preparation.Setup:
    return preparation.prepare(recipes.load(write_recipe(tmp_path, **sources)))


def test_evaluation_images_that_are_also_calibration_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\[data\]: 20 evaluation images are also calibration images"):
        prepare_with(tmp_path, evaluation="calibration.npz")


def test_a_method_that_needs_labels_refuses_images_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {name: getattr(practise, name) for name in ("Config", "RECOVER", "check", "search")}
    method = SimpleNamespace(**parts, NEEDS_LABELS=True)
    monkeypatch.setattr(plugins, "method", lambda name: method)
    with pytest.raises(
        UsageError,
        match=r"name = 'practise': needs labelled calibration images, and calibration.npz has no labels",
    ):
        prepare_with(tmp_path)


def test_without_labels_the_metric_is_agreement_with_the_original(
    copied: Path, setup: preparation.Setup
) -> None:
    forget(copied, "ingest", "prune", "benchmark")
    (copied / "inputs.json").unlink()
    unlabelled = replace(setup, evaluation=replace(setup.evaluation, labels=None))
    report = take(unlabelled, copied).report
    assert (report.original.quality.metric, report.original.quality.value) == ("agreement", 1.0)
    assert report.quality_before_recovery.metric == "agreement"
    assert report.original.reliability is None and report.result.reliability is None
    assert report.result.quality == report.result.agreement


def test_a_run_is_not_resumed_with_other_images_under_the_same_name(
    copied: Path, setup: preparation.Setup
) -> None:
    other = replace(setup, calibration=replace(setup.calibration, digest="0" * 64), model_digest="1" * 64)
    with pytest.raises(
        UsageError, match="was begun with other model and calibration data under the same name"
    ):
        take(other, copied)


def write_folder(folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")


def test_an_image_that_cannot_be_read_is_left_out_with_a_warning(
    tmp_path: Path, copied: Path, setup: preparation.Setup
) -> None:
    write_folder(tmp_path / "pictures", 12, seed=3)
    (tmp_path / "pictures" / "05.png").write_bytes(b"no picture")
    spec = data.DataSpec("pictures", labels=False)
    images = data.load_images(spec, setup.recipe.data.preprocess, 3, tmp_path)
    assert len(images) == 11
    forget(copied, "ingest", "prune", "benchmark")
    (copied / "inputs.json").unlink()
    ran = take(replace(setup, evaluation=images), copied)
    (warning,) = ran.report.warnings
    assert warning.startswith("1 of 12 evaluation images cannot be read and are left out: ")
    assert warning.endswith("05.png")
    assert ran.details("warning") == [("run", warning)]
    assert f"Warning: {warning}." in (copied / "report.md").read_text()
    assert ran.report.data.evaluation_count == 11


def test_options_of_any_plain_type_reach_the_backend_as_words(home: Path) -> None:
    given = recipes.load(home / "small.toml", ["target.backend=openvino", 'target.options.int8_rest="bf16"'])
    assert preparation.prepare(given).target.options == (("int8_rest", "bf16"),)
    for value, word in (("5", "5"), ("false", "false")):
        odd = recipes.load(home / "small.toml", ["target.backend=openvino", f"target.options.level={value}"])
        with pytest.raises(UsageError, match=f"target.options.level = '{word}'"):
            preparation.prepare(odd)


def test_results_are_held_against_the_engine_that_the_original_was_scored_on(
    copied: Path, setup: preparation.Setup
) -> None:
    forget(copied, "benchmark")
    path = copied / "01-ingest" / "model.onnx"
    written = path.stat().st_mtime_ns
    take(setup, copied)
    assert path.stat().st_mtime_ns == written
    original = store.file_sha256(path)
    forget(copied, "benchmark")
    path.write_bytes((copied / "deploy" / "model.onnx").read_bytes())
    take(setup, copied)
    assert store.file_sha256(path) == original, "another engine is not used, but built again"


def test_a_gpu_that_torch_cannot_use_is_told_for_the_training_takes_longer(setup: preparation.Setup) -> None:
    assert known_beforehand(setup) == ()
    on_gpu = replace(setup.bench, target=replace(setup.target, device="cuda"))
    (warning,) = known_beforehand(replace(setup, benches=(on_gpu,)))
    assert warning.startswith("torch cannot use the GPU: recovery trains on the CPU")
