"""The laboratory's answers about plans that change the resolution, and trainings that go on from others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_lab import SHAPE, TARGET, Bench, Net, open_bench, same_weights

from optpipe import bank, building, data, graph, lab, models, quality, store, tune
from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.lab import teaching
from optpipe.lab.trainings import TrainedRecord
from optpipe.types import Ask, Engine, Plan, Precision, Session, Start, Target, Train, Trial, Tune

SMALL = Plan(input_hw=(4, 6))
EVERYTHING = Plan(("same.1",), (("same.0.conv1", (0, 2, 3, 7)),), (4, 6))
LEARN = Tune(steps=3, batch=4, lr=0.05, loss="labels", trainable="all", augment="none")
MIMIC = Tune(steps=3, batch=4, augment="none")


def make_subject(*, labels: bool = True) -> lab.Subject:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = graph.trace(Net().eval(), SHAPE)
    pixels = torch.randint(0, 256, (16, *SHAPE), generator=torch.Generator().manual_seed(1)).byte()
    classes = torch.arange(16) % 4 if labels else None
    names = tuple(str(number) for number in range(16))
    images = ImageSet(pixels, classes, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)
    return lab.Subject(original, models.weights_digest(original), images, seed=0)


@pytest.fixture(scope="module")
def subject() -> lab.Subject:
    return make_subject()


@pytest.fixture
def bench(tmp_path: Path, subject: lab.Subject) -> Iterator[Bench]:
    opened = open_bench(store.Run(tmp_path / "run", None), subject)
    yield opened
    opened.lab.close()


def trial(bench: Bench, ask: Ask) -> Trial:
    (answer,) = bench.ask(ask)
    assert isinstance(answer, Trial)
    return answer


# ---------------------------------------------------------------- trials


def test_a_candidate_is_counted_at_its_own_resolution(bench: Bench, subject: lab.Subject) -> None:
    found = trial(bench, Ask(EVERYTHING, wants=()))
    candidate = graph.apply(subject.original, EVERYTHING, SHAPE)
    assert (found.parameters, found.macs) == graph.count(candidate, (3, 4, 6))
    whole = trial(bench, Ask(Plan(), wants=()))
    small = trial(bench, Ask(SMALL, wants=()))
    assert small.parameters == whole.parameters
    # All but the classifier's 8 * 4 are at each pixel: 24 of 64 are left.
    assert small.macs - 32 == (whole.macs - 32) * 24 // 64


def test_candidate_and_baseline_are_timed_each_at_its_resolution(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[int, int, int]] = []
    load = bench.backend.load

    def counted(engine: Engine, target: Target) -> Session:
        loaded.append(target.input_shape)
        return load(engine, target)

    monkeypatch.setattr(bench.backend, "load", counted)
    small = bench.trial(SMALL)
    assert loaded == [SHAPE, (3, 4, 6)]
    assert small.latency is not None and small.latency.ratio_to_original is not None
    # Another size is another engine, the same size is not.
    bench.trial(Plan(input_hw=(6, 6)))
    bench.trial(SMALL)
    bench.trial(replace(SMALL, drop_blocks=("same.0",)))
    bench.trial(replace(SMALL, drop_blocks=("same.1",)))
    assert (bench.backend.built, bench.lab.engines.candidates, bench.lab.engines.structures) == (4, 5, 3)
    assert len(loaded) == 4


def test_ranges_for_int8_come_from_images_of_the_candidates_size(
    tmp_path: Path, subject: lab.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    benches: list[building.Workbench] = []
    build = building.build

    def seen(exported: Path, bench: building.Workbench, folder: Path, **named: bool) -> building.Built:
        benches.append(bench)
        return build(exported, bench, folder, **named)  # type: ignore[arg-type]

    precision: Precision = "int8"
    monkeypatch.setattr(building, "build", seen)
    monkeypatch.setattr("test_lab.TARGET", replace(TARGET, precision=precision))
    opened = open_bench(store.Run(tmp_path, None), subject)
    latency = opened.trial(SMALL).latency
    opened.lab.close()
    assert latency is not None
    assert [bench.target.input_shape for bench in benches] == [SHAPE, (3, 4, 6)]
    assert [tuple(bench.images.batch([0]).shape[1:]) for bench in benches] == [SHAPE, (3, 4, 6)]


@pytest.mark.parametrize("labels", [True, False])
def test_quality_is_that_of_the_resized_calibration_images(tmp_path: Path, labels: bool) -> None:
    subject = make_subject(labels=labels)
    opened = open_bench(store.Run(tmp_path, None), subject)
    found = trial(opened, Ask(SMALL, wants=("quality",), tune=LEARN if labels else None))
    images = data.resized(subject.calibration, (4, 6))
    candidate = graph.apply(subject.original, SMALL, SHAPE)
    if labels:
        tune.train(candidate, None, images, LEARN, seed=0)
    own = tune.logits(candidate, images).numpy()
    # The original says what it says at its own size.
    reference = tune.logits(subject.original, subject.calibration).numpy()
    classes = None if images.labels is None else images.labels.numpy()
    assert found.quality == quality.score(own, classes, reference, "calibration")
    assert opened.backend.built == 0


def test_features_of_another_size_have_no_distance(bench: Bench) -> None:
    with pytest.raises(UsageError, match=r"at 4x6: features of images of 4x6 have no distance .* 8x8"):
        bench.ask(Ask(SMALL, wants=("distance",)))
    # The original's size, said aloud, is no other size.
    whole = trial(bench, Ask(Plan(input_hw=(8, 8)), wants=("distance",)))
    assert whole.distance == 0


@pytest.mark.parametrize("request_", [Ask(SMALL, wants=(), tune=MIMIC), Train(SMALL, MIMIC)])
def test_a_smaller_candidate_cannot_mimic(
    bench: Bench, request_: Ask | Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tune, "train")
    with pytest.raises(UsageError, match=r'loss = "mimic" compares .* images of one size.*4x6.*8x8.*labels'):
        bench.ask(request_)


# ---------------------------------------------------------------- trainings


def test_a_candidate_is_trained_and_scored_on_images_of_its_size(bench: Bench, subject: lab.Subject) -> None:
    some, rest = (1, 4, 6, 7, 10, 11), (0, 2, 3, 5)
    answer = bench.trained(Train(EVERYTHING, LEARN, some, score=rest))
    images = data.resized(subject.calibration, (4, 6))
    expected = graph.apply(subject.original, EVERYTHING, SHAPE)
    tune.train(expected, None, data.part(images, some), LEARN, seed=subject.seed)
    assert same_weights(answer.network, expected)
    held = data.part(images, rest)
    assert held.labels is not None
    own = tune.logits(expected, held).numpy()
    assert answer.quality == quality.score(own, held.labels.numpy(), own, "calibration")
    assert answer.quality.count == 4
    assert bench.trained(Train(EVERYTHING, LEARN, some)).quality is None


def test_a_score_is_kept_with_the_weights_and_taken_again_where_it_is_not(
    tmp_path: Path, subject: lab.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.Run(tmp_path, None)
    request = Train(SMALL, LEARN, score=(0, 1, 2))
    first = open_bench(run, subject).trained(request)
    folder = run.trial_folder(first.key)
    assert sorted(path.name for path in folder.iterdir()) == ["trained.json", "weights.safetensors"]
    stored = (folder / "trained.json").read_text()
    monkeypatch.delattr(tune, "train")
    with monkeypatch.context() as patch:
        patch.delattr(tune, "logits")
        assert open_bench(run, subject).trained(request).quality == first.quality
    (folder / "trained.json").unlink()
    assert open_bench(run, subject).trained(request).quality == first.quality
    # Of other weights it would be another score.
    assert first.quality is not None
    other = TrainedRecord("0" * 64, replace(first.quality, count=9))
    (folder / "trained.json").write_text(store.to_sealed(other))
    assert open_bench(run, subject).trained(request).quality == first.quality
    assert (folder / "trained.json").read_text() == stored


HELD = torch.randint(0, 256, (10, *SHAPE), generator=torch.Generator().manual_seed(3)).byte()


def validated(subject: lab.Subject, digest: str = "v" * 64) -> lab.Subject:
    """The subject with ten validation images."""
    names = tuple(f"held {number}" for number in range(10))
    held = replace(subject.calibration, pixels=HELD, labels=torch.arange(10) % 4, names=names, digest=digest)
    return replace(subject, validation=held)


def test_a_candidate_is_scored_on_validation_images_of_its_size(tmp_path: Path, subject: lab.Subject) -> None:
    run, whole = store.Run(tmp_path, None), validated(subject)
    request = Train(EVERYTHING, LEARN, score="validation")
    answer = open_bench(run, whole).trained(request)
    assert whole.validation is not None
    held = data.resized(whole.validation, (4, 6))
    assert held.labels is not None
    hits = (tune.logits(answer.network, held).argmax(1) == held.labels).sum()
    assert answer.quality is not None
    assert (answer.quality.split, answer.quality.count) == ("validation", 10)
    assert answer.quality.value == float(hits) / 10
    # All calibration images trained it, and none of those that it is scored on.
    expected = graph.apply(subject.original, EVERYTHING, SHAPE)
    tune.train(expected, None, data.resized(subject.calibration, (4, 6)), LEARN, seed=0)
    assert same_weights(answer.network, expected)
    assert open_bench(run, whole).trained(request).quality == answer.quality
    # Scored on other images it would be another answer; a training that is not keeps its key.
    others = validated(subject, "w" * 64)
    assert open_bench(run, others).trained(request).key != answer.key
    keys = {open_bench(run, one).trained(Train(SMALL, LEARN)).key for one in (subject, whole, others)}
    assert len(keys) == 1


def test_without_validation_images_there_is_no_score_on_them(bench: Bench) -> None:
    with pytest.raises(UsageError, match=r"validation images is wanted.*give \[data\] validation"):
        bench.trained(Train(SMALL, LEARN, score="validation"))


TAUGHT = replace(LEARN, teachers="single")


@pytest.mark.parametrize("some", [None, (1, 4, 6, 7, 10, 11)])
def test_the_original_teaches_at_its_own_resolution(
    tmp_path: Path, subject: lab.Subject, some: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.Run(tmp_path / "run", None)
    request = Train(SMALL, TAUGHT, some)
    opened = open_bench(run, subject)
    answer = opened.trained(request)
    # By hand: a bank of those images' rows in the logits of the whole set, which share batch statistics.
    said = tune.logits(subject.original, subject.calibration, batch_norm="batch").half()
    rows = list(range(16)) if some is None else list(some)
    labels = subject.calibration.labels
    assert labels is not None
    loss = float(F.cross_entropy(said[rows].float(), labels[rows]))
    teachers = bank.MemoryBank((said[rows].numpy(),), (loss,))
    expected = graph.apply(subject.original, SMALL, SHAPE)
    images = data.part(data.resized(subject.calibration, (4, 6)), rows)
    tune.train(expected, None, images, TAUGHT, seed=0, teachers=teachers)
    assert same_weights(answer.network, expected)
    alone = opened.trained(Train(SMALL, LEARN, some))
    assert alone.digest != answer.digest
    # The logits are computed once for all trainings of a run, and not again when it is resumed.
    with monkeypatch.context() as patch:
        patch.setattr(tune, "logit_batches", None)
        opened.trained(Train(EVERYTHING, TAUGHT, (0, 1, 2, 3)))
    assert [event.name for event in opened.events if event.kind == "note"] == ["memory bank"]
    monkeypatch.delattr(tune, "train")
    again = open_bench(run, subject)
    assert again.trained(request).digest == answer.digest
    assert again.origins == ["reused"]


def test_the_rows_of_a_bank_are_those_of_its_images(tmp_path: Path) -> None:
    images = data.part(make_subject().calibration, range(3))
    said = np.array([[4, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0]], dtype=np.float16)
    rows = teaching.part(bank.MemoryBank((said,), (0.0,)), (2, 0), images)
    assert rows.mean([0], [1, 0, 1]).tolist() == [[4, 0, 0, 0], [0, 0, 1, 0], [4, 0, 0, 0]]
    # Classes 2 and 0: log(e + 3) - 1 and log(e^4 + 3) - 4.
    assert rows.losses[0] == pytest.approx(((math.log(math.e + 3) - 1) + (math.log(math.e**4 + 3) - 4)) / 2)


def test_a_training_on_the_way_has_no_ensemble(bench: Bench) -> None:
    with pytest.raises(UsageError, match=r'teachers = "ensemble": a training within a search .* "single"'):
        bench.trained(Train(SMALL, replace(LEARN, teachers="ensemble")))


def test_a_training_goes_on_from_another(tmp_path: Path, subject: lab.Subject) -> None:
    run = store.Run(tmp_path, None)
    opened = open_bench(run, subject)
    once = Plan(("wide",), (("same.0.conv1", (0, 2, 3, 5, 7)),))
    twice = Plan(("wide", "same.1"), (("same.0.conv1", (0, 3, 7)),), (6, 4))
    first = opened.trained(Train(once, LEARN))
    second = opened.trained(Train(twice, LEARN, start=Start(first.key, once)))
    expected = graph.apply(subject.original, once, SHAPE)
    tune.train(expected, None, subject.calibration, LEARN, seed=0)
    # Channels 0, 3 and 7 are the first, the third and the last of the five that were left.
    expected = graph.apply(expected, Plan(("same.1",), (("same.0.conv1", (0, 2, 4)),), (6, 4)), SHAPE)
    tune.train(expected, None, data.resized(subject.calibration, (6, 4)), LEARN, seed=0)
    assert same_weights(second.network, expected)
    assert list(second.network.state_dict()) == list(graph.apply(subject.original, twice, SHAPE).state_dict())
    anew = opened.trained(Train(twice, LEARN))
    assert len({first.key, second.key, anew.key}) == 3
    assert anew.digest != second.digest
    # What is stored fits the plan however it was come by.
    again = open_bench(run, subject)
    assert again.trained(Train(twice, LEARN, start=Start(first.key, once))).digest == second.digest
    assert again.origins == ["reused"]


def test_channels_of_layers_that_are_gone_already_change_nothing(bench: Bench) -> None:
    shallow = Plan(("same.1",))
    first = bench.trained(Train(shallow, LEARN))
    narrow = (("same.0.conv1", (0, 3, 7)),)
    start = Start(first.key, shallow)
    second = bench.trained(Train(Plan(("same.1",), narrow), LEARN, start=start))
    named = Plan(("same.1",), (*narrow, ("same.1.conv1", (1, 2))))
    assert same_weights(bench.trained(Train(named, LEARN, start=start)).network, second.network)
    with pytest.raises(UsageError, match=r"no channel group is named 'same\.1\.conv'"):
        bench.trained(Train(Plan(("same.1",), (("same.1.conv", (1, 2)),)), LEARN, start=start))


def test_weights_to_go_on_from_must_be_there(bench: Bench) -> None:
    with pytest.raises(RunError, match="the weights that a training goes on from are gone"):
        bench.trained(Train(SMALL, LEARN, start=Start("f" * 64, Plan())))


@pytest.mark.parametrize(
    ("done", "plan", "left"),
    [
        (Plan(), EVERYTHING, EVERYTHING),
        (EVERYTHING, EVERYTHING, Plan(input_hw=(4, 6))),
        (Plan(("a",)), Plan(("b", "a")), Plan(("b",))),
        (Plan((), (("g", (1, 4, 6)),)), Plan((), (("g", (4, 6)),)), Plan((), (("g", (1, 2)),))),
        (Plan((), (("g", (1, 4)),)), Plan((), (("g", (1, 4)), ("h", (2,)))), Plan((), (("h", (2,)),))),
        (Plan(input_hw=(8, 6)), Plan(input_hw=(8, 4)), Plan(input_hw=(8, 4))),
    ],
)
def test_what_is_left_of_a_plan(done: Plan, plan: Plan, left: Plan) -> None:
    assert lab.further(done, plan) == left


@pytest.mark.parametrize(
    ("done", "plan", "message"),
    [
        (Plan(("a",)), Plan(("b",)), "block 'a' is gone already"),
        (Plan((), (("g", (1, 4)),)), Plan((), (("g", (1, 2)),)), "channel 2 of group 'g' is gone already"),
        (Plan((), (("g", (1, 4)),)), Plan(), "group 'g' is narrowed already"),
        (Plan(input_hw=(6, 6)), Plan(), "images were 6x6, and are to be the original's size"),
        (Plan(input_hw=(6, 6)), Plan(input_hw=(4, 7)), "images were 6x6, and are to be 4x7"),
    ],
)
def test_a_training_does_not_go_on_to_a_plan_that_leaves_more(done: Plan, plan: Plan, message: str) -> None:
    with pytest.raises(UsageError, match=f"cannot go on .*: {message}; start it at the original"):
        lab.further(done, plan)


# ---------------------------------------------------------------- the images in memory


def test_images_of_one_other_size_are_held(subject: lab.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    resized = data.resized

    def counted(images: ImageSet, hw: tuple[int, int]) -> ImageSet:
        made.append(hw)
        return resized(images, hw)

    monkeypatch.setattr(data, "resized", counted)
    held = lab.Resolutions(subject.calibration)
    sizes = [(4, 6), (8, 8), (4, 6), (6, 6), (6, 6), (4, 6)]
    shapes = [held.images(Plan(input_hw=hw)).shape[1:] for hw in sizes]
    assert shapes == sizes
    assert made == [(4, 6), (6, 6), (4, 6)]
    assert held.images(Plan()) is subject.calibration
