"""Training on labels with teachers: what is minimised, who may teach, and that it resumes in mid-epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe import graph, store, tune
from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.tune import evaluation
from optpipe.types import Tune

SHAPE = (3, 8, 8)
COUNT = 21
CLASSES = 4


class Net(nn.Module):
    """Two convolutions with batch-norm, and a classifier with one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.norm = nn.BatchNorm1d(8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        logits: torch.Tensor = self.classifier(self.norm(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))
        return logits


@pytest.fixture(scope="module")
def original() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return graph.trace(Net(), SHAPE)


@pytest.fixture
def student(original: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """Images whose class is how bright they are."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(COUNT) % CLASSES
    pixels = torch.randint(0, 64, (COUNT, *SHAPE), generator=generator) + 60 * labels.view(-1, 1, 1, 1)
    names = tuple(str(number) for number in range(COUNT))
    return ImageSet(pixels.byte(), labels, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)


@dataclass
class Told:
    """Teachers that note which of them were asked about what."""

    logits: torch.Tensor  # (teachers, images, classes)
    losses: tuple[float, ...]
    asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def mean(self, which: Sequence[int], images: Sequence[int]) -> torch.Tensor:
        self.asked.append((tuple(which), tuple(images)))
        return self.logits[list(which)][:, list(images)].mean(dim=0)


def told(*losses: float) -> Told:
    generator = torch.Generator().manual_seed(2)
    return Told(torch.randn(len(losses), COUNT, CLASSES, generator=generator) * 3, losses)


class KilledError(Exception):
    pass


@dataclass
class Memory:
    """A checkpoint in memory that kills the training after so many saves."""

    every: int
    kill_after: int
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def load(self) -> dict[str, torch.Tensor] | None:
        return self.states[-1] if self.states else None

    def save(self, state: Mapping[str, torch.Tensor]) -> None:
        self.states.append({name: tensor.detach().clone() for name, tensor in state.items()})
        if len(self.states) == self.kill_after:
            raise KilledError


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(tensor, other.state_dict()[name]) and tensor.dtype == other.state_dict()[name].dtype
        for name, tensor in one.state_dict().items()
    )


LABELS = Tune(steps=9, batch=8, lr=0.05, loss="labels", trainable="all", augment="none", temperature=2.0)
ENSEMBLE = replace(LABELS, teachers="ensemble", views=2, augment="shift_color")
SCORED = replace(LABELS, batch_norm="eval")


# ---------------------------------------------------------------- what is minimised


def test_the_loss_of_a_step_is_the_sum_over_views_of_label_and_teacher_terms(
    student: fx.GraphModule, images: ImageSet
) -> None:
    teachers = told(0.5, 0.7)
    settings = replace(SCORED, steps=1, views=2, teachers="ensemble")
    chosen = tune.batch_indices(COUNT, 8, 3, 0)
    with torch.no_grad():
        own = student(images.batch(chosen)).double()
    wanted = teachers.logits.mean(dim=0)[chosen].double()
    assert images.labels is not None
    expected = 0.0
    for row, label, other in zip(own, images.labels[chosen], wanted, strict=True):
        p, q = (other / 2).softmax(0), (row / 2).softmax(0)
        divergence = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
        expected += 2 * (-math.log(float(row.softmax(0)[label])) + 2.0**2 * divergence) / 8

    result = tune.train(student, None, images, settings, seed=3, teachers=teachers)
    assert result.loss_first == pytest.approx(expected, rel=1e-4)


def test_without_teachers_the_loss_is_the_cross_entropy(student: fx.GraphModule, images: ImageSet) -> None:
    chosen = tune.batch_indices(COUNT, 8, 3, 0)
    assert images.labels is not None
    with torch.no_grad():
        expected = F.cross_entropy(student(images.batch(chosen)), images.labels[chosen]).item()
    result = tune.train(student, None, images, replace(SCORED, steps=1), seed=3, teachers=told(0.1))
    assert result.loss_first == pytest.approx(expected, rel=1e-4)


def test_all_views_of_a_step_go_through_the_student_at_once_and_differ(
    student: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    forward = nn.Conv2d.forward

    def watched(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == 3:
            seen.append(x.detach().clone())
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", watched)
    settings = replace(LABELS, steps=2, views=3, augment="shift")
    tune.train(student, None, images, settings, seed=3)
    assert [len(batch) for batch in seen] == [24, 24]
    first, second, third = torch.chunk(seen[0], 3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    # The same images in the same order: a shift that mirrors its border keeps an image's level.
    assert torch.corrcoef(torch.stack([first.mean((1, 2, 3)), third.mean((1, 2, 3))]))[0, 1] > 0.95

    again = list(seen)
    seen.clear()
    tune.train(graph.trace(Net(), SHAPE), None, images, settings, seed=3)
    # Tracing runs the network once too.
    assert all(torch.equal(a, b) for a, b in zip(again, seen[-2:], strict=True))


def test_training_on_labels_learns_them(student: fx.GraphModule, images: ImageSet) -> None:
    before = tune.logits(student, images).argmax(dim=1)
    tune.train(student, None, images, replace(LABELS, steps=60, views=2, augment="shift"), seed=0)
    assert images.labels is not None
    after = tune.logits(student, images).argmax(dim=1)
    assert (before == images.labels).float().mean() < 0.6
    assert (after == images.labels).float().mean() > 0.9


def test_a_student_comes_nearer_to_its_teachers(original: fx.GraphModule, images: ImageSet) -> None:
    teachers = told(0.0)
    distances = []
    for kind in ("none", "ensemble"):
        network = copy.deepcopy(original)
        settings = replace(LABELS, steps=60, teachers=kind)
        tune.train(network, None, images, settings, seed=0, teachers=teachers)
        own = tune.logits(network, images).log_softmax(1)
        distances.append(F.kl_div(own, teachers.logits[0].softmax(1), reduction="batchmean").item())
    assert distances[1] < 0.5 * distances[0]


# ---------------------------------------------------------------- what is trained


def test_all_trains_the_classifier_and_its_batch_norm_too(student: fx.GraphModule, images: ImageSet) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    tune.train(student, None, images, LABELS, seed=0)
    still = {name for name, tensor in student.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == set()


def test_backbone_leaves_the_classifier_as_it_was(student: fx.GraphModule, images: ImageSet) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    tune.train(student, None, images, replace(LABELS, trainable="backbone"), seed=0)
    still = {name for name, tensor in student.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == {name for name in before if name.startswith(("norm.", "classifier."))}


# ---------------------------------------------------------------- who may teach (EKG, Eq. 13)


def student_loss(original: fx.GraphModule, images: ImageSet) -> float:
    assert images.labels is not None
    return F.cross_entropy(tune.logits(original, images), images.labels).item()


def test_all_teachers_speak_in_the_first_epoch_and_then_those_no_worse_than_the_student(
    student: fx.GraphModule, images: ImageSet
) -> None:
    """With a learning rate too small to matter the student's loss is known beforehand."""
    loss = student_loss(student, images)
    teachers = told(loss - 0.1, loss + 0.1, loss - 0.01, loss + 0.01)
    settings = replace(SCORED, batch=7, steps=6, lr=1e-12, teachers="ensemble", views=2)
    tune.train(student, None, images, settings, seed=0, teachers=teachers)
    assert [which for which, _ in teachers.asked] == [(0, 1, 2, 3)] * 3 + [(0, 2)] * 3
    assert [list(asked) for _, asked in teachers.asked] == [
        tune.batch_indices(COUNT, 7, 0, step) for step in range(6)
    ]


def test_an_epoch_that_ends_inside_a_batch_is_still_the_mean_over_all_images(
    student: fx.GraphModule, images: ImageSet
) -> None:
    """Batches of 8 of 21 images: the first epoch ends in the third step, the second in the sixth."""
    loss = student_loss(student, images)
    teachers = told(loss - 1e-4, loss + 1e-4)
    settings = replace(SCORED, steps=8, lr=1e-12, teachers="ensemble")
    tune.train(student, None, images, settings, seed=0, teachers=teachers)
    assert [which for which, _ in teachers.asked] == [(0, 1)] * 3 + [(0,)] * 5


def test_where_no_teacher_is_ahead_the_labels_alone_teach(student: fx.GraphModule, images: ImageSet) -> None:
    loss = student_loss(student, images)
    teachers = told(loss + 1.0, loss + 2.0)
    settings = replace(SCORED, batch=COUNT, steps=2, lr=1e-12, teachers="ensemble")
    result = tune.train(student, None, images, settings, seed=0, teachers=teachers)
    assert len(teachers.asked) == 1
    assert result.loss_first > result.loss_last + 0.1
    assert result.loss_last == pytest.approx(loss, rel=1e-5)


def test_a_single_teacher_speaks_however_good_the_student_is(
    student: fx.GraphModule, images: ImageSet
) -> None:
    teachers = told(1000.0)
    settings = replace(SCORED, batch=COUNT, steps=3, teachers="single")
    tune.train(student, None, images, settings, seed=0, teachers=teachers)
    assert len(teachers.asked) == 3


# ---------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("kill_after", [1, 2])
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(
    original: fx.GraphModule, images: ImageSet, every: int, kill_after: int
) -> None:
    loss = student_loss(original, images)
    whole, resumed = copy.deepcopy(original), copy.deepcopy(original)
    expected, got = (told(loss - 0.4, loss - 0.1, loss, loss + 0.5) for _ in range(2))
    result = tune.train(whole, None, images, ENSEMBLE, seed=5, teachers=expected)
    assert len({which for which, _ in expected.asked}) > 1

    memory = Memory(every, kill_after)
    with pytest.raises(KilledError):
        tune.train(copy.deepcopy(original), None, images, ENSEMBLE, seed=5, checkpoint=memory, teachers=got)
    again = tune.train(resumed, None, images, ENSEMBLE, seed=5, checkpoint=memory, teachers=got)
    assert equal(whole, resumed)
    assert again == result
    assert got.asked == expected.asked


def test_a_killed_training_goes_on_from_a_file_with_the_teachers_it_had(
    original: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    """The checkpoint is of step 8 of 9, in the fourth epoch: who may teach follows from the third."""
    teachers = told(0.0, student_loss(original, images) + 5.0)
    disk = store.DiskCheckpoint(tmp_path / "checkpoint.safetensors", every=4)
    whole = copy.deepcopy(original)
    tune.train(whole, None, images, ENSEMBLE, seed=5, teachers=teachers, checkpoint=disk)
    expected = teachers.asked[8:]
    assert [which for which, _ in expected] == [(0,)]
    teachers.asked.clear()
    resumed = copy.deepcopy(original)
    tune.train(resumed, None, images, ENSEMBLE, seed=5, teachers=teachers, checkpoint=disk)
    assert teachers.asked == expected
    assert equal(whole, resumed)


# ---------------------------------------------------------------- length and rate


@pytest.mark.parametrize(
    ("epochs", "batch", "count", "steps"),
    [(1.0, 8, 21, 3), (2.0, 8, 21, 6), (100.0, 128, 4660, 3641), (0.5, 10, 100, 5), (1.1, 10, 100, 11)],
)
def test_epochs_decide_the_steps(epochs: float, batch: int, count: int, steps: int) -> None:
    settings = replace(LABELS, epochs=epochs, batch=batch)
    assert tune.steps_of(settings, count) == steps
    assert tune.with_steps(settings, count) == replace(settings, steps=steps)


def test_an_epoch_of_a_set_smaller_than_a_batch_is_one_step() -> None:
    assert tune.steps_of(replace(LABELS, epochs=3.0, batch=64), 21) == 3


def test_without_epochs_the_steps_are_as_given() -> None:
    assert tune.with_steps(LABELS, 1000) == LABELS


def test_milestones_multiply_the_rate_by_the_decay_at_their_shares() -> None:
    settings = Tune(steps=10, schedule="milestones", milestones=(0.3, 0.6, 0.8), decay=0.2)
    assert [tune.rate(step, settings) for step in range(10)] == pytest.approx(
        [1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008]
    )


def test_milestones_rise_over_their_warm_up() -> None:
    settings = Tune(steps=10, schedule="milestones", milestones=(0.5,), decay=0.1, warmup=0.2)
    assert [tune.rate(step, settings) for step in (0, 1, 2, 4, 5)] == pytest.approx([0.5, 1, 1, 1, 0.1])


# ---------------------------------------------------------------- what cannot be trained


def test_images_without_labels_cannot_teach_them(student: fx.GraphModule, images: ImageSet) -> None:
    with pytest.raises(UsageError, match='loss = "labels" needs labelled calibration images; give labels'):
        tune.train(student, None, replace(images, labels=None), LABELS, seed=0)


def test_mimicking_needs_an_original(student: fx.GraphModule, images: ImageSet) -> None:
    with pytest.raises(UsageError, match='loss = "mimic" compares with the original network: none was given'):
        tune.train(student, None, images, Tune(steps=1), seed=0)


def test_teachers_that_were_asked_for_must_be_there(student: fx.GraphModule, images: ImageSet) -> None:
    with pytest.raises(UsageError, match='teachers = "ensemble": training was given none'):
        tune.train(student, None, images, ENSEMBLE, seed=0)


def test_a_view_that_mixes_classes_has_no_one_label(student: fx.GraphModule, images: ImageSet) -> None:
    with pytest.raises(UsageError, match='augment = "shift_cutmix" puts other classes into an image'):
        tune.train(student, None, images, replace(LABELS, augment="shift_cutmix"), seed=0)


def test_at_least_one_view_is_needed(student: fx.GraphModule, images: ImageSet) -> None:
    with pytest.raises(UsageError, match=r"views = 0: must be at least 1"):
        tune.train(student, None, images, replace(LABELS, views=0), seed=0)


def test_a_diverging_training_says_so(student: fx.GraphModule, images: ImageSet) -> None:
    settings = replace(SCORED, steps=200, lr=1e9)
    with pytest.raises(RunError, match=r"diverged at step \d+ of 200: the loss is (nan|inf)"):
        tune.train(student, None, images, settings, seed=0)


# ---------------------------------------------------------------- logits on batch statistics


def test_batch_statistics_are_those_of_the_batch_and_leave_the_running_ones(
    student: fx.GraphModule, images: ImageSet
) -> None:
    trained = copy.deepcopy(student)
    with torch.no_grad():
        expected = trained.train()(images.batch(slice(0, COUNT)))
    before = copy.deepcopy(student)
    got = tune.logits(student, images, batch_norm="batch")
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, tune.logits(student, images), atol=1e-2)
    assert equal(student, before)
    assert not student.training


@pytest.mark.parametrize(("size", "sizes"), [(20, [10, 11]), (10, [7, 7, 7]), (21, [21])])
def test_batches_are_of_equal_size_so_that_the_last_one_has_statistics(
    student: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch, size: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(evaluation, "STATISTICS_BATCH", size)
    rows = list(tune.logit_batches(student, images, batch_norm="batch"))
    assert [len(batch) for batch in rows] == sizes


def test_one_image_has_no_batch_statistics(student: fx.GraphModule, images: ImageSet) -> None:
    one = replace(images, pixels=images.pixels[:1], labels=None)
    with pytest.raises(RunError, match="batch statistics of 1 image: give at least 2"):
        tune.logits(student, one, batch_norm="batch")


def test_whoever_reads_logits_batch_by_batch_stays_out_of_inference_mode(
    student: fx.GraphModule, images: ImageSet
) -> None:
    for _ in tune.logit_batches(student, images):
        assert not torch.is_inference_mode_enabled()
