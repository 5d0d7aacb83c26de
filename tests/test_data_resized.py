"""The same images at another size: each resized once, from its source, by one rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from optpipe import data
from optpipe.data import DataSpec, ImageSet, Preprocess, load_images
from optpipe.deploy import run_engine
from optpipe.errors import UsageError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
PLAIN = Preprocess(MEAN, STD)


def random_pixels(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def npz(tmp_path: Path) -> DataSpec:
    """Twelve images of 12 x 10, some chosen in a random order."""
    np.savez(tmp_path / "some.npz", images=random_pixels(12, 12, 10, 3), labels=np.arange(12) % 4)
    return DataSpec(str(tmp_path / "some.npz"), count=9, seed=3, skip=1)


@pytest.fixture
def folder(tmp_path: Path) -> DataSpec:
    """Two classes of images of different sizes; one cannot be read."""
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = random_pixels(20 + number, 26 - number, 3, seed=10 * label + number)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "ant" / "2.png").write_bytes(b"no image")
    return DataSpec(str(tmp_path / "images"), seed=1)


def assert_same(one: ImageSet, other: ImageSet) -> None:
    assert torch.equal(one.pixels, other.pixels)
    assert one.labels is not None and other.labels is not None
    assert torch.equal(one.labels, other.labels)
    assert (one.names, one.skipped, one.class_folders) == (other.names, other.skipped, other.class_folders)


@pytest.mark.parametrize(
    "preprocess", [PLAIN, Preprocess(MEAN, STD, (12, 10)), Preprocess(MEAN, STD, (16, 16))]
)
def test_a_resized_set_is_what_the_source_gives_at_that_size(npz: DataSpec, preprocess: Preprocess) -> None:
    whole = load_images(npz, preprocess, 3)
    found = data.resized(whole, (7, 9))
    expected = load_images(npz, Preprocess(MEAN, STD, (7, 9)), 3)
    assert found.shape == (3, 7, 9)
    assert_same(found, expected)
    assert found.digest == expected.digest != whole.digest


@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_files_are_read_again_and_what_cannot_be_read_stays_skipped(folder: DataSpec, mode: str) -> None:
    preprocess = Preprocess(MEAN, STD, (16, 16), mode)  # type: ignore[arg-type]
    whole = load_images(folder, preprocess, 3)
    found = data.resized(whole, (8, 12))
    expected = load_images(folder, data.at_size(preprocess, (8, 12)), 3)
    assert whole.skipped == ("ant/2.png",)
    assert_same(found, expected)
    assert found.digest == expected.digest
    # Not what resizing the resized images would give.
    twice = np.stack(
        [
            data.resize(image.permute(1, 2, 0).numpy(), Preprocess(MEAN, STD, (8, 12)))
            for image in whole.pixels
        ]
    )
    assert (twice != found.pixels.permute(0, 2, 3, 1).numpy()).any()


@pytest.mark.parametrize("size", [None, (16, 16)])
def test_a_part_resized_is_a_part_of_the_resized(npz: DataSpec, size: tuple[int, int] | None) -> None:
    whole = load_images(npz, Preprocess(MEAN, STD, size), 3)
    one = data.resized(data.part(whole, [5, 0, 7]), (6, 6))
    assert_same(one, data.part(data.resized(whole, (6, 6)), [5, 0, 7]))
    # And a part of a part.
    assert_same(data.part(one, [2, 1]), data.resized(data.part(whole, [7, 0]), (6, 6)))


@pytest.mark.parametrize("size", [None, (16, 16)])
def test_a_set_has_its_own_size_and_none_is_resized_twice(
    npz: DataSpec, size: tuple[int, int] | None
) -> None:
    whole = load_images(npz, Preprocess(MEAN, STD, size), 3)
    assert data.resized(whole, whole.shape[1:]) is whole
    again = data.resized(data.resized(whole, (5, 5)), (8, 8))
    assert_same(again, data.resized(whole, (8, 8)))
    back = data.resized(data.resized(whole, (5, 5)), whole.shape[1:])
    assert_same(back, whole)
    assert back.digest == whole.digest


def test_images_that_never_were_resized_need_no_source(npz: DataSpec) -> None:
    whole, enlarged = load_images(npz, PLAIN, 3), load_images(npz, Preprocess(MEAN, STD, (16, 16)), 3)
    Path(npz.source).unlink()
    assert data.resized(whole, (6, 6)).shape == (3, 6, 6)
    with pytest.raises(UsageError, match=r"some\.npz: no such file or folder"):
        data.resized(enlarged, (6, 6))


def test_a_file_that_has_gone_bad_since_is_named(folder: DataSpec) -> None:
    whole = load_images(folder, Preprocess(MEAN, STD, (16, 16)), 3)
    (Path(folder.source) / whole.names[4]).write_bytes(b"")
    with pytest.raises(UsageError, match=rf"{whole.names[4]} can no longer be read"):
        data.resized(whole, (8, 8))


def test_a_size_of_nothing_is_refused(npz: DataSpec) -> None:
    with pytest.raises(UsageError, match=r"size = \[0, 8\]: height and width must be above 0"):
        data.resized(load_images(npz, PLAIN, 3), (0, 8))


def test_images_that_stay_as_they_are_are_never_cropped() -> None:
    assert data.at_size(Preprocess(MEAN, STD, None, "crop"), (8, 8)).resize == "squash"
    assert data.at_size(Preprocess(MEAN, STD, (9, 9), "crop"), (8, 8)).resize == "crop"


# ---------------------------------------------------------------- a network's input


@pytest.mark.parametrize(
    "preprocess",
    [
        PLAIN,
        Preprocess(MEAN, STD, (7, 9)),
        Preprocess(MEAN, STD, (8, 8), "crop"),
        Preprocess(MEAN, STD, (20, 20)),
    ],
)
def test_an_image_is_prepared_as_sets_and_the_runner_do(tmp_path: Path, preprocess: Preprocess) -> None:
    pixels = random_pixels(5, 12, 10, 3)
    np.savez(tmp_path / "images.npz", images=pixels)
    order = np.random.default_rng(0).permutation(5)
    expected = load_images(DataSpec(str(tmp_path / "images.npz")), preprocess, 3).batch(slice(None))
    found = data.network_input([pixels[index] for index in order], preprocess)
    assert (found.dtype, found.is_contiguous()) == (torch.float32, True)
    assert torch.equal(found, expected)
    assert torch.equal(data.network_input(pixels[order], preprocess), expected)
    assert torch.equal(data.network_input(pixels[order[2]], preprocess), expected[2])
    fields = {name: getattr(preprocess, name) for name in ("mean", "std", "size", "resize")}
    runner = run_engine.load_images(tmp_path / "images.npz", json.loads(json.dumps(fields)), expected.shape)
    assert np.array_equal(data.network_input(pixels, preprocess).numpy(), runner)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"an image is float32 of shape \(4, 4, 3\); images are uint8"),
        (np.zeros((4, 4), np.uint8), r"an image is uint8 of shape \(4,\)"),
        ([np.zeros((4, 4), np.uint8)], r"an image is uint8 of shape \(4, 4\)"),
        (np.zeros((4, 4, 1), np.uint8), r"an image is \(4, 4, 1\); the network takes 3 channels"),
        (["photo.jpg"], "an image is str; images are uint8"),
        ([], "0 different sizes"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], "2 different sizes"),
    ],
)
def test_what_is_no_image_is_refused(images: NDArray[np.uint8], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        data.network_input(images, PLAIN)
