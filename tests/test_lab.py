"""The laboratory with a real small network and real engines: what it does once, and what it reuses."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optpipe import building, data, graph, lab, models, precision, store, tune
from optpipe.backends import onnxruntime
from optpipe.data import ImageSet
from optpipe.errors import RunError
from optpipe.types import (
    Answer,
    Ask,
    Choice,
    DeviceState,
    Engine,
    Event,
    Fingerprint,
    Plan,
    Precision,
    Request,
    Search,
    Session,
    Step,
    StepResult,
    Target,
    Train,
    Trained,
    Trial,
    Tune,
)

SHAPE = (3, 8, 8)
TARGET = Target("onnxruntime", 4, SHAPE, threads=1)
FIRST, SECOND, OTHER = (Plan(drop_blocks=(name,)) for name in ("same.0", "same.1", "wide"))
MIMIC = Tune(steps=30, batch=8, lr=0.1, trainable="adaptors", batch_norm="eval", augment="none")


class Block(nn.Module):
    def __init__(self, inside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, inside, 3, padding=1)
        self.conv2 = nn.Conv2d(inside, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv2(F.relu(self.conv1(x)))
        return F.relu(x + y)


class Net(nn.Module):
    """Two blocks of equal structure and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.same = nn.Sequential(Block(8), Block(8))
        self.wide = Block(16)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(self.same(F.relu(self.stem(x))))
        logits: torch.Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


@dataclass
class CountingBackend:
    """ONNX Runtime, counting the engines that are built and open."""

    built: int = 0
    open: int = 0
    SOURCE: Literal["onnx", "program"] = "onnx"
    CACHES_BUILDS: bool = False
    INT8_REST: Literal["fp32", "fp16"] = "fp32"

    def precisions(self, device: str) -> tuple[Precision, ...]:
        return onnxruntime.precisions(device)

    def missing(self, target: Target) -> str | None:
        return onnxruntime.missing(target)

    def fingerprint(self, target: Target) -> Fingerprint:
        return onnxruntime.fingerprint(target)

    def build(self, source: Path, target: Target, folder: Path) -> Engine:
        self.built += 1
        return onnxruntime.build(source, target, folder)

    def load(self, engine: Engine, target: Target) -> Session:
        self.open += 1
        session = onnxruntime.load(engine, target)
        close = session.close

        def counted() -> None:
            self.open -= 1
            close()

        session.close = counted  # type: ignore[method-assign]
        return session


@dataclass
class Bench:
    """A laboratory, its backend and the events that it told."""

    lab: lab.Lab
    backend: CountingBackend
    events: list[Event] = field(default_factory=list)

    def ask(self, *requests: Request) -> list[Answer]:
        return self.lab.answer(requests)

    def trained(self, request: Train) -> Trained:
        (answer,) = self.ask(request)
        assert isinstance(answer, Trained)
        return answer

    def trial(self, plan: Plan) -> Trial:
        (answer,) = self.ask(Ask(plan))
        assert isinstance(answer, Trial)
        return answer

    @property
    def origins(self) -> list[str]:
        return [event.detail for event in self.events if event.kind == "trial"]


@pytest.fixture(scope="module")
def subject() -> lab.Subject:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = graph.trace(Net().eval(), SHAPE)
    pixels = torch.randint(0, 256, (16, *SHAPE), generator=torch.Generator().manual_seed(1))
    names = tuple(str(number) for number in range(16))
    labels = torch.arange(16) % 4
    images = ImageSet(pixels.byte(), labels, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)
    return lab.Subject(original, models.weights_digest(original), images, seed=0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that share one cache."""
    return tmp_path_factory.mktemp("runs")


def open_bench(run: store.Run, subject: lab.Subject, epoch: int = 0, *, caches_builds: bool = False) -> Bench:
    events: list[Event] = []
    backend = CountingBackend(CACHES_BUILDS=caches_builds)
    workbench = building.Workbench(backend, TARGET, subject.calibration, precision.Settings(), subject.seed)
    clock = lab.Clock(tolerance=0.5, budget_s=0.05)
    laboratory = lab.Lab(run, subject, workbench, clock, epoch, events.append, checkpoint_every=2)
    return Bench(laboratory, backend, events)


@pytest.fixture(scope="module")
def first(shared: Path, subject: lab.Subject) -> Iterator[tuple[Bench, list[Trial]]]:
    """A laboratory that was asked for each plan."""
    bench = open_bench(store.Run(shared / "first", shared / "cache"), subject)
    trials = [bench.trial(plan) for plan in (FIRST, SECOND, OTHER)]
    yield bench, trials
    bench.lab.close()


def resume(shared: Path, subject: lab.Subject, epoch: int = 0) -> Bench:
    return open_bench(store.Run(shared / "first", shared / "cache"), subject, epoch)


def test_a_trial_says_how_large_and_how_fast_a_candidate_is(
    first: tuple[Bench, list[Trial]], subject: lab.Subject
) -> None:
    _, (trial, _, other) = first
    whole = graph.count(subject.original, SHAPE)
    block = 2 * (8 * 8 * 9 + 8)
    assert (trial.parameters, trial.macs) == (whole[0] - block, whole[1] - 2 * 8 * 8 * 9 * 64)
    assert other.parameters == whole[0] - (2 * 8 * 16 * 9 + 16 + 8)
    assert trial.latency is not None
    assert trial.latency.ratio_to_original is not None
    assert trial.latency.ratio_ci95 is not None
    assert trial.latency.ratio_ci95[0] <= trial.latency.ratio_to_original <= trial.latency.ratio_ci95[1]
    assert trial.latency.samples >= 40
    assert (trial.quality, trial.distance) == (None, None)


def test_every_plan_that_was_timed_is_a_candidate_with_its_quality_where_that_is_known(
    shared: Path, tmp_path: Path, subject: lab.Subject
) -> None:
    bench = open_bench(store.Run(tmp_path, shared / "cache"), subject)
    bench.ask(Ask(FIRST), Ask(OTHER), Ask(FIRST), Ask(SECOND, ("distance",)))
    trained = bench.trained(Train(OTHER, Tune(steps=1, batch=8, loss="labels"), score=(0, 1, 2, 3)))
    bench.lab.close()
    one, other = bench.lab.candidates(OTHER)
    assert (one.chosen, other.chosen) == (False, True)
    assert one.ratio_ci95[0] <= one.ratio <= one.ratio_ci95[1]
    assert one.quality is None
    assert trained.quality is not None
    assert other.quality == trained.quality


def test_equal_structures_are_built_and_timed_once(first: tuple[Bench, list[Trial]], shared: Path) -> None:
    bench, (one, same, other) = first
    assert one.key != same.key
    assert one.latency == same.latency
    assert one.latency != other.latency
    # The baseline and two structures.
    assert bench.backend.built == 3
    assert len(list((shared / "first" / "engines").glob("*/latency.json"))) == 2
    assert [event.name for event in bench.events if event.kind == "note"] == ["engine"] * 3


def test_the_count_of_engines_says_which_answers_took_no_build(
    first: tuple[Bench, list[Trial]], shared: Path, subject: lab.Subject
) -> None:
    count = first[0].lab.engines
    assert (count.candidates, count.structures, count.cached) == (3, 2, 0)
    assert len(count.builds_s) == 2
    assert (count.first_build_s, count.second_build_s) == (None, None)
    again = resume(shared, subject)
    assert [again.trial(plan) for plan in (FIRST, SECOND, OTHER)] == first[1]
    assert again.lab.engines == count
    other = open_bench(store.Run(shared / "count", shared / "cache"), subject)
    other.trial(FIRST)
    assert (other.lab.engines.structures, other.lab.engines.cached) == (1, 1)
    assert other.lab.engines.builds_s == ()  # another run built it


def test_a_backend_that_caches_builds_shows_once_what_the_second_takes(
    tmp_path: Path, subject: lab.Subject
) -> None:
    bench = open_bench(store.Run(tmp_path, None), subject, caches_builds=True)
    bench.trial(FIRST)
    bench.trial(OTHER)
    bench.lab.close()
    assert bench.backend.built == 4  # the baseline, the first candidate twice, the second once
    count = bench.lab.engines
    assert count.first_build_s == count.builds_s[0]
    assert count.second_build_s is not None
    assert not (tmp_path / "engines" / "baseline").exists()


def test_what_another_run_built_twice_is_built_twice_again(tmp_path: Path, subject: lab.Subject) -> None:
    before = open_bench(store.Run(tmp_path / "one", tmp_path / "cache"), subject, caches_builds=True)
    before.trial(FIRST)
    before.lab.close()
    bench = open_bench(store.Run(tmp_path / "two", tmp_path / "cache"), subject, caches_builds=True)
    bench.trial(FIRST)
    assert (bench.lab.engines.cached, bench.lab.engines.second_build_s) == (1, None)
    bench.trial(OTHER)
    bench.lab.close()
    assert bench.lab.engines.first_build_s == bench.lab.engines.builds_s[0]
    assert bench.lab.engines.second_build_s is not None


def test_a_measurement_that_may_mislead_is_told(
    tmp_path: Path, subject: lab.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = DeviceState(1200, 3201, 88, throttle=("thermal",))
    monkeypatch.setattr("optpipe.backends.onnxruntime._CpuSession.state", lambda session: hot)
    bench = open_bench(store.Run(tmp_path, None), subject)
    trial = bench.trial(FIRST)
    bench.lab.close()
    (warning,) = (event for event in bench.events if event.kind == "warning")
    assert "throttled (thermal" in warning.detail
    assert trial.latency is not None
    assert trial.latency.warnings == (warning.detail,)


def test_raw_samples_are_kept_beside_a_latency(first: tuple[Bench, list[Trial]], shared: Path) -> None:
    folders = [path.parent for path in (shared / "first" / "engines").glob("*/latency.json")]
    samples = [np.load(folder / "samples.npy") for folder in folders]
    assert all(array.shape[1:] == (2,) and (array > 0).all() for array in samples)
    medians = {float(np.median(array[:, 1])) for array in samples}
    assert medians == {trial.latency.median_ms for trial in first[1] if trial.latency is not None}


def test_a_resumed_run_reuses_every_answer(
    first: tuple[Bench, list[Trial]], shared: Path, subject: lab.Subject
) -> None:
    again = resume(shared, subject)
    assert [again.trial(plan) for plan in (FIRST, SECOND, OTHER)] == first[1]
    assert again.origins == ["reused"] * 3
    assert again.backend.built == 0


def test_another_run_takes_answers_from_the_cache(
    first: tuple[Bench, list[Trial]], shared: Path, subject: lab.Subject
) -> None:
    other = open_bench(store.Run(shared / "other", shared / "cache"), subject)
    assert [other.trial(plan) for plan in (FIRST, OTHER)] == [first[1][0], first[1][2]]
    assert other.origins == ["cached"] * 2
    assert other.backend.built == 0


def test_other_weights_are_another_trial_on_the_same_engine(
    first: tuple[Bench, list[Trial]], shared: Path, subject: lab.Subject
) -> None:
    bench = open_bench(store.Run(shared / "first", None), replace(subject, model_digest="e" * 64))
    trial = bench.trial(FIRST)
    assert trial.key != first[1][0].key
    assert trial.latency == first[1][0].latency
    assert bench.backend.built == 0


def test_another_epoch_is_timed_anew_and_closes_its_engines(
    first: tuple[Bench, list[Trial]], shared: Path, subject: lab.Subject
) -> None:
    later = resume(shared, subject, epoch=1)
    trial = later.trial(FIRST)
    assert later.backend.open == 1  # the baseline, for the next candidate
    later.lab.close()
    assert later.backend.open == 0
    assert later.origins == ["computed"]
    assert later.backend.built == 2
    assert trial.latency != first[1][0].latency
    assert trial.key == first[1][0].key


def test_a_step_is_computed_once(shared: Path, tmp_path: Path, subject: lab.Subject) -> None:
    calls: Counter[str] = Counter()

    def step(name: str, depends: str) -> Step:
        def work() -> tuple[float, ...]:
            calls[name + depends] += 1
            return (0.1, 1 / 3)

        return Step(name, depends, work)

    for number, origin in ((1, "computed"), (2, "reused")):
        bench = open_bench(store.Run(tmp_path / "run", tmp_path / "cache"), subject)
        (answer,) = bench.ask(step("scores", "version 1"))
        assert isinstance(answer, StepResult)
        assert (answer.name, answer.values) == ("scores", (0.1, 1 / 3)), number
        assert bench.origins == [origin]
    other = open_bench(store.Run(tmp_path / "other", tmp_path / "cache"), subject)
    other.ask(step("scores", "version 1"), step("scores", "version 2"))
    assert other.origins == ["cached", "computed"]
    assert calls == {"scoresversion 1": 1, "scoresversion 2": 1}


@pytest.mark.parametrize("part", ["seed", "weights", "images"])
def test_a_step_depends_on_seed_weights_and_images(tmp_path: Path, subject: lab.Subject, part: str) -> None:
    changed = {
        "seed": replace(subject, seed=1),
        "weights": replace(subject, model_digest="e" * 64),
        "images": replace(subject, calibration=replace(subject.calibration, digest="c" * 64)),
    }
    run = store.Run(tmp_path / "run", None)
    step = Step("scores", "1", lambda: (1.0,))
    open_bench(run, subject).ask(step)
    bench = open_bench(run, changed[part])
    bench.ask(step)
    assert bench.origins == ["computed"]


def test_tuning_brings_a_candidate_nearer_and_leaves_its_weights(
    tmp_path: Path, subject: lab.Subject
) -> None:
    bench = open_bench(store.Run(tmp_path / "run", None), subject)
    plain, tuned = bench.ask(
        Ask(SECOND, wants=("distance", "quality")), Ask(SECOND, wants=("distance", "quality"), tune=MIMIC)
    )
    assert isinstance(plain, Trial)
    assert isinstance(tuned, Trial)
    candidate = graph.apply(subject.original, SECOND, SHAPE)
    assert plain.distance == tune.distance(candidate, subject.original, subject.calibration)
    assert tuned.distance is not None
    assert plain.distance is not None
    assert 0 < tuned.distance < 0.9 * plain.distance
    assert tuned.quality is not None
    assert (tuned.quality.metric, tuned.quality.count, tuned.quality.split) == ("top1", 16, "calibration")
    assert bench.backend.built == 0

    # The adaptors were folded away: the weights fit the plain candidate and give the distance that was told.
    from safetensors.torch import load_file

    candidate.load_state_dict(load_file(tmp_path / "run" / "trials" / tuned.key / "weights.safetensors"))
    assert tune.distance(candidate, subject.original, subject.calibration) == tuned.distance


def test_a_trial_that_was_trained_and_not_stored_is_not_trained_again(
    tmp_path: Path, subject: lab.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Ask(SECOND, wants=("distance",), tune=MIMIC)
    (first,) = open_bench(store.Run(tmp_path / "run", None), subject).ask(asked)
    assert isinstance(first, Trial)
    (
        tmp_path / "run" / "trials" / first.key / "trial.json"
    ).unlink()  # as a process that was killed leaves it
    monkeypatch.delattr(tune, "train")
    (second,) = open_bench(store.Run(tmp_path / "run", None), subject).ask(asked)
    assert isinstance(second, Trial)
    assert second.distance == first.distance


LEARN = Tune(steps=5, batch=4, lr=0.05, loss="labels", trainable="all", augment="none")
SOME = (1, 4, 6, 7, 10, 11, 13, 0)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_candidate_whose_features_are_no_numbers_is_no_answer(
    subject: lab.Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench(store.Run(tmp_path / "run", None), subject)
    monkeypatch.setattr(tune, "distance", lambda *given: float("nan"))
    with pytest.raises(RunError, match=r"features are no numbers \(nan\): its training diverged"):
        bench.ask(Ask(SECOND, wants=("distance",)))
    assert not list((tmp_path / "run").glob("trials/*/trial.json"))


def test_a_candidate_is_trained_on_the_images_that_are_named(tmp_path: Path, subject: lab.Subject) -> None:
    bench = open_bench(store.Run(tmp_path, None), subject)
    answer = bench.trained(Train(FIRST, LEARN, SOME))
    expected = graph.apply(subject.original, FIRST, SHAPE)
    untrained = graph.apply(subject.original, FIRST, SHAPE)
    tune.train(expected, None, data.part(subject.calibration, SOME), LEARN, seed=subject.seed)
    assert same_weights(answer.network, expected)
    assert not same_weights(answer.network, untrained)
    assert not answer.network.training
    # All images, other images and another plan are other trainings.
    others = [bench.trained(Train(*of)) for of in ((FIRST, LEARN), (FIRST, LEARN, SOME[1:]), (Plan(), LEARN))]
    assert len({answer.key, *(other.key for other in others)}) == 4
    assert len({answer.digest, *(other.digest for other in others)}) == 4
    assert bench.origins == ["computed"] * 4
    assert bench.backend.built == 0


def test_what_was_trained_is_taken_from_the_run_and_known_by_its_weights(
    tmp_path: Path, subject: lab.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.Run(tmp_path / "run", tmp_path / "cache")
    answer = open_bench(run, subject).trained(Train(FIRST, LEARN, SOME))
    assert answer.digest == store.file_sha256(run.weights(answer.key))
    assert [path.name for path in run.trial_folder(answer.key).iterdir()] == ["weights.safetensors"]
    monkeypatch.delattr(tune, "train")
    again = open_bench(run, subject)
    resumed = again.trained(Train(FIRST, LEARN, SOME))
    assert again.origins == ["reused"]
    assert (resumed.key, resumed.digest) == (answer.key, answer.digest)
    assert same_weights(resumed.network, answer.network)
    assert not resumed.network.training


def test_another_run_of_the_sweep_has_what_was_trained_and_keeps_it(
    tmp_path: Path, subject: lab.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, *, lends: bool = True) -> store.Run:
        return store.Run(tmp_path / name, tmp_path / "cache", lends=lends)

    answer = open_bench(run("first"), subject).trained(Train(FIRST, LEARN, SOME))
    apart = open_bench(run("apart", lends=False), subject)
    apart.trained(Train(FIRST, LEARN, SOME))
    assert apart.origins == ["computed"], "other runs train themselves"
    monkeypatch.delattr(tune, "train")
    second = open_bench(run("second"), subject)
    taken = second.trained(Train(FIRST, LEARN, SOME))
    assert second.origins == ["cached"]
    assert (taken.key, taken.digest) == (answer.key, answer.digest)
    shutil.rmtree(tmp_path / "cache")
    again = open_bench(run("second"), subject)
    assert again.trained(Train(FIRST, LEARN, SOME)).digest == answer.digest
    assert again.origins == ["reused"]


@pytest.mark.parametrize("teachers", ["none", "single"])
def test_a_training_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path,
    subject: lab.Subject,
    monkeypatch: pytest.MonkeyPatch,
    teachers: Literal["none", "single"],
) -> None:
    request = Train(FIRST, replace(LEARN, teachers=teachers), SOME)
    whole = open_bench(store.Run(tmp_path / "whole", None), subject).trained(request)
    run = store.Run(tmp_path / "run", None)
    save = store.DiskCheckpoint.save

    def stopped(checkpoint: store.DiskCheckpoint, state: dict[str, torch.Tensor]) -> None:
        save(checkpoint, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.DiskCheckpoint, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            open_bench(run, subject).trained(request)
    folder = run.trial_folder(whole.key)
    assert [path.name for path in folder.iterdir()] == ["checkpoint.safetensors"]
    bench = open_bench(run, subject)
    assert bench.trained(request).digest == whole.digest
    assert bench.origins == ["computed"]
    assert [path.name for path in folder.iterdir()] == ["weights.safetensors"]


def test_a_checkpoint_that_a_killed_process_left_beside_the_weights_goes(
    tmp_path: Path, subject: lab.Subject
) -> None:
    run = store.Run(tmp_path / "run", None)
    request = Train(FIRST, LEARN, SOME)
    folder = run.trial_folder(open_bench(run, subject).trained(request).key)
    (folder / "checkpoint.safetensors").write_bytes(b"left")
    bench = open_bench(run, subject)
    bench.trained(request)
    assert bench.origins == ["reused"]
    assert not (folder / "checkpoint.safetensors").exists()


def test_damaged_weights_are_trained_again_to_the_same(tmp_path: Path, subject: lab.Subject) -> None:
    run = store.Run(tmp_path / "run", None)
    request = Train(FIRST, LEARN, SOME)
    first = open_bench(run, subject).trained(request)
    path = run.weights(first.key)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    bench = open_bench(run, subject)
    again = bench.trained(request)
    assert bench.origins == ["computed"]
    assert (again.digest, again.quality) == (first.digest, first.quality)


def test_a_failed_step_is_no_answer(tmp_path: Path, subject: lab.Subject) -> None:
    def fail() -> tuple[float, ...]:
        raise ZeroDivisionError

    run = store.Run(tmp_path / "run", None)
    with pytest.raises(ZeroDivisionError):
        open_bench(run, subject).ask(Step("scores", "1", fail))
    bench = open_bench(run, subject)
    bench.ask(Step("scores", "1", lambda: (2.0,)))
    assert bench.origins == ["computed"]


def test_driving_a_search_sends_answers_in_the_order_of_the_requests(
    first: tuple[Bench, list[Trial]], shared: Path, subject: lab.Subject
) -> None:
    seen: list[Sequence[Answer]] = []

    def search() -> Search:
        seen.append((yield [Ask(OTHER), Step("one", "1", lambda: (1.0,)), Ask(FIRST)]))
        seen.append((yield []))
        return Choice(FIRST, MIMIC, "it is small")

    bench = resume(shared, subject)
    choice = lab.drive(search(), bench.lab)
    assert (choice.plan, choice.reason) == (FIRST, "it is small")
    (other, step, one), nothing = seen
    assert (other, one) == (first[1][2], first[1][0])
    assert isinstance(step, StepResult)
    assert step.values == (1.0,)
    assert nothing == []
    trials = [event for event in bench.events if event.kind == "trial"]
    assert [(event.name, event.done, event.total) for event in trials] == [
        ("without wide", 1, 3),
        ("one", 2, 3),
        ("without same.0", 3, 3),
    ]
    begun = [event for event in bench.events if event.kind == "begin"]
    assert [(event.name, event.done, event.total) for event in begun] == [
        (event.name, event.done, event.total) for event in trials
    ]
    assert isinstance(one, Trial)
    latency = one.latency
    assert latency is not None
    assert latency.ratio_ci95 is not None
    low, high = latency.ratio_ci95
    assert trials[2].fields == (
        ("key", one.key),
        ("ratio", latency.ratio_to_original),
        ("ratio_low", low),
        ("ratio_high", high),
    )
    assert trials[1].fields == (("key", step.key),), "a step has no latency"


def test_of_narrowed_candidates_only_the_first_is_exported(
    tmp_path: Path, subject: lab.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[str] = []
    export = building.export

    def counted(model: nn.Module, bench: building.Workbench, folder: Path) -> Path:
        exported.append(folder.name)
        return export(model, bench, folder)

    monkeypatch.setattr(building, "export", counted)
    bench = open_bench(store.Run(tmp_path / "run", None), subject)
    for count in (6, 4, 2):
        trial = bench.trial(Plan(keep_channels=(("same.0.conv1", tuple(range(count))),)))
        assert trial.latency is not None and trial.latency.ratio_to_original is not None
    assert exported[0] == "baseline" and len(exported) == 2
    # A block that is gone is another graph.
    bench.trial(Plan(drop_blocks=("wide",), keep_channels=(("same.0.conv1", (0, 1)),)))
    assert len(exported) == 3
    bench.lab.close()


def test_where_a_cut_file_is_not_what_an_export_gives_all_are_exported(
    tmp_path: Path, subject: lab.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[str] = []
    monkeypatch.setattr(building, "narrows", lambda original, model, exported: False)
    monkeypatch.setattr(building, "narrow", lambda original, model, folder: cut.append(folder.name))
    bench = open_bench(store.Run(tmp_path / "run", None), subject)
    for count in (6, 4):
        bench.trial(Plan(keep_channels=(("same.0.conv1", tuple(range(count))),)))
    assert cut == [] and bench.backend.built == 3
    bench.lab.close()


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (Plan(), "original"),
        (Plan(drop_blocks=("a", "b", "c")), "without a b c"),
        (Plan(drop_blocks=("a", "b", "c", "d")), "without 4 blocks"),
        (Plan(drop_blocks=("a",), input_hw=(8, 16)), "without a, at 8x16"),
        (Plan(keep_channels=(("g", (0, 1)),)), "1 groups narrowed"),
    ],
)
def test_a_plan_has_a_short_name(plan: Plan, name: str) -> None:
    assert lab.plan_name(plan) == name
