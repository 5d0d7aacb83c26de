"""The memory bank: which networks teach, what is stored of them, and what a broken build leaves behind."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optpipe import bank, graph, tune
from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.tune import evaluation
from optpipe.types import Event, Tune

SHAPE = (3, 8, 8)
COUNT = 23
CLASSES = 4

Usage = namedtuple("Usage", ["total", "used", "free"])


class Net(nn.Module):
    """A convolution, a batch-norm whose running statistics are stale, and a classifier."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            assert self.norm.running_mean is not None
            self.norm.running_mean.fill_(7.0)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(F.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))
        return logits


@pytest.fixture(scope="module")
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (COUNT, *SHAPE), generator=generator).byte()
    labels = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    return ImageSet(pixels, labels, ("",) * COUNT, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)


def makers(*seeds: int) -> list[Callable[[], nn.Module]]:
    def maker(seed: int) -> Callable[[], nn.Module]:
        return lambda: Net(seed)

    return [maker(seed) for seed in seeds]


def never() -> nn.Module:
    raise AssertionError("a stored teacher was computed again")


def on_batch_statistics(network: nn.Module, images: ImageSet) -> torch.Tensor:
    """The logits of all images as one batch, in train mode."""
    with torch.no_grad():
        logits: torch.Tensor = copy.deepcopy(network).train()(images.batch(slice(0, len(images))))
    return logits


# ---------------------------------------------------------------- which networks teach


def test_the_size_is_two_bytes_for_each_logit() -> None:
    assert bank.size_bytes(images=1_281_167, classes=1000, teachers=5) == 12_811_670_000


def test_teachers_have_evenly_spaced_losses_from_near_the_chosen_to_the_original() -> None:
    """Eq. 11 by hand: K = 4 from 2.0 (chosen) to 0.4 (original) wants 1.6, 1.2, 0.8 and 0.4."""
    losses = [0.4, 0.5, 0.7, 1.1, 1.35, 1.7, 1.9, 2.0]
    #  1.6 -> 1.7 (0.1, beside 0.25); 1.2 -> 1.1 (0.1, beside 0.15); 0.8 -> 0.7; 0.4 -> 0.4
    assert bank.spaced(losses, 4) == (5, 3, 2, 0)


def test_the_original_alone_is_the_one_teacher() -> None:
    assert bank.spaced([0.4, 0.9, 2.0], 1) == (0,)


def test_a_network_nearest_to_two_of_the_losses_teaches_once() -> None:
    """Wanted are 1.6, 1.2, 0.8 and 0.4; all but the last but one are nearest to the ends."""
    assert bank.spaced([0.4, 1.9, 2.0], 4) == (1, 0)


def test_losses_need_not_rise_on_the_way() -> None:
    """Wanted are 1.2 and 0.4 (K = 2); the original's loss was matched by a later network too."""
    assert bank.spaced([0.4, 1.5, 1.3, 0.4, 2.0], 2) == (2, 0)


def test_a_search_that_took_nothing_out_has_one_teacher() -> None:
    assert bank.spaced([0.7], 5) == (0,)


@pytest.mark.parametrize(("losses", "k"), [([], 3), ([1.0], 0)])
def test_no_teacher_of_nothing(losses: list[float], k: int) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        bank.spaced(losses, k)


# ---------------------------------------------------------------- what is stored


def test_the_bank_holds_the_logits_of_every_image_on_batch_statistics(
    tmp_path: Path, images: ImageSet
) -> None:
    built = bank.build(tmp_path / "bank", makers(1, 2), images, classes=CLASSES)
    for number, seed in enumerate((1, 2)):
        stored = np.load(tmp_path / "bank" / f"teacher-{number}.npy")
        assert stored.shape == (COUNT, CLASSES)
        assert stored.dtype == np.float16
        expected = on_batch_statistics(Net(seed), images)
        assert np.allclose(stored, expected.numpy(), rtol=2e-3, atol=2e-3)
        # Far from what the stale running statistics give.
        assert not np.allclose(stored, tune.logits(Net(seed), images).numpy(), atol=1.0)
        assert built.losses[number] == pytest.approx(
            F.cross_entropy(expected, images.labels).item(),  # type: ignore[arg-type]
            rel=1e-2,
        )


def test_the_files_are_as_large_as_was_said(tmp_path: Path, images: ImageSet) -> None:
    bank.build(tmp_path, makers(1, 2, 3), images, classes=CLASSES)
    headers, digests = 3 * 128, 3 * 32
    stored = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert stored == bank.size_bytes(COUNT, CLASSES, 3) + headers + digests


def test_a_last_batch_of_one_image_is_none(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """22 and one image would leave a batch of one: 12 and 11 it is."""
    monkeypatch.setattr(evaluation, "STATISTICS_BATCH", 22)
    bank.build(tmp_path, makers(1), images, classes=CLASSES)
    halves = [replace(images, pixels=images.pixels[part]) for part in (slice(0, 11), slice(11, 23))]
    expected = torch.cat([on_batch_statistics(Net(1), half) for half in halves])
    assert np.allclose(np.load(tmp_path / "teacher-0.npy"), expected.numpy(), rtol=2e-3, atol=2e-3)


def test_a_network_keeps_its_running_statistics(tmp_path: Path, images: ImageSet) -> None:
    network = Net(1)
    before = copy.deepcopy(network.state_dict())
    bank.build(tmp_path, [lambda: network], images, classes=CLASSES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_only_one_network_is_in_memory_at_a_time(tmp_path: Path, images: ImageSet) -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def make() -> nn.Module:
        gc.collect()
        assert len(alive) == 0
        network = Net(1)
        alive.add(network)
        return network

    bank.build(tmp_path, [make, make, make], images, classes=CLASSES)


# ---------------------------------------------------------------- what a training reads


def test_the_mean_is_over_the_teachers_asked_for_in_the_order_of_the_images(
    tmp_path: Path, images: ImageSet
) -> None:
    built = bank.build(tmp_path, makers(1, 2, 3), images, classes=CLASSES)
    stored = [np.load(tmp_path / f"teacher-{number}.npy").astype(np.float32) for number in range(3)]
    mean = built.mean([0, 2], [20, 3, 3, 0])
    assert mean.dtype == torch.float32
    expected = (stored[0] + stored[2])[[20, 3, 3, 0]] / 2
    assert np.allclose(mean.numpy(), expected, rtol=1e-6)


def test_the_logits_are_mapped_and_cannot_be_written(tmp_path: Path, images: ImageSet) -> None:
    built = bank.build(tmp_path, makers(1), images, classes=CLASSES)
    assert isinstance(built.logits[0], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        built.logits[0][0, 0] = 1.0


def test_a_student_is_trained_by_a_bank(tmp_path: Path, images: ImageSet) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = graph.trace(Net(9), SHAPE)
    built = bank.build(tmp_path, makers(1), images, classes=CLASSES)
    teachers: tune.Teachers = built
    teacher = torch.from_numpy(built.logits[0].astype(np.float32)).softmax(dim=1)
    # The labels say what the teacher says.
    taught = replace(images, labels=teacher.argmax(dim=1))
    settings = Tune(steps=40, batch=COUNT, lr=0.05, loss="labels", teachers="single", trainable="all")
    settings = replace(settings, augment="none", views=2)

    def divergence() -> float:
        own = tune.logits(student, images, batch_norm="batch").log_softmax(dim=1)
        return F.kl_div(own, teacher, reduction="batchmean").item()

    before = divergence()
    tune.train(student, None, taught, settings, seed=0, teachers=teachers)
    assert divergence() < 0.5 * before


@pytest.mark.parametrize(
    ("count", "shown"),
    [(999, "999 bytes"), (1000, "1.0 kB"), (12_811_670_000, "12.8 GB"), (5_000_000_000_000, "5000.0 GB")],
)
def test_a_size_is_said_in_its_unit(count: int, shown: str) -> None:
    assert bank._readable(count) == shown


# ---------------------------------------------------------------- killed, resumed, refused


def test_a_killed_build_goes_on_with_the_teacher_that_it_was_at(tmp_path: Path, images: ImageSet) -> None:
    whole = bank.build(tmp_path / "whole", makers(1, 2, 3), images, classes=CLASSES)

    def killed() -> nn.Module:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bank.build(tmp_path / "bank", [*makers(1), killed, never], images, classes=CLASSES)
    assert [path.name for path in (tmp_path / "bank").iterdir()] == ["teacher-0.npy"]
    events: list[Event] = []
    resumed = bank.build(
        tmp_path / "bank", [never, *makers(2, 3)], images, classes=CLASSES, emit=events.append
    )
    assert resumed.losses == whole.losses
    assert all(np.array_equal(*pair) for pair in zip(resumed.logits, whole.logits, strict=True))
    assert events[0].detail.endswith("1 of the teachers stored before")


def test_a_teacher_interrupted_in_its_midst_leaves_no_file(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "STATISTICS_BATCH", 12)

    class Failing(Net):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Failing.calls += 1
            if Failing.calls == 2:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        bank.build(tmp_path, [lambda: Failing(1)], images, classes=CLASSES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no array", np.zeros((COUNT, CLASSES)), np.zeros((3, 4), "f2")])
def test_a_file_that_is_no_such_array_is_computed_again(
    tmp_path: Path, images: ImageSet, content: bytes | np.ndarray[tuple[int, int], np.dtype[np.float64]]
) -> None:
    path = tmp_path / "teacher-0.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    built = bank.build(tmp_path, makers(1), images, classes=CLASSES)
    assert np.allclose(built.logits[0], on_batch_statistics(Net(1), images).numpy(), rtol=2e-3, atol=2e-3)


def test_a_bit_that_flipped_is_computed_again(tmp_path: Path, images: ImageSet) -> None:
    bank.build(tmp_path, makers(1, 2), images, classes=CLASSES)
    path = tmp_path / "teacher-1.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(RunError, match=r"teacher-1.npy: holds no logits"):
        bank.open_bank(tmp_path, 2, images, classes=CLASSES)
    bank.build(tmp_path, [never, *makers(2)], images, classes=CLASSES)
    assert path.read_bytes() == whole


def test_a_built_bank_is_opened_without_its_networks(tmp_path: Path, images: ImageSet) -> None:
    built = bank.build(tmp_path, makers(1, 2), images, classes=CLASSES)
    opened = bank.open_bank(tmp_path, 2, images, classes=CLASSES)
    assert opened.losses == built.losses
    with pytest.raises(
        RunError, match=r"teacher-2.npy: holds no logits of 23 images in 4 classes; build the"
    ):
        bank.open_bank(tmp_path, 3, images, classes=CLASSES)


def test_the_size_is_said_before_anything_is_computed(tmp_path: Path, images: ImageSet) -> None:
    events: list[Event] = []

    def make() -> nn.Module:
        assert [event.kind for event in events] == ["note"]
        return Net(1)

    bank.build(tmp_path, [make], images, classes=CLASSES, emit=events.append)
    assert (events[0].name, events[0].fields) == ("memory bank", (("bytes", 23 * 4 * 2),))
    assert events[0].detail == "teachers x images x classes: 1 x 23 x 4 in float16, 184 bytes"
    assert [(event.done, event.total) for event in events[1:]] == [(1, 1)]


def test_a_full_disk_is_found_out_beforehand(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 367))
    folder = tmp_path / "not" / "yet" / "there"
    with pytest.raises(
        RunError,
        match="the memory bank needs 368 bytes more, and the disk has 367 bytes free; free some space",
    ):
        bank.build(folder, [never, never], images, classes=CLASSES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 368))
    bank.build(folder, makers(1, 2), images, classes=CLASSES)
    # What is stored needs no room again.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 0))
    bank.build(folder, [never, never], images, classes=CLASSES)


@pytest.mark.parametrize(("bias", "shown"), [(1e5, "100000"), (float("nan"), "nan")])
def test_a_logit_beyond_float16_is_refused(tmp_path: Path, images: ImageSet, bias: float, shown: str) -> None:
    network = Net(1)
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.fill_(bias)
    with pytest.raises(RunError, match=f"teacher-0: a logit of {shown.replace('100000', '100000|1e.05')}"):
        bank.build(tmp_path, [lambda: network], images, classes=CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_other_classes_is_refused(tmp_path: Path, images: ImageSet) -> None:
    with pytest.raises(RunError, match="teacher-0: has 4 classes, the bank 5"):
        bank.build(tmp_path, makers(1), images, classes=5)


def test_images_without_labels_have_no_losses(tmp_path: Path, images: ImageSet) -> None:
    with pytest.raises(UsageError, match="needs labelled calibration images"):
        bank.build(tmp_path, [never], replace(images, labels=None), classes=CLASSES)
