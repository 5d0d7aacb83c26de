"""Sets of images: loaded, cut into parts, and had again at another size."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from optpipe.data import streaming
from optpipe.data.preparing import Pixels, Preprocess, at_size, check_preprocess, normalised, resize
from optpipe.data.sources import DataSpec, Source, open_source
from optpipe.data.streaming import Stream, Taken, gone, planes_of
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

    They are those at ``indices`` of a stored source, of a set in memory whose images never were resized, or
    of what a set that is not in memory reads from.
    """

    source: Stored | ImageSet | Stream
    indices: tuple[int, ...]
    preprocess: Preprocess

    def reader(self) -> Callable[[int], Pixels | None]:
        """Images (H, W, C) by their index in the source."""
        if isinstance(self.source, Stored):
            return self.source.reader()
        if isinstance(self.source, Stream):
            return self.source.read
        pixels = self.source.pixels
        return lambda index: cast("Pixels", pixels[index].permute(1, 2, 0).numpy())


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images: ``pixels`` uint8 (N, C, H, W), ``labels`` int64 (N,) or None.

    A set that is too large for memory has a ``stream``, which reads its images when they are asked for; its
    ``pixels`` then have a shape alone, on torch's meta device. The two kinds are the same in all else.

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
    stream: Stream | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def planes(self, indices: Sequence[int] | slice) -> Tensor:
        """Pixels as they are, uint8 (N, C, H, W)."""
        import torch

        if self.stream is None:
            return self.pixels[indices if isinstance(indices, slice) else list(indices)]
        places = range(len(self))[indices] if isinstance(indices, slice) else indices
        return torch.from_numpy(self.stream.planes(places))

    def batch(self, indices: Sequence[int] | slice) -> Tensor:
        """Normalised images, float32 (N, C, H, W)."""
        return normalised(self.planes(indices), self.mean, self.std)


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
    labels = source.labels if spec.labels else None
    head = streaming.head(labels is not None, preprocess.mean, preprocess.std)
    kept, taken, changed = _read(source, chosen, preprocess, limit, head)
    own = None if labels is None else labels[kept]
    read = set(kept)
    names = tuple(source.names[index] for index in kept)
    stream = taken.stream(source.read, kept, preprocess, names)
    before = Origin(
        stream or Stored(spec, channels, search_folder),
        tuple(kept),
        preprocess if changed else Preprocess(preprocess.mean, preprocess.std),
    )
    images = ImageSet(
        pixels=_tensor(taken.pixels, (len(kept), *taken.image_shape)),
        labels=None if own is None else torch.from_numpy(own),
        names=names,
        mean=preprocess.mean,
        std=preprocess.std,
        digest=taken.digest(own, stream),
        skipped=tuple(source.names[index] for index in chosen if index not in read),
        class_folders=source.class_folders,
        origin=before if changed or stream is not None else None,
        stream=stream,
    )
    if classes is not None:
        check_classes(images, classes, source.where)
    return images


def _tensor(pixels: Pixels | None, shape: tuple[int, ...]) -> Tensor:
    """The pixels of a set in memory; of one that is not, its shape."""
    import torch

    if pixels is None:
        return torch.empty(shape, dtype=torch.uint8, device="meta")
    return torch.from_numpy(pixels)


def part(images: ImageSet, indices: Sequence[int]) -> ImageSet:
    """Those images of a set, in that order."""
    chosen = list(indices)
    whole = hashlib.sha256(f"{images.digest} {chosen}".encode())
    origin = images.origin
    if origin is not None:
        origin = dataclasses.replace(origin, indices=tuple(origin.indices[index] for index in chosen))
    names = tuple(images.names[index] for index in chosen)
    stream = images.stream
    if stream is not None:
        stream = dataclasses.replace(
            stream, indices=stream.indices[chosen], names=names, marks=stream.marks[chosen]
        )
        if len(chosen) * math.prod(images.shape) <= streaming.most_held():
            stream = None
    return dataclasses.replace(
        images,
        pixels=images.planes(chosen) if stream is None else images.pixels[chosen],
        labels=None if images.labels is None else images.labels[chosen],
        names=names,
        digest=whole.hexdigest(),
        origin=origin,
        stream=stream,
    )


def resized(images: ImageSet, hw: tuple[int, int]) -> ImageSet:
    """The same images in the same order at another size (H, W), each resized once, from its source.

    They are those that loading the source at that size gives, digest and all; the set itself where it has
    that size. A source that had to be resized is opened again, and nothing of it is kept.

    Raises:
        UsageError: the size is none, or the source or an image of it is gone.
    """

    if hw == images.shape[1:]:
        return images
    as_they_are = Preprocess(images.mean, images.std)
    origin = images.origin or Origin(images, tuple(range(len(images))), as_they_are)
    preprocess = at_size(origin.preprocess, hw)
    check_preprocess(preprocess, images.shape[0])
    read = origin.reader()
    labels = None if images.labels is None else images.labels.numpy()
    head = streaming.head(labels is not None, images.mean, images.std)
    taken = Taken(len(images), (images.shape[0], *hw), head)
    for place, index in enumerate(origin.indices):
        image = read(index)
        if image is None:
            raise gone(images.names[place])
        taken.add(planes_of(resize(image, preprocess)))
    stream = taken.stream(read, origin.indices, preprocess, images.names)
    return dataclasses.replace(
        images,
        pixels=_tensor(taken.pixels, (len(images), *taken.image_shape)),
        digest=taken.digest(labels, stream),
        origin=origin,
        stream=stream,
    )


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
    if images.stream is not None:
        return [one.tobytes() for one in images.stream.marks]
    return [streaming.mark(image.numpy()) for image in images.pixels]


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
    source: Source, chosen: Sequence[int], preprocess: Preprocess, limit: int, head: streaming.Head
) -> tuple[list[int], Taken, bool]:
    """Indices that could be read, the images at them, and whether any was resized."""
    taken: Taken | None = None
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
        planes = planes_of(at_the_size)
        if taken is None:
            taken = Taken(len(chosen), planes.shape, head)
        if planes.shape != taken.image_shape:
            raise UsageError(
                f"data {source.where}: {source.names[index]} is {_height_by_width(planes.shape)}, "
                f"{source.names[kept[0]]} is {_height_by_width(taken.image_shape)}; give a size to resize to"
            )
        taken.add(planes)
        kept.append(index)
    if taken is None or len(bad) > limit:
        shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise UsageError(
            f"data {source.where}: {len(bad)} of {len(chosen)} images cannot be read (at most {limit} may "
            f"be): {shown}"
        )
    return kept, taken, changed


def _height_by_width(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]}"
