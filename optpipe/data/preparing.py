"""The one rule by which pixels become a network's input, whatever its resolution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from optpipe.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

CROP_RATIO = 0.875
LARGEST = 16384
"""Height and width of the largest images that a network may be given."""
MOST_PIXELS = 2**28
"""Of an image on its way to its size: a strip of a few pixels' height, to be cropped, takes gigabytes."""

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


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


def at_size(preprocess: Preprocess, hw: tuple[int, int]) -> Preprocess:
    """The same preparation for images of another size (H, W).

    Images that stay as they are, without ``size``, are never cropped: at another size they are squashed,
    so that they still show all of what they did.
    """
    mode = "squash" if preprocess.size is None else preprocess.resize
    return dataclasses.replace(preprocess, size=hw, resize=mode)


def check_preprocess(preprocess: Preprocess, channels: int) -> None:
    """UsageError where images of that many channels cannot be prepared so."""
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
    if preprocess.size is not None and not 0 < min(preprocess.size) <= max(preprocess.size) <= LARGEST:
        raise UsageError(
            f"preprocess size = {list(preprocess.size)}: height and width must be above 0 and at most "
            f"{LARGEST}"
        )


def resize(image: Pixels, preprocess: Preprocess) -> Pixels:
    """The image (H, W, C) at the size of ``preprocess``; the same array where it has that size already.

    Pillow's resampling works in integers: the pixels are the same on every machine.
    """
    if preprocess.size is None:
        return image
    from PIL import Image

    height, width = image.shape[:2]
    crop_h, crop_w = new_h, new_w = preprocess.size
    if preprocess.resize == "crop":
        box_h, box_w = round(crop_h / CROP_RATIO), round(crop_w / CROP_RATIO)
        if height * box_w <= width * box_h:
            new_h, new_w = box_h, width * box_h // height
        else:
            new_h, new_w = height * box_w // width, box_w
    if new_h * new_w > MOST_PIXELS:
        raise UsageError(
            f"an image of {height} x {width} is too narrow: to crop it, it would be resized to {new_h} x "
            f'{new_w}; leave it out, or set resize = "squash"'
        )
    if (new_h, new_w) != (height, width):
        bands = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2])]
        size = (new_w, new_h)
        image = np.stack(
            [np.asarray(band.resize(size, Image.Resampling.BILINEAR)) for band in bands], axis=-1
        )
    if (new_h, new_w) == (crop_h, crop_w):
        return image
    top, left = round((new_h - crop_h) / 2), round((new_w - crop_w) / 2)
    return image[top : top + crop_h, left : left + crop_w]


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scaled and normalised images, float32 (N, C, H, W), of uint8 pixels (N, C, H, W)."""
    import torch

    return (pixels.float() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def network_input(images: Pixels | Sequence[Pixels], preprocess: Preprocess) -> Tensor:
    """What a network takes, float32: (C, h, w) of one uint8 image (H, W, C), (N, C, h, w) of several.

    Several images, a sequence of them or one array (N, H, W, C), may differ in size where ``preprocess``
    has one. Raises UsageError for anything else.
    """
    import torch

    single = isinstance(images, np.ndarray) and images.ndim == 3
    channels = len(preprocess.mean)
    found: list[Pixels] = []
    for image in [images] if single else images:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
            what = type(image).__name__
            if isinstance(image, np.ndarray):
                what = f"{image.dtype} of shape {image.shape}"
            raise UsageError(f"an image is {what}; images are uint8 arrays (H, W, C)")
        if image.shape[2] != channels:
            raise UsageError(f"an image is {image.shape}; the network takes {channels} channels (H, W, C)")
        found.append(resize(image, preprocess))
    sizes = sorted({image.shape[:2] for image in found})
    if len(sizes) != 1:
        raise UsageError(
            f"images have {len(sizes)} different sizes, and are not resized: give at least one, of one size"
        )
    stacked = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)
    prepared = normalised(stacked, preprocess.mean, preprocess.std).contiguous()
    return prepared[0] if single else prepared
