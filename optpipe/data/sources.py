"""Where images come from: a folder, an .npz file or a function."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optpipe.data import archives
from optpipe.data.archives import Rows
from optpipe.data.preparing import Labels, Pixels
from optpipe.errors import UsageError
from optpipe.models import call_function

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "GIF")
"""What an image file may be, whatever it is called: Pillow would hand an EPS to another program."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm"})

Stack = NDArray[np.generic] | Rows
"""Images of one size, (N, H, W, C) or (N, H, W): in memory or in a file."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Which images of a source.

    ``source`` is a folder of images, an .npz file with ``images`` and perhaps ``labels``, or a
    "package.module:function" that returns (uint8 images (N, H, W, C), labels or None). Calibration images of
    ``source`` "synthesize" are made from the network by the run. ``labels`` false leaves labels out. A set
    that would take more than an eighth of the memory is read again, batch by batch, whenever it is looked at.

    The images are ``[skip : skip + count]`` of a permutation of the source that ``seed`` decides, all without
    a ``count``; subsets of one source with the same ``seed`` are disjoint where the ranges of ``skip`` and
    ``count`` are.
    """

    source: str
    labels: bool = True
    count: int | None = None
    seed: int = 0
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Images by index; ``read`` gives one as (H, W, C), or None where it cannot be decoded."""

    where: str
    names: Sequence[str]
    read: Callable[[int], Pixels | None]
    labels: Labels | None = None
    class_folders: int | None = None


def names_function(source: str, search_folder: Path) -> bool:
    """Whether opening a source of this name imports a module of the user's."""
    return _FUNCTION.fullmatch(source) is not None and not (search_folder / source).exists()


def open_source(spec: DataSpec, channels: int, search_folder: Path) -> Source:
    """The source that ``spec`` names; UsageError where it cannot be used."""
    path = search_folder / Path(spec.source).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise UsageError(f"data {path}: cannot be read: {error.strerror}") from None
    if is_folder:
        return _open_folder(path, channels)
    if is_file:
        if path.suffix.lower() != ".npz":
            raise UsageError(
                f"data {path}: file type '{path.suffix}' is not supported; use an .npz or a folder of images"
            )
        return _open_npz(path, channels)
    if _FUNCTION.fullmatch(spec.source):
        return _open_function(spec.source, channels, search_folder)
    raise UsageError(f"data {path}: no such file or folder")


def _open_folder(root: Path, channels: int) -> Source:
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
    # Paths take several times the memory of their names, and there may be a million.
    names = [file.relative_to(root).as_posix() for file in files]
    return Source(
        where=str(root),
        names=names,
        read=lambda index: _decode(root / names[index], channels),
        labels=np.array([label for label, _ in nested], dtype=np.int64) if nested else None,
        class_folders=len(folders) if nested else None,
    )


def _images_among(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _decode(path: Path, channels: int) -> Pixels | None:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which says nothing of the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise UsageError(
                        f"data {path}: more than 8 bits a channel ({image.mode}); convert it to 8 bits"
                    )
                rgb = np.asarray(image.convert("RGB"))
    except (UsageError, MemoryError):
        raise
    except Exception:  # decoders raise whatever a damaged file leads them to; bombs raise too
        return None
    if channels == 3:
        return rgb
    grey = rgb[..., :1]
    if not (rgb == grey).all():
        raise UsageError(f"data {path}: a colour image, but the network takes 1 channel; convert it to grey")
    return grey


def _open_npz(path: Path, channels: int) -> Source:
    try:
        # Given a path, numpy leaves the file open when it turns out to be no .npz.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            keys = list(file)
            images: Stack | None = archives.rows(path, file.zip) if "images" in keys else None
            if images is None and "images" in keys:
                images = file["images"]
            labels = file["labels"] if "labels" in keys else None
    except UsageError:
        raise
    except MemoryError:
        raise UsageError(f"data {path}: its arrays take more memory than there is") from None
    except Exception as error:  # numpy and zipfile raise whatever a damaged file leads them to
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"data {path}: not a readable .npz file of plain arrays ({reason})") from error
    if images is None:
        raise UsageError(f"data {path}: no key 'images'; the file holds {', '.join(keys) or 'nothing'}")
    if not isinstance(images, np.ndarray | Rows) or not isinstance(labels, np.ndarray | None):
        raise UsageError(f"data {path}: not a readable .npz file of plain arrays (one is other bytes)")
    return _open_arrays(str(path), path.name, images, labels, channels)


def _open_function(name: str, channels: int, search_folder: Path) -> Source:
    returned = call_function(name, search_folder)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UsageError(
            f"data '{name}': must return (images, labels or None), not {type(returned).__name__}"
        )
    try:
        images, labels = (None if one is None else np.asarray(one) for one in returned)
    except ValueError as error:
        raise UsageError(f"data '{name}': must return (images, labels or None): {error}") from None
    return _open_arrays(f"'{name}'", name, np.asarray(images), labels, channels)


def _open_arrays(
    where: str, stem: str, images: Stack, labels: NDArray[np.generic] | None, channels: int
) -> Source:
    if isinstance(images, np.ndarray) and images.dtype != np.uint8:
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
    read = images.row if isinstance(images, Rows) else _row_of(images, channels)
    return Source(
        where=where,
        names=[f"{stem}[{index}]" for index in range(len(images))],
        read=read,
        labels=None if labels is None else labels.astype(np.int64),
    )


def _row_of(images: NDArray[np.generic], channels: int) -> Callable[[int], Pixels]:
    pixels: Pixels = images.reshape(*images.shape[:3], channels).view(np.uint8)
    return pixels.__getitem__
