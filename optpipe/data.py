"""Images from a folder, an .npz file or a function, held in memory at the network's resolution.

Importing this module is light: torch and Pillow come in only when images are loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from optpipe.errors import UsageError
from optpipe.models import call_function

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm"})
CROP_RATIO = 0.875

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Which images: ``[skip : skip + count]`` of a permutation of ``source`` that ``seed`` decides.

    ``source`` is a folder of images, an .npz file with ``images`` and perhaps ``labels``, or a
    "package.module:function" that returns (uint8 images (N, H, W, C), labels or None). Subsets of one
    source with the same seed are disjoint where their ranges are. ``labels = False`` leaves labels out.
    """

    source: str
    labels: bool = True
    count: int | None = None
    seed: int = 0
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How pixels become a network's input: resized to ``size`` (H, W), scaled to 0..1, normalised.

    ``mean`` and ``std`` have one value for each channel. ``resize`` "squash" changes the aspect ratio;
    "crop" keeps it and takes the middle 87.5%. Both are bilinear with antialiasing. Without ``size``
    images stay as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
    resize: Literal["squash", "crop"] = "squash"


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images in memory: ``pixels`` uint8 (N, C, H, W), ``labels`` int64 (N,) or None.

    ``names`` says where each image came from; ``skipped`` names the images that could not be read;
    ``class_folders`` is how many folders the labels were counted from, if they were.
    """

    pixels: Tensor
    labels: Tensor | None
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    skipped: tuple[str, ...] = ()
    class_folders: int | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def batch(self, indices: Sequence[int] | slice) -> Tensor:
        """Normalised images, float32 (N, C, H, W)."""
        import torch

        chosen = self.pixels[indices if isinstance(indices, slice) else list(indices)]
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return (chosen.float() / 255 - mean) / std


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

    _check_preprocess(preprocess, channels)
    source = _open(spec, channels, search_folder)
    chosen = _subset(spec, source)
    limit = min(max(10, len(chosen) // 100), len(chosen) // 2) if bad_limit is None else bad_limit
    kept, pixels = _read(source, chosen, preprocess, limit)
    labels = source.labels[kept] if spec.labels and source.labels is not None else None
    read = set(kept)
    images = ImageSet(
        pixels=torch.from_numpy(pixels),
        labels=None if labels is None else torch.from_numpy(labels),
        names=tuple(source.names[index] for index in kept),
        mean=preprocess.mean,
        std=preprocess.std,
        digest=_digest(pixels, labels, preprocess),
        skipped=tuple(source.names[index] for index in chosen if index not in read),
        class_folders=source.class_folders,
    )
    if classes is not None:
        check_classes(images, classes, source.where)
    return images


def part(images: ImageSet, indices: Sequence[int]) -> ImageSet:
    """Those images of a set, in that order."""
    chosen = list(indices)
    whole = hashlib.sha256(f"{images.digest} {chosen}".encode())
    return dataclasses.replace(
        images,
        pixels=images.pixels[chosen],
        labels=None if images.labels is None else images.labels[chosen],
        names=tuple(images.names[index] for index in chosen),
        digest=whole.hexdigest(),
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
    return [hashlib.sha256(image.numpy().data).digest() for image in images.pixels]


def _digest(pixels: Pixels, labels: Labels | None, preprocess: Preprocess) -> str:
    normalisation = f"{preprocess.mean} {preprocess.std}"
    digest = hashlib.sha256(f"{pixels.shape} {labels is not None} {normalisation}\n".encode())
    digest.update(pixels.data)
    if labels is not None:
        digest.update(labels.data)
    return digest.hexdigest()


# ---------------------------------------------------------------- subset and pixels


def _check_preprocess(preprocess: Preprocess, channels: int) -> None:
    for key, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        if len(values) != channels:
            raise UsageError(
                f"preprocess {key} = {list(values)}: {len(values)} values, but the network takes "
                f"{channels} channels"
            )
        if not all(math.isfinite(value) for value in values):
            raise UsageError(f"preprocess {key} = {list(values)}: all values must be finite")
    if min(preprocess.std) <= 0:
        raise UsageError(f"preprocess std = {list(preprocess.std)}: all values must be above 0")
    if preprocess.size is not None and min(preprocess.size) < 1:
        raise UsageError(f"preprocess size = {list(preprocess.size)}: height and width must be above 0")


def _subset(spec: DataSpec, source: _Source) -> list[int]:
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
    source: _Source, chosen: Sequence[int], preprocess: Preprocess, limit: int
) -> tuple[list[int], Pixels]:
    """Indices that could be read, and their pixels (N, C, H, W)."""
    pixels: Pixels | None = None
    kept: list[int] = []
    bad: list[str] = []
    for index in chosen:
        image = source.read(index)
        if image is None:
            bad.append(source.names[index])
            continue
        resized = _resize(image, preprocess).transpose(2, 0, 1)
        if pixels is None:
            pixels = np.empty((len(chosen), *resized.shape), dtype=np.uint8)
        if resized.shape != pixels.shape[1:]:
            raise UsageError(
                f"data {source.where}: {source.names[index]} is {_height_by_width(resized.shape)}, "
                f"{source.names[kept[0]]} is {_height_by_width(pixels.shape[1:])}; give a size to resize to"
            )
        pixels[len(kept)] = resized
        kept.append(index)
    if pixels is None or len(bad) > limit:
        shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise UsageError(
            f"data {source.where}: {len(bad)} of {len(chosen)} images cannot be read (at most {limit} may "
            f"be): {shown}"
        )
    return kept, pixels[: len(kept)]


def _height_by_width(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]}"


def _resize(image: Pixels, preprocess: Preprocess) -> Pixels:
    """Pillow's resampling, which works in integers: the digest is the same on every machine."""
    from PIL import Image

    if preprocess.size is None:
        return image
    height, width = image.shape[:2]
    crop_h, crop_w = new_h, new_w = preprocess.size
    if preprocess.resize == "crop":
        box_h, box_w = round(crop_h / CROP_RATIO), round(crop_w / CROP_RATIO)
        if height * box_w <= width * box_h:
            new_h, new_w = box_h, width * box_h // height
        else:
            new_h, new_w = height * box_w // width, box_w
    if (new_h, new_w) == (height, width):
        resized = image
    else:
        bands = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2])]
        size = (new_w, new_h)
        resized = np.stack(
            [np.asarray(band.resize(size, Image.Resampling.BILINEAR)) for band in bands], axis=-1
        )
    top, left = round((new_h - crop_h) / 2), round((new_w - crop_w) / 2)
    return resized[top : top + crop_h, left : left + crop_w]


# ---------------------------------------------------------------- sources


@dataclass(frozen=True, slots=True)
class _Source:
    """Images by index; ``read`` gives one as (H, W, C), or None where it cannot be decoded."""

    where: str
    names: Sequence[str]
    read: Callable[[int], Pixels | None]
    labels: Labels | None = None
    class_folders: int | None = None


def _open(spec: DataSpec, channels: int, search_folder: Path) -> _Source:
    path = search_folder / Path(spec.source).expanduser()
    if path.is_dir():
        return _open_folder(path, channels)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise UsageError(
                f"data {path}: file type '{path.suffix}' is not supported; use an .npz or a folder of images"
            )
        return _open_npz(path, channels)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec.source):
        return _open_function(spec.source, channels, search_folder)
    raise UsageError(f"data {path}: no such file or folder")


def _open_folder(root: Path, channels: int) -> _Source:
    """Images of a flat folder, or of class folders: a label is the folder's place in order of name."""
    if channels not in (1, 3):
        raise UsageError(
            f"data {root}: image files have 1 or 3 channels, but the network takes {channels}; use an .npz"
        )
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    flat = _images_among(entries)
    folders = [path for path in entries if path.is_dir()]
    nested = [
        (label, file) for label, folder in enumerate(folders) for file in _images_among(folder.rglob("*"))
    ]
    if flat and nested:
        raise UsageError(
            f"data {root}: {len(flat)} images in the folder itself and {len(nested)} in folders below it; "
            "keep one of the two"
        )
    files = flat or [file for _, file in nested]
    if not files:
        raise UsageError(f"data {root}: no images in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return _Source(
        where=str(root),
        names=[file.relative_to(root).as_posix() for file in files],
        read=lambda index: _decode(files[index], channels),
        labels=np.array([label for label, _ in nested], dtype=np.int64) if nested else None,
        class_folders=len(folders) if nested else None,
    )


def _images_among(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _decode(path: Path, channels: int) -> Pixels | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UsageError(
                    f"data {path}: more than 8 bits a channel ({image.mode}); convert it to 8 bits"
                )
            rgb = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError):
        return None
    if channels == 3:
        return rgb
    grey = rgb[..., :1]
    if not (rgb == grey).all():
        raise UsageError(f"data {path}: a colour image, but the network takes 1 channel; convert it to grey")
    return grey


def _open_npz(path: Path, channels: int) -> _Source:
    try:
        # Given a path, numpy leaves the file open when it turns out to be no .npz.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            keys = list(file)
            images = file["images"] if "images" in keys else None
            labels = file["labels"] if "labels" in keys else None
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"data {path}: not a readable .npz file of plain arrays ({error})") from error
    if images is None:
        raise UsageError(f"data {path}: no key 'images'; the file holds {', '.join(keys) or 'nothing'}")
    return _open_arrays(str(path), path.name, images, labels, channels)


def _open_function(name: str, channels: int, search_folder: Path) -> _Source:
    returned = call_function(name, search_folder)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UsageError(
            f"data '{name}': must return (images, labels or None), not {type(returned).__name__}"
        )
    images, labels = returned
    return _open_arrays(
        f"'{name}'", name, np.asarray(images), None if labels is None else np.asarray(labels), channels
    )


def _open_arrays(
    where: str, stem: str, images: NDArray[np.generic], labels: NDArray[np.generic] | None, channels: int
) -> _Source:
    if images.dtype != np.uint8:
        nan = np.issubdtype(images.dtype, np.floating) and bool(np.isnan(images.astype(np.float64)).any())
        raise UsageError(
            f"data {where}: images are {images.dtype}{' and hold NaN' if nan else ''}; they must be uint8, "
            "0 to 255"
        )
    if images.ndim not in (3, 4):
        raise UsageError(
            f"data {where}: images have shape {images.shape}; it must be (N, H, W, C) or (N, H, W)"
        )
    found = images.shape[3] if images.ndim == 4 else 1
    if found != channels:
        raise UsageError(
            f"data {where}: images of shape {images.shape} have {found} channels in (N, H, W, C), but the "
            f"network takes {channels}"
        )
    if images.size == 0:
        raise UsageError(f"data {where}: no images (shape {images.shape})")
    if labels is not None and (
        not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]
    ):
        raise UsageError(
            f"data {where}: labels are {labels.dtype} of shape {labels.shape}; they must be integers of "
            f"shape ({len(images)},)"
        )
    pixels: Pixels = images.reshape(*images.shape[:3], channels).view(np.uint8)
    return _Source(
        where=where,
        names=[f"{stem}[{index}]" for index in range(len(pixels))],
        read=pixels.__getitem__,
        labels=None if labels is None else labels.astype(np.int64),
    )
