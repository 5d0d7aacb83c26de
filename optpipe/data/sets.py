"""Sets of images in memory: loaded, cut into parts, and had again at another size."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from optpipe.data.preparing import Labels, Pixels, Preprocess, at_size, check_preprocess, normalised, resize
from optpipe.data.sources import DataSpec, Source, open_source
from optpipe.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """A source that is opened again when its images are needed at another size."""

    spec: DataSpec
    channels: int
    search_folder: Path

    def reader(self) -> Callable[[int], Pixels | None]:
        """Images by their index in the source."""
        return open_source(self.spec, self.channels, self.search_folder).read


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Where the images of a set can be had as they were before they were resized.

    They are those at ``indices`` of a stored source, or of a set in memory whose images never were resized.
    """

    source: Stored | ImageSet
    indices: tuple[int, ...]
    preprocess: Preprocess

    def reader(self) -> Callable[[int], Pixels | None]:
        """Images (H, W, C) by their index in the source."""
        if isinstance(self.source, Stored):
            return self.source.reader()
        pixels = self.source.pixels
        return lambda index: cast("Pixels", pixels[index].permute(1, 2, 0).numpy())


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images in memory: ``pixels`` uint8 (N, C, H, W), ``labels`` int64 (N,) or None.

    ``names`` says where each image came from; ``skipped`` names the images that could not be read;
    ``class_folders`` is how many folders the labels were counted from, if they were. ``origin`` is where
    the images are before resizing; None where these pixels are they.
    """

    pixels: Tensor
    labels: Tensor | None
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    skipped: tuple[str, ...] = ()
    class_folders: int | None = None
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def batch(self, indices: Sequence[int] | slice) -> Tensor:
        """Normalised images, float32 (N, C, H, W)."""
        chosen = self.pixels[indices if isinstance(indices, slice) else list(indices)]
        return normalised(chosen, self.mean, self.std)


def load_images(
    spec: DataSpec,
    preprocess: Preprocess,
    channels: int,
    search_folder: Path = Path(),
    *,
    bad_limit: int | None = None,
    classes: int | None = None,
) -> ImageSet:
    """The images of ``spec``, ready for a network of ``channels`` input channels.

    Relative paths and modules are looked for in ``search_folder``. Up to ``bad_limit`` unreadable files
    are left out and named in ``skipped``; by default 10, or 1% of the subset where that is more, and
    never more than half of it. With ``classes``, labels must fit that many classes. Raises UsageError
    for all that cannot be used as asked.
    """
    import torch

    check_preprocess(preprocess, channels)
    source = open_source(spec, channels, search_folder)
    chosen = _subset(spec, source)
    limit = min(max(10, len(chosen) // 100), len(chosen) // 2) if bad_limit is None else bad_limit
    kept, pixels, changed = _read(source, chosen, preprocess, limit)
    labels = source.labels[kept] if spec.labels and source.labels is not None else None
    read = set(kept)
    images = ImageSet(
        pixels=torch.from_numpy(pixels),
        labels=None if labels is None else torch.from_numpy(labels),
        names=tuple(source.names[index] for index in kept),
        mean=preprocess.mean,
        std=preprocess.std,
        digest=_digest(pixels, labels, preprocess.mean, preprocess.std),
        skipped=tuple(source.names[index] for index in chosen if index not in read),
        class_folders=source.class_folders,
        origin=Origin(Stored(spec, channels, search_folder), tuple(kept), preprocess) if changed else None,
    )
    if classes is not None:
        check_classes(images, classes, source.where)
    return images


def part(images: ImageSet, indices: Sequence[int]) -> ImageSet:
    """Those images of a set, in that order."""
    chosen = list(indices)
    whole = hashlib.sha256(f"{images.digest} {chosen}".encode())
    origin = images.origin
    if origin is not None:
        origin = dataclasses.replace(origin, indices=tuple(origin.indices[index] for index in chosen))
    return dataclasses.replace(
        images,
        pixels=images.pixels[chosen],
        labels=None if images.labels is None else images.labels[chosen],
        names=tuple(images.names[index] for index in chosen),
        digest=whole.hexdigest(),
        origin=origin,
    )


def resized(images: ImageSet, hw: tuple[int, int]) -> ImageSet:
    """The same images in the same order at another size (H, W), each resized once, from its source.

    They are those that loading the source at that size gives, digest and all; the set itself where it has
    that size. A source that had to be resized is opened again, and nothing of it is kept.

    Raises:
        UsageError: the size is none, or the source or an image of it is gone.
    """
    import torch

    if hw == images.shape[1:]:
        return images
    as_they_are = Preprocess(images.mean, images.std)
    origin = images.origin or Origin(images, tuple(range(len(images))), as_they_are)
    preprocess = at_size(origin.preprocess, hw)
    check_preprocess(preprocess, images.shape[0])
    read = origin.reader()
    pixels = np.empty((len(images), images.shape[0], *hw), dtype=np.uint8)
    for place, index in enumerate(origin.indices):
        image = read(index)
        if image is None:
            raise UsageError(f"data: {images.names[place]} can no longer be read; the run needs it again")
        pixels[place] = resize(image, preprocess).transpose(2, 0, 1)
    labels = None if images.labels is None else images.labels.numpy()
    digest = _digest(pixels, labels, images.mean, images.std)
    return dataclasses.replace(images, pixels=torch.from_numpy(pixels), digest=digest, origin=origin)


def check_classes(images: ImageSet, classes: int, source: str) -> None:
    """UsageError where the labels, if there are any, cannot be those of a network of ``classes`` classes."""
    if images.labels is None:
        return
    mend = "choose the data of the network's classes, or set labels = false"
    # A folder's label is its place among the folders, which means nothing when some are absent.
    if images.class_folders not in (None, classes):
        raise UsageError(
            f"data {source}: {images.class_folders} class folders, but the network has {classes} classes; "
            + mend
        )
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"data {source}: labels go from {low} to {high}, but the network has {classes} classes "
            f"(0 to {classes - 1}); {mend}"
        )


def overlap(a: ImageSet, b: ImageSet) -> int:
    """How many images of ``a`` are, pixel for pixel at the network's resolution, in ``b`` too."""
    of_b = set(_image_digests(b))
    return sum(digest in of_b for digest in _image_digests(a))


def _image_digests(images: ImageSet) -> list[bytes]:
    return [hashlib.sha256(image.numpy().data).digest() for image in images.pixels]


def _digest(pixels: Pixels, labels: Labels | None, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    digest = hashlib.sha256(f"{pixels.shape} {labels is not None} {mean} {std}\n".encode())
    digest.update(pixels.data)
    if labels is not None:
        digest.update(labels.data)
    return digest.hexdigest()


def _subset(spec: DataSpec, source: Source) -> list[int]:
    total = len(source.names)
    if spec.skip < 0 or (spec.count is not None and spec.count < 1) or spec.seed < 0:
        raise UsageError(
            f"data {source.where}: count = {spec.count}, skip = {spec.skip}, seed = {spec.seed}: count must "
            "be above 0, skip and seed not below 0"
        )
    needed = spec.skip + (1 if spec.count is None else spec.count)
    if needed > total:
        asked = f"skip = {spec.skip}" if spec.count is None else f"count = {spec.count}, skip = {spec.skip}"
        raise UsageError(f"data {source.where}: {asked} needs {needed} images; there are {total}")
    order = np.random.default_rng(spec.seed).permutation(total)
    chosen: list[int] = order[spec.skip :][: spec.count].tolist()
    return chosen


def _read(
    source: Source, chosen: Sequence[int], preprocess: Preprocess, limit: int
) -> tuple[list[int], Pixels, bool]:
    """Indices that could be read, their pixels (N, C, H, W), and whether any was resized."""
    pixels: Pixels | None = None
    kept: list[int] = []
    bad: list[str] = []
    changed = False
    for index in chosen:
        image = source.read(index)
        if image is None:
            bad.append(source.names[index])
            continue
        at_the_size = resize(image, preprocess)
        changed |= at_the_size is not image
        planes = at_the_size.transpose(2, 0, 1)
        if pixels is None:
            pixels = np.empty((len(chosen), *planes.shape), dtype=np.uint8)
        if planes.shape != pixels.shape[1:]:
            raise UsageError(
                f"data {source.where}: {source.names[index]} is {_height_by_width(planes.shape)}, "
                f"{source.names[kept[0]]} is {_height_by_width(pixels.shape[1:])}; give a size to resize to"
            )
        pixels[len(kept)] = planes
        kept.append(index)
    if pixels is None or len(bad) > limit:
        shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise UsageError(
            f"data {source.where}: {len(bad)} of {len(chosen)} images cannot be read (at most {limit} may "
            f"be): {shown}"
        )
    return kept, pixels[: len(kept)], changed


def _height_by_width(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]}"
