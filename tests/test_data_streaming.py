"""Sets that are too large for memory: the same images, digests and parts as those that are held."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from optpipe import data
from optpipe.data import DataSpec, ImageSet, Preprocess, load_images, streaming
from optpipe.errors import UsageError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
PLAIN = Preprocess(MEAN, STD)
SIZED = Preprocess(MEAN, STD, (10, 8))
CROPPED = Preprocess(MEAN, STD, (12, 12), "crop")
COUNT = 12


def random_pixels(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def in_folder(home: Path) -> DataSpec:
    """Two classes of images of different sizes, one of which cannot be read."""
    for number in range(COUNT):
        path = home / "images" / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(20 + number, 30 - number, 3, seed=number)).save(path)
    (home / "images" / "ant" / "4.png").write_bytes(b"no image")
    return DataSpec(str(home / "images"), seed=3)


def in_array(home: Path) -> DataSpec:
    np.savez(home / "plain.npz", labels=np.arange(COUNT) % 4, images=random_pixels(COUNT, 12, 10, 3))
    return DataSpec(str(home / "plain.npz"), count=9, seed=3, skip=1)


def in_small_array(home: Path) -> DataSpec:
    np.savez_compressed(
        home / "packed.npz", images=random_pixels(COUNT, 12, 10, 3), labels=np.arange(COUNT) % 4
    )
    return DataSpec(str(home / "packed.npz"), seed=3)


def in_function(home: Path) -> DataSpec:
    (home / "streamed_images.py").write_text(
        "import numpy as np\n"
        "def images():\n"
        f"    return np.random.default_rng(1).integers(0, 256, ({COUNT}, 12, 10, 3), dtype=np.uint8), None\n"
    )
    return DataSpec("streamed_images:images", seed=3)


SOURCES = [in_folder, in_array, in_small_array, in_function]
Load = Callable[[DataSpec, Preprocess], tuple[ImageSet, ImageSet]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A function that loads a set twice: held, and streamed."""

    def both(spec: DataSpec, preprocess: Preprocess) -> tuple[ImageSet, ImageSet]:
        held = load_images(spec, preprocess, 3, tmp_path)
        monkeypatch.setattr(streaming, "most_held", lambda: 1000)
        streamed = load_images(spec, preprocess, 3, tmp_path)
        assert held.stream is None and streamed.stream is not None
        return held, streamed

    return both


def assert_same(held: ImageSet, other: ImageSet) -> None:
    places = list(np.random.default_rng(0).permutation(len(held)))
    assert torch.equal(held.batch(places), other.batch(places))
    assert torch.equal(held.batch(slice(1, 4)), other.batch(slice(1, 4)))
    assert torch.equal(held.planes(slice(None)), other.planes(slice(None)))
    assert (held.digest, held.names, held.skipped) == (other.digest, other.names, other.skipped)
    assert (len(held), held.shape, held.class_folders) == (len(other), other.shape, other.class_folders)
    assert (held.labels is None) == (other.labels is None)
    assert held.labels is None or other.labels is None or torch.equal(held.labels, other.labels)


@pytest.mark.parametrize("preprocess", [SIZED, CROPPED], ids=["squash", "crop"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_streamed_set_is_the_one_that_is_held(
    source: Callable[[Path], DataSpec], preprocess: Preprocess, load: Load, tmp_path: Path
) -> None:
    held, streamed = load(source(tmp_path), preprocess)
    assert_same(held, streamed)
    assert data.overlap(held, streamed) == data.overlap(streamed, held) == len(held)


@pytest.mark.parametrize("source", SOURCES[1:])
def test_images_that_keep_their_size_are_streamed_too(
    source: Callable[[Path], DataSpec], load: Load, tmp_path: Path
) -> None:
    held, streamed = load(source(tmp_path), PLAIN)
    assert_same(held, streamed)
    assert_same(data.resized(held, (7, 9)), data.resized(streamed, (7, 9)))


@pytest.mark.parametrize("source", SOURCES)
def test_a_streamed_set_is_resized_from_its_source(
    source: Callable[[Path], DataSpec], load: Load, tmp_path: Path
) -> None:
    held, streamed = load(source(tmp_path), SIZED)
    larger = data.resized(streamed, (14, 9))
    assert larger.stream is not None
    assert_same(data.resized(held, (14, 9)), larger)
    smaller = data.resized(larger, (3, 3))
    assert smaller.stream is None, "so small a set is held"
    assert_same(data.resized(held, (3, 3)), smaller)
    assert data.resized(streamed, (10, 8)) is streamed


@pytest.mark.parametrize("source", SOURCES)
def test_a_part_of_a_streamed_set_is_held_where_it_is_small(
    source: Callable[[Path], DataSpec], load: Load, tmp_path: Path
) -> None:
    held, streamed = load(source(tmp_path), SIZED)
    for chosen, is_held in (([5, 0, 7], True), ([6, 1, 5, 2, 0], False)):
        part = data.part(streamed, chosen)
        assert (part.stream is None) == is_held
        assert_same(data.part(held, chosen), part)
        assert_same(data.resized(data.part(held, chosen), (14, 9)), data.resized(part, (14, 9)))
        assert_same(data.part(data.part(held, chosen), [1, 0, 2]), data.part(part, [1, 0, 2]))


def test_a_streamed_set_has_no_pixels_that_could_be_taken_for_images(load: Load, tmp_path: Path) -> None:
    _, streamed = load(in_array(tmp_path), PLAIN)
    with pytest.raises(RuntimeError, match="meta tensor"):
        streamed.pixels.sum().item()


def test_colours_that_are_grey_have_one_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "grey.npz", images=random_pixels(COUNT, 12, 10))
    spec, grey = DataSpec(str(tmp_path / "grey.npz")), Preprocess((0.5,), (0.5,))
    held = load_images(spec, grey, 1)
    monkeypatch.setattr(streaming, "most_held", lambda: 1000)
    assert_same(held, load_images(spec, grey, 1))


# ---------------------------------------------------------------- what changes meanwhile


def test_an_image_that_is_another_one_by_now_is_named(load: Load, tmp_path: Path) -> None:
    _, streamed = load(in_folder(tmp_path), SIZED)
    name = streamed.names[2]
    Image.fromarray(random_pixels(9, 9, 3, seed=99)).save(tmp_path / "images" / name)
    assert streamed.batch([0, 1, 3]).shape[0] == 3
    with pytest.raises(UsageError, match=rf"data: {name} is not what it was when it was first read"):
        streamed.batch([1, 2])


def test_an_image_that_is_gone_is_named(load: Load, tmp_path: Path) -> None:
    _, streamed = load(in_folder(tmp_path), SIZED)
    (tmp_path / "images" / streamed.names[2]).unlink()
    with pytest.raises(UsageError, match=rf"{streamed.names[2]} can no longer be read"):
        streamed.batch([2])
    with pytest.raises(UsageError, match=rf"{streamed.names[2]} can no longer be read"):
        data.resized(streamed, (5, 5))


def test_a_file_that_is_made_shorter_ends_in_a_line_and_not_in_a_signal(load: Load, tmp_path: Path) -> None:
    spec = in_array(tmp_path)
    _, streamed = load(spec, PLAIN)
    os.truncate(spec.source, 600)
    with pytest.raises(UsageError, match=r"plain\.npz: ends before image \d+; while a run is at work"):
        streamed.batch(slice(None))


# ---------------------------------------------------------------- files


def damage(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("source", [in_array, in_small_array])
def test_a_damaged_archive_is_refused_as_a_small_one_is(
    source: Callable[[Path], DataSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = source(tmp_path)
    damage(Path(spec.source), 0.6)
    for most in (10**9, 1000):
        monkeypatch.setattr(streaming, "most_held", lambda most=most: most)
        with pytest.raises(UsageError, match=r"not a readable \.npz file"):
            load_images(spec, PLAIN, 3)


@pytest.mark.parametrize("key", ["transposed", "wide"])
def test_arrays_that_are_no_plain_images_are_numpys_to_read(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = random_pixels(3, 10, 12, COUNT)
    images = pixels.T if key == "transposed" else pixels.astype(np.int64)
    np.savez(tmp_path / "odd.npz", images=images)
    monkeypatch.setattr(streaming, "most_held", lambda: 1000)
    spec = DataSpec(str(tmp_path / "odd.npz"))
    if key == "wide":
        with pytest.raises(UsageError, match="images are int64; they must be uint8"):
            load_images(spec, PLAIN, 3)
    else:
        streamed = load_images(spec, PLAIN, 3)
        index = int(streamed.names[0].removeprefix("odd.npz[").removesuffix("]"))
        assert np.array_equal(streamed.planes([0])[0].permute(1, 2, 0).numpy(), pixels.T[index])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_unpacked_archive_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(streaming, "most_held", lambda: 1000)
    before = open_files()
    streamed = load_images(in_small_array(tmp_path), PLAIN, 3)
    assert list(temporary.iterdir()) == []
    assert open_files() == before + 1
    del streamed
    gc.collect()
    assert open_files() == before


def test_an_archive_that_has_no_room_to_be_unpacked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = in_small_array(tmp_path)
    monkeypatch.setattr(streaming, "most_held", lambda: 1000)
    room = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(UsageError, match=r"packed\.npz: is compressed, and unpacking .* set TMPDIR to"):
        load_images(spec, PLAIN, 3)


# ---------------------------------------------------------------- where it switches


def test_an_eighth_of_memory_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(streaming, "_LIMITS", (limit, tmp_path / "missing"))
    assert streaming.most_held() == physical // 8
    for text, expected in (("max\n", physical // 8), ("8000000\n", 1_000_000), (f"{2**60}\n", physical // 8)):
        limit.write_text(text)
        assert streaming.most_held() == expected


def test_a_set_is_held_up_to_that_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(in_array(tmp_path), count=None, skip=0)
    for most, is_held in ((COUNT * 360, True), (COUNT * 360 - 1, False)):
        monkeypatch.setattr(streaming, "most_held", lambda most=most: most)
        assert (load_images(spec, PLAIN, 3).stream is None) == is_held
