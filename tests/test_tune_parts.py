"""A batch that the device has no memory for is taken in parts: gradient, state and views are the whole's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from test_tune import DROPPED, SGD, SHAPE, KilledError, Memory, Net, changed, weights
from torch import fx, nn

from optpipe import bank, graph, tune
from optpipe.augment import Part, augment
from optpipe.data import ImageSet
from optpipe.errors import RunError
from optpipe.tune import evaluation
from optpipe.tune.parts import Statistics, parts_of
from optpipe.tune.views import views_of
from optpipe.types import Divisible, Event, Tune

COUNT = 21
CLASSES = 5


@pytest.fixture(scope="module")
def original() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return graph.trace(Net(), SHAPE)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pixels = torch.randint(0, 256, (COUNT, *SHAPE), generator=torch.Generator().manual_seed(1))
    names = tuple(str(number) for number in range(COUNT))
    labels = torch.arange(COUNT) % CLASSES
    return ImageSet(pixels.byte(), labels, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)


@dataclass(frozen=True)
class Told:
    """A teacher ahead of the student until its loss falls below it."""

    losses: tuple[float, ...] = (1.8,)

    def mean(self, which: Sequence[int], images: Sequence[int]) -> torch.Tensor:
        drawn = torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(3))
        return drawn[list(images)]


def tight(network: nn.Module, most: int) -> list[int]:
    """Give a network's device memory for so many images at once; what it takes goes into the list."""
    taken: list[int] = []

    def look(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        taken.append(len(arguments[0]))

    network.get_submodule("stem").register_forward_pre_hook(look)
    return taken


def trained(
    original: fx.GraphModule,
    images: ImageSet,
    settings: Tune,
    most: int | None = None,
    checkpoint: Memory | None = None,
) -> tuple[fx.GraphModule, tune.Trained, list[str], list[int]]:
    """The student, the losses, the warnings, and how many images went through the student at once."""
    student = graph.apply(original, DROPPED, SHAPE)
    taken = tight(student, COUNT * settings.views if most is None else most)
    events: list[Event] = []
    teacher = Told() if settings.loss == "labels" else None
    result = tune.train(
        student,
        original,
        images,
        settings,
        seed=5,
        emit=events.append,
        checkpoint=checkpoint,
        teachers=teacher,
    )
    return student, result, [event.detail for event in events if event.kind == "warning"], taken


FROZEN = replace(SGD, batch_norm="eval")
LABELS = replace(
    FROZEN, loss="labels", trainable="all", teachers="ensemble", views=2, augment="shift_color", lr=0.01
)
KINDS = {
    "mimic, stages": replace(FROZEN, stage_weight=1.0),
    "kd": replace(FROZEN, loss="kd", trainable="all", augment="shift"),
    "cross": replace(FROZEN, loss="cross", trainable="all"),
    "labels, teachers, two views": LABELS,
    "cutmix": replace(FROZEN, augment="shift_cutmix"),
    "adamw": replace(FROZEN, optimizer="adamw", lr=1e-3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_parts_trains_as_the_whole_one_does(
    original: fx.GraphModule, images: ImageSet, kind: str
) -> None:
    settings = KINDS[kind]
    whole, expected, silent, _ = trained(original, images, settings)
    parted, found, said, taken = trained(original, images, settings, most=3 * settings.views)
    assert silent == []
    assert len(said) == 2  # of 8 images at once to 4, and to 2
    assert set(taken) == {2 * settings.views}
    assert (found.loss_first, found.loss_last) == pytest.approx(
        (expected.loss_first, expected.loss_last), rel=1e-5, abs=1e-6
    )
    state = whole.state_dict()
    for name, tensor in parted.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6)


def test_an_odd_batch_is_weighted_by_the_images_of_each_part(
    original: fx.GraphModule, images: ImageSet
) -> None:
    settings = replace(FROZEN, batch=7)
    whole, expected, *_ = trained(original, images, settings)
    parted, found, _, taken = trained(original, images, settings, most=4)
    assert taken[:2] == [3, 4]
    assert found.loss_last == pytest.approx(expected.loss_last, rel=1e-5)
    assert all(
        torch.allclose(tensor, whole.state_dict()[name], atol=1e-6)
        for name, tensor in parted.state_dict().items()
    )


def test_each_halving_is_told_once_with_its_sizes(original: fx.GraphModule, images: ImageSet) -> None:
    *_, said, _ = trained(original, images, FROZEN, most=3)
    assert said == [
        "out of memory on the GPU with 8 images at once: goes on with 4 at once, in batches of 8 as before",
        "out of memory on the GPU with 4 images at once: goes on with 2 at once, in batches of 8 as before",
    ]


def test_batch_norm_in_train_mode_is_said_to_see_the_part(original: fx.GraphModule, images: ImageSet) -> None:
    *_, said, _ = trained(original, images, SGD, most=4)
    assert [text.partition("; ")[2] for text in said] == ["batch-norms see so many at once"]


def test_running_statistics_move_once_a_step_however_it_is_taken(
    original: fx.GraphModule, images: ImageSet
) -> None:
    settings = replace(SGD, steps=1, lr=1e-12, augment="none")
    whole, *_ = trained(original, images, settings)
    parted, *_ = trained(original, images, settings, most=4)
    of_whole, of_parts = whole.state_dict(), parted.state_dict()
    first = "early.0.bn1"
    assert int(of_parts[f"{first}.num_batches_tracked"]) == 1
    # Whatever comes before it is alike; of the variance, that between the parts is not seen.
    assert torch.allclose(of_parts[f"{first}.running_mean"], of_whole[f"{first}.running_mean"], atol=1e-6)
    assert torch.allclose(of_parts[f"{first}.running_var"], of_whole[f"{first}.running_var"], rtol=0.02)


def test_a_step_that_failed_midway_leaves_no_trace(original: fx.GraphModule, images: ImageSet) -> None:
    """Memory is short in the last layer, behind batch-norms that have moved, and again in a second part."""
    student = graph.apply(original, DROPPED, SHAPE)
    calls: list[int] = []

    def short(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        calls.append(len(arguments[0]))
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")

    student.get_submodule("late.2.conv2").register_forward_pre_hook(short)
    tune.train(student, original, images, replace(SGD, steps=2), seed=5)
    assert calls[:3] == [8, 4, 4]
    assert calls[3:] == [2] * 8  # the second part failed, so that the whole step is taken anew
    expected, *_ = trained(original, images, replace(SGD, steps=2), most=2)
    assert changed(weights(expected), student) == set()


def test_the_student_remembers_an_epoch_as_if_it_had_seen_whole_batches(
    original: fx.GraphModule, images: ImageSet
) -> None:
    """An epoch of 21 images ends within the third batch of 8: all parts of it hear the same teachers."""
    whole, parted = Memory(every=1), Memory(every=1)
    trained(original, images, LABELS, checkpoint=whole)
    trained(original, images, LABELS, most=6, checkpoint=parted)
    for one, other in zip(whole.states, parted.states, strict=True):
        assert int(one["objective.seen"]) == int(other["objective.seen"])
        assert float(one["objective.sum"]) == pytest.approx(float(other["objective.sum"]), rel=1e-5)
        assert float(one["objective.epoch_loss"]) == pytest.approx(
            float(other["objective.epoch_loss"]), rel=1e-5
        )


def test_a_training_in_parts_goes_on_where_it_was_killed(original: fx.GraphModule, images: ImageSet) -> None:
    expected, *_ = trained(original, images, LABELS, most=6)
    memory = Memory(every=4, kill_after=2)
    with pytest.raises(KilledError):
        trained(original, images, LABELS, most=6, checkpoint=memory)
    memory.kill_after = None
    resumed, _, said, _ = trained(original, images, LABELS, most=6, checkpoint=memory)
    assert len(said) == 2  # the size is found again
    assert changed(weights(expected), resumed) == set()


def test_memory_for_not_even_one_image_ends_the_training_and_says_what_to_set(
    original: fx.GraphModule, images: ImageSet
) -> None:
    expected = (
        r"out of memory on the GPU at step 0 of 11, with one image at a time \(views = 2\); set fewer views, "
        r'autocast = "bf16" or a smaller \[data.preprocess\] size, or train on a larger GPU'
    )
    with pytest.raises(RunError, match=expected):
        trained(original, images, LABELS, most=1)


class Indivisible:
    """The square of the sum over a batch, which is no mean over images."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def loss(self, which: Sequence[int], images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(images)
        return found.mean().square()

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        pass


def test_a_batch_that_cannot_be_divided_is_not(original: fx.GraphModule, images: ImageSet) -> None:
    network = copy.deepcopy(original)
    assert not isinstance(Indivisible(network), Divisible)
    tight(network, 4)
    with pytest.raises(RunError, match="takes its batches of 8 images whole; set a smaller batch"):
        tune.fit(network, Indivisible(network), images, FROZEN, seed=0)


def test_parts_are_as_few_and_as_even_as_can_be() -> None:
    assert [len(part) for part in parts_of(7, 7)] == [7]
    assert [len(part) for part in parts_of(7, 3)] == [2, 2, 3]
    assert [place for part in parts_of(10, 4) for place in part] == list(range(10))


def test_nothing_is_kept_of_batch_norms_that_learn_nothing(original: fx.GraphModule) -> None:
    assert not Statistics(original)


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("kind", ["none", "resized_crop", "shift", "shift_color", "shift_cutmix"])
def test_an_image_has_the_view_in_a_part_that_it_has_in_the_whole(images: ImageSet, kind: str) -> None:
    settings = replace(SGD, augment=kind, views=2)  # type: ignore[arg-type]
    chosen = [4, 8, 15, 16, 20, 3, 2]
    whole = views_of(images, chosen, settings, 9, 3)
    part = views_of(images, chosen, settings, 9, 3, rows=range(2, 5))
    assert torch.equal(part, torch.cat([whole[2:5], whole[9:12]]))


def test_a_part_takes_its_own_of_the_random_numbers_of_the_whole(images: ImageSet) -> None:
    batch = images.batch(slice(0, 8))
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    whole = augment("resized_crop", batch, draws[0])
    rows = torch.tensor([5, 1])
    assert torch.equal(augment("resized_crop", batch[rows], draws[1], Part(8, rows)), whole[rows])
    assert torch.equal(draws[0].get_state(), draws[1].get_state())


# ---------------------------------------------------------------- evaluation


def test_logits_come_in_smaller_batches_where_memory_is_short(
    original: fx.GraphModule, images: ImageSet
) -> None:
    network, events = copy.deepcopy(original), list[Event]()
    taken = tight(network, 6)
    found = tune.logits(network, images, emit=events.append)
    assert torch.allclose(found, tune.logits(original, images), atol=1e-5)
    assert taken == [4, 4, 4, 4, 5]
    assert [event.detail for event in events] == [
        "out of memory on the GPU with 21 images at once: goes on with 11 at once",
        "out of memory on the GPU with 10 images at once: goes on with 5 at once",
    ]
    assert {event.kind for event in events} == {"warning"}


def test_a_smaller_batch_stays_for_the_rest_of_the_set(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 8)
    network, events = copy.deepcopy(original), list[Event]()
    tight(network, 4)
    tune.logits(network, images, emit=events.append)
    assert len(events) == 1


def test_batch_statistics_are_never_of_a_single_image(original: fx.GraphModule, images: ImageSet) -> None:
    network, events = copy.deepcopy(original), list[Event]()
    taken = tight(network, 4)
    tune.logits(network, images, batch_norm="batch", emit=events.append)
    assert min(taken) >= 2
    assert all(event.detail.endswith("; batch-norms see so many at once") for event in events)
    too_tight = copy.deepcopy(original)
    tight(too_tight, 2)
    with pytest.raises(RunError, match=r"out of memory on the GPU with [34] images at once"):
        tune.logits(too_tight, images, batch_norm="batch")


def test_the_distance_to_the_original_is_found_in_small_batches(
    original: fx.GraphModule, images: ImageSet
) -> None:
    student = graph.apply(original, DROPPED, SHAPE)
    whole = tune.distance(student, original, images)
    tight(student, 1)
    assert tune.distance(student, original, images) == pytest.approx(whole, rel=1e-6)


def test_a_bank_says_that_its_batches_had_to_be_smaller(
    original: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    network, events = copy.deepcopy(original), list[Event]()
    tight(network, 12)
    built = bank.build(tmp_path / "bank", [lambda: network], images, classes=CLASSES, emit=events.append)
    assert built.logits[0].shape == (COUNT, CLASSES)
    assert [event.detail for event in events if event.kind == "warning"] == [
        "out of memory on the GPU with 21 images at once: goes on with 11 at once; batch-norms see so many "
        "at once"
    ]


# ---------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_whose_memory_ends_trains_on_in_parts(original: fx.GraphModule) -> None:
    """Images of 256 x 256 want some GB for a batch, and the process may have 1 GiB."""
    size = 256
    pixels = torch.randint(0, 256, (64, 3, size, size), generator=torch.Generator().manual_seed(1))
    names = tuple(str(number) for number in range(64))
    large = ImageSet(pixels.byte(), None, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)
    settings = replace(FROZEN, steps=3, batch=64, augment="none")
    events: list[Event] = []
    losses = []
    whole_device = torch.cuda.get_device_properties(0).total_memory
    for share in (1.0, 2**30 / whole_device):
        student = graph.apply(original, DROPPED, SHAPE)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            losses.append(
                tune.train(student, original, large, settings, seed=0, device="cuda", emit=events.append)
            )
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    said = [event.detail for event in events if event.kind == "warning"]
    assert said
    assert said[0].startswith("out of memory on the GPU with 64 images at once: goes on with 32 at once")
    assert losses[1].loss_last == pytest.approx(losses[0].loss_last, rel=1e-3)
