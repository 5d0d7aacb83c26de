import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from optpipe.data import DataSpec, ImageSet, Preprocess, check_classes, load_images, overlap
from optpipe.errors import UsageError
from optpipe.models import ModelSpec, load_model

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "calibration_data"
WEIGHTS = ROOT / "recipes" / "weights"
SHARED = Path(os.environ.get("OPTPIPE_DATA", ROOT.parent / "shared"))

RGB = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
GREY = Preprocess(mean=(0.5,), std=(0.5,))


def random_pixels(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_npz(path: Path, **arrays: NDArray[np.generic]) -> DataSpec:
    np.savez(path, allow_pickle=True, **arrays)
    return DataSpec(str(path))


def save_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def npz(tmp_path: Path) -> DataSpec:
    labels = np.arange(40, dtype=np.uint8) % 10
    return save_npz(tmp_path / "some.npz", images=random_pixels(40, 8, 6, 3), labels=labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of four images each, of different sizes."""
    for label, name in enumerate(("ant", "bee", "cat")):
        for number in range(4):
            pixels = random_pixels(9 + number, 12, 3, seed=10 * label + number)
            save_png(tmp_path / "images" / name / f"{number}.png", pixels)
    return tmp_path / "images"


# ---------------------------------------------------------------- what is loaded


def test_images_labels_and_names_stay_together(npz: DataSpec, tmp_path: Path) -> None:
    images = load_images(npz, RGB, 3)
    with np.load(npz.source) as file:
        pixels, labels = file["images"], file["labels"]
    assert images.shape == (3, 8, 6)
    assert images.labels is not None
    for place, name in enumerate(images.names):
        index = int(name.removeprefix("some.npz[").removesuffix("]"))
        assert np.array_equal(images.pixels[place].permute(1, 2, 0), pixels[index])
        assert images.labels[place] == labels[index]


def test_a_batch_is_scaled_and_normalised_by_channel(npz: DataSpec) -> None:
    images = load_images(npz, RGB, 3)
    batch = images.batch([3, 1])
    assert (batch.dtype, batch.shape) == (torch.float32, (2, 3, 8, 6))
    expected = (images.pixels[3, 2, 4, 5].item() / 255 - 0.3) / 0.5
    assert batch[0, 2, 4, 5].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(images.batch(slice(2, 4)), images.batch([2, 3]))


def test_subsets_of_one_seed_are_disjoint_and_make_up_the_whole(npz: DataSpec) -> None:
    def subset(count: int | None, skip: int = 0, seed: int = 0) -> ImageSet:
        return load_images(DataSpec(npz.source, count=count, skip=skip, seed=seed), RGB, 3)

    first, second, rest = subset(15), subset(15, skip=15), subset(None, skip=30)
    assert len({*first.names, *second.names, *rest.names}) == 40
    assert subset(15).names == first.names
    assert subset(15, seed=1).names != first.names
    assert overlap(first, second) == 0
    assert overlap(first, subset(None)) == 15


def test_the_digest_sees_pixels_labels_and_normalisation(npz: DataSpec, tmp_path: Path) -> None:
    with np.load(npz.source) as file:
        pixels, labels = file["images"], file["labels"]
    changed = pixels.copy()
    changed[7, 0, 0, 0] ^= 1
    relabelled = labels.copy()
    relabelled[7] += 1
    digests = [
        load_images(npz, RGB, 3).digest,
        load_images(DataSpec(npz.source, labels=False), RGB, 3).digest,
        load_images(npz, Preprocess((0.5, 0.4, 0.31), RGB.std), 3).digest,
        load_images(save_npz(tmp_path / "a.npz", images=changed, labels=labels), RGB, 3).digest,
        load_images(save_npz(tmp_path / "b.npz", images=pixels, labels=relabelled), RGB, 3).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert (
        load_images(save_npz(tmp_path / "c.npz", images=pixels, labels=labels), RGB, 3).digest == digests[0]
    )


def test_class_folders_in_order_of_name_give_labels(folder: Path) -> None:
    images = load_images(DataSpec(str(folder)), Preprocess(RGB.mean, RGB.std, size=(8, 8)), 3, classes=3)
    assert images.labels is not None
    assert {(name[:3], int(label)) for name, label in zip(images.names, images.labels, strict=True)} == {
        ("ant", 0),
        ("bee", 1),
        ("cat", 2),
    }


def test_a_flat_folder_has_no_labels_and_a_grey_image_is_repeated(tmp_path: Path) -> None:
    grey = random_pixels(5, 5)
    save_png(tmp_path / "flat" / "grey.png", grey)
    (tmp_path / "flat" / "notes.txt").write_text("not an image")
    images = load_images(DataSpec("flat"), RGB, 3, tmp_path)
    assert images.labels is None
    assert np.array_equal(images.pixels[0], np.stack([grey] * 3))
    assert np.array_equal(load_images(DataSpec("flat"), GREY, 1, tmp_path).pixels[0, 0], grey)


def test_only_the_chosen_files_are_decoded(folder: Path) -> None:
    size = Preprocess(RGB.mean, RGB.std, size=(8, 8))
    chosen = load_images(DataSpec(str(folder), count=4), size, 3).names
    for file in folder.rglob("*.png"):
        if file.relative_to(folder).as_posix() not in chosen:
            file.write_bytes(b"broken")
    assert load_images(DataSpec(str(folder), count=4), size, 3, bad_limit=0).names == chosen


@pytest.mark.parametrize("suffix", ["jpg", "bmp", "webp", "ppm"])
def test_every_common_file_type_is_read(suffix: str, tmp_path: Path) -> None:
    save_png(tmp_path / f"image.{suffix}", np.full((6, 7, 3), 200, dtype=np.uint8))
    images = load_images(DataSpec(str(tmp_path)), RGB, 3)
    assert abs(int(images.pixels.min()) - 200) <= 2
    assert images.shape == (3, 6, 7)


@pytest.mark.parametrize(("height", "width"), [(300, 200), (199, 256), (40, 41)])
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_resizing_is_that_of_torchvision(height: int, width: int, resize: str, tmp_path: Path) -> None:
    pixels = random_pixels(height, width, 3)
    save_png(tmp_path / "image.png", pixels)
    reference: Callable[[Image.Image], Image.Image] = (
        v2.Resize((56, 56)) if resize == "squash" else v2.Compose([v2.Resize(64), v2.CenterCrop(56)])
    )
    preprocess = Preprocess(RGB.mean, RGB.std, (56, 56), "squash" if resize == "squash" else "crop")
    images = load_images(DataSpec(str(tmp_path)), preprocess, 3)
    assert np.array_equal(images.pixels[0].permute(1, 2, 0), np.asarray(reference(Image.fromarray(pixels))))


def test_a_crop_of_another_shape_keeps_the_aspect_ratio(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :], 100, axis=0)
    spec = save_npz(tmp_path / "ramp.npz", images=ramp[None])
    images = load_images(spec, Preprocess(GREY.mean, GREY.std, (56, 28), "crop"), 1)
    assert images.shape == (1, 56, 28)
    row = images.pixels[0, 0, 0].int()
    # 100 pixels became 64, of which the middle 28 are kept: 200 grey levels * 28 / 64.
    assert row[-1] - row[0] == pytest.approx(200 * 27 / 64, abs=2)


def test_a_function_beside_the_recipe_gives_images(tmp_path: Path) -> None:
    (tmp_path / "my_images.py").write_text(
        "import numpy as np\n"
        "def flat():\n    return np.full((3, 4, 4), 9, np.uint8), [0, 1, 2]\n"
        "def wrong():\n    return np.zeros((3, 4, 4), np.uint8)\n"
    )
    images = load_images(DataSpec("my_images:flat"), GREY, 1, tmp_path, classes=3)
    assert images.labels is not None
    assert sorted(images.labels.tolist()) == [0, 1, 2]
    assert set(images.names) == {f"my_images:flat[{index}]" for index in range(3)}
    with pytest.raises(UsageError, match=r"must return \(images, labels or None\), not ndarray"):
        load_images(DataSpec("my_images:wrong"), GREY, 1, tmp_path)


# ---------------------------------------------------------------- what is refused


def test_corrupt_images_are_named_and_skipped_up_to_a_limit(folder: Path) -> None:
    whole = (folder / "ant/1.png").read_bytes()
    (folder / "ant/1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bee/2.png").write_bytes(b"no image")
    size = Preprocess(RGB.mean, RGB.std, size=(8, 8))
    images = load_images(DataSpec(str(folder)), size, 3)
    assert set(images.skipped) == {"ant/1.png", "bee/2.png"}
    assert len(images) == len(images.names) == 10
    with pytest.raises(UsageError, match=r"2 of 12 images cannot be read \(at most 1 may be\): .*png, .*png"):
        load_images(DataSpec(str(folder)), size, 3, bad_limit=1)


def test_by_default_at_most_half_of_the_images_may_be_corrupt(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", random_pixels(4, 4, 3))
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"2 of 3 images cannot be read \(at most 1"):
        load_images(DataSpec(str(tmp_path)), RGB, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec("no.npz"), r"no\.npz: no such file or folder"),
        (DataSpec("empty"), r"empty: no images in this folder"),
        (DataSpec("file.tar"), r"file type '\.tar' is not supported"),
        (DataSpec("broken.npz"), r"broken\.npz: not a readable \.npz"),
        (DataSpec("pickled.npz"), r"pickled\.npz: not a readable \.npz"),
        (DataSpec("mixed"), r"1 images in the folder itself and 1 in folders below it"),
        (DataSpec("mixed/flat.png"), r"file type '\.png'"),
        (DataSpec("small.npz", count=9), r"count = 9, skip = 0 needs 9 images; there are 4"),
        (DataSpec("small.npz", count=3, skip=2), r"count = 3, skip = 2 needs 5 images; there are 4"),
        (DataSpec("small.npz", skip=4), r"skip = 4 needs 5 images; there are 4"),
        (DataSpec("small.npz", count=0), r"count must be above 0"),
        (DataSpec("keys.npz"), r"no key 'images'; the file holds x, y"),
        (DataSpec("float.npz"), r"images are float32 and hold NaN; they must be uint8"),
        (DataSpec("int.npz"), r"images are int64; they must be uint8"),
        (DataSpec("vectors.npz"), r"images have shape \(4, 64\); it must be \(N, H, W, C\)"),
        (DataSpec("grey.npz"), r"shape \(4, 5, 5\) have 1 channels .* the network takes 3"),
        (DataSpec("first.npz"), r"shape \(4, 3, 5, 5\) have 5 channels .* the network takes 3"),
        (DataSpec("none.npz"), r"no images \(shape \(0, 5, 5, 3\)\)"),
        (DataSpec("labels.npz"), r"labels are int64 of shape \(3,\); they must be integers of shape \(4,\)"),
        (DataSpec("soft.npz"), r"labels are float64 of shape \(4,\)"),
    ],
)
def test_data_that_cannot_be_used_gets_one_line(spec: DataSpec, message: str, tmp_path: Path) -> None:
    good = random_pixels(4, 5, 5, 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar").write_bytes(b"")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 broken")
    save_png(tmp_path / "mixed" / "flat.png", good[0])
    save_png(tmp_path / "mixed" / "below" / "image.png", good[0])
    save_npz(tmp_path / "pickled.npz", images=np.array([{}, None], dtype=object))
    save_npz(tmp_path / "small.npz", images=good)
    save_npz(tmp_path / "keys.npz", x=good, y=good)
    save_npz(tmp_path / "float.npz", images=np.full((4, 5, 5, 3), np.nan, dtype=np.float32))
    save_npz(tmp_path / "int.npz", images=good.astype(np.int64))
    save_npz(tmp_path / "vectors.npz", images=random_pixels(4, 64))
    save_npz(tmp_path / "grey.npz", images=random_pixels(4, 5, 5))
    save_npz(tmp_path / "first.npz", images=random_pixels(4, 3, 5, 5))
    save_npz(tmp_path / "none.npz", images=good[:0])
    save_npz(tmp_path / "labels.npz", images=good, labels=np.arange(3))
    save_npz(tmp_path / "soft.npz", images=good, labels=np.arange(4.0))
    with pytest.raises(UsageError, match=message) as caught:
        load_images(spec, RGB, 3, tmp_path)
    assert "\n" not in str(caught.value)


def test_images_of_different_sizes_need_a_size(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"is \d+x12, \w+/\d\.png is \d+x12; give a size"):
        load_images(DataSpec(str(folder)), RGB, 3)


def test_colour_images_do_not_fit_a_grey_network(folder: Path, npz: DataSpec) -> None:
    with pytest.raises(UsageError, match="a colour image, but the network takes 1 channel"):
        load_images(DataSpec(str(folder)), GREY, 1)
    with pytest.raises(UsageError, match=r"3 channels .* the network takes 1"):
        load_images(npz, GREY, 1)


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 60_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UsageError, match=r"deep\.png: more than 8 bits a channel"):
        load_images(DataSpec(str(tmp_path)), GREY, 1)


def test_labels_must_be_those_of_the_network(npz: DataSpec, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"labels go from 0 to 9, but the network has 5 classes \(0 to 4\)"):
        load_images(npz, RGB, 3, classes=5)
    size = Preprocess(RGB.mean, RGB.std, size=(8, 8))
    with pytest.raises(UsageError, match="3 class folders, but the network has 1000 classes"):
        load_images(DataSpec(str(folder)), size, 3, classes=1000)
    unlabelled = load_images(DataSpec(str(folder), labels=False), size, 3, classes=1000)
    check_classes(unlabelled, 1000, "folder")
    assert unlabelled.labels is None


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (GREY, r"mean = \[0\.5\]: 1 values, but the network takes 3 channels"),
        (Preprocess(RGB.mean, (0.1, 0.0, 0.1)), r"std = .*: all values must be above 0"),
        (Preprocess((0.1, float("nan"), 0.1), RGB.std), r"mean = .*: all values must be finite"),
        (Preprocess(RGB.mean, RGB.std, size=(0, 8)), r"size = \[0, 8\]: height and width must be above 0"),
    ],
)
def test_preprocessing_must_fit_the_network(preprocess: Preprocess, message: str, npz: DataSpec) -> None:
    with pytest.raises(UsageError, match=message):
        load_images(npz, preprocess, 3)


# ---------------------------------------------------------------- what is shipped


def shipped(split: str) -> ImageSet:
    preprocess = Preprocess((0.5,), (0.5,), size=(32, 32))
    return load_images(DataSpec(f"digits_{split}.npz"), preprocess, 1, DIGITS, classes=10)


@pytest.mark.parametrize("folder_of", [DIGITS, WEIGHTS], ids=["calibration_data", "weights"])
def test_shipped_files_are_those_of_the_manifest(folder_of: Path) -> None:
    files = json.loads((folder_of / "manifest.json").read_text(encoding="utf-8"))["files"]
    on_disk = {path.name for path in folder_of.iterdir() if path.suffix in (".npz", ".safetensors")}
    assert on_disk == set(files)
    for name, entry in files.items():
        assert hashlib.sha256((folder_of / name).read_bytes()).hexdigest() == entry["sha256"]


def test_shipped_splits_share_no_image() -> None:
    train, calibration, evaluation = shipped("train"), shipped("calibration"), shipped("evaluation")
    assert (len(train), len(calibration), len(evaluation)) == (1047, 200, 550)
    assert overlap(train, calibration) == overlap(train, evaluation) == overlap(calibration, evaluation) == 0


def test_the_shipped_network_scores_what_its_manifest_says() -> None:
    model = load_model(ModelSpec("zoo:resnet20_cifar", "resnet20_digits.safetensors", 10, 1), WEIGHTS)
    manifest = json.loads((WEIGHTS / "manifest.json").read_text(encoding="utf-8"))
    images = shipped("evaluation")
    assert images.labels is not None
    with torch.no_grad():
        top1 = (model(images.batch(slice(None))).argmax(1) == images.labels).double().mean().item()
    assert top1 > 0.95
    # Two images' worth of room: rounding differs from processor to processor.
    assert top1 == pytest.approx(manifest["evaluation"]["top1"], abs=2 / 550)


def test_the_shipped_files_can_be_made_again() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, the source of the digits, is not installed")
    command = [sys.executable, str(ROOT / "benchmarks" / "train_digits.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "data and weights are as the manifests say\n")


@pytest.mark.shared
def test_cifar_calibration_and_test_images_are_disjoint() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no shared data folder at {SHARED}")
    calibration = load_images(DataSpec("train_4660.npz", count=500), RGB, 3, SHARED / "data/cifar10")
    evaluation = load_images(DataSpec("test_423.npz"), RGB, 3, SHARED / "data/cifar10", classes=10)
    assert overlap(calibration, evaluation) == 0
