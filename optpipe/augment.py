"""Random views of a batch (N, C, H, W), whole batches at once. Pure: random numbers come from a generator.

Where the targets are the original network's own features of the same view, a view need not keep its class
(CutMix); where they are labels, it must.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SHIFT_SHARE = 1 / 8
"""How far a shift moves an image: 4 pixels of 32."""

COLOR_SHARE = 0.2
"""How far contrast and saturation stray from 1."""

BRIGHTNESS = 0.4
"""How far brightness strays from 0, in standard deviations of the data set.

Where the mean is about twice the standard deviation, as in photographs, that is a factor of 0.8 to 1.2.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Which images of a batch of ``count`` are there: those at the indices ``rows``, int64 (N,).

    Random numbers are drawn for the whole batch, so that an image has the same view in any part of it.
    """

    count: int
    rows: torch.Tensor


def augment(
    kind: str, images: torch.Tensor, generator: torch.Generator, part: Part | None = None
) -> torch.Tensor:
    """A random view of every image; ``kind`` is that of :class:`~optpipe.types.Tune`.

    ``part`` says which of a larger batch the images are; CutMix needs them all.
    """
    if kind == "resized_crop":
        return flip(resized_crop(images, generator, part), generator, part)
    if kind == "shift":
        return flip(shift(images, generator, part), generator, part)
    if kind == "shift_color":
        return color(flip(shift(images, generator, part), generator, part), generator, part)
    if kind == "shift_cutmix":
        assert part is None, "an image may get a box of any other"
        return cutmix(flip(shift(images, generator), generator), generator)
    if kind == "none":
        return images
    raise ValueError(f"no augmentation is named {kind!r}")


def flip(images: torch.Tensor, generator: torch.Generator, part: Part | None = None) -> torch.Tensor:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = _uniform(images, generator, part) < 0.5
    return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)


def shift(images: torch.Tensor, generator: torch.Generator, part: Part | None = None) -> torch.Tensor:
    """Each image moved by up to an eighth of its size each way; what comes in is its reflection."""
    height, width = images.shape[2:]
    pad_h, pad_w = max(1, round(height * SHIFT_SHARE)), max(1, round(width * SHIFT_SHARE))
    return crop(F.pad(images, (pad_w, pad_w, pad_h, pad_h), mode="reflect"), (height, width), generator, part)


def crop(
    padded: torch.Tensor, size: tuple[int, int], generator: torch.Generator, part: Part | None = None
) -> torch.Tensor:
    """A piece (N, C, H, W) of each larger image, of ``size`` (H, W), at a random place of its own."""
    count, _, height, width = padded.shape
    drawn = (count if part is None else part.count,)
    top = torch.randint(0, height - size[0] + 1, drawn, generator=generator)
    left = torch.randint(0, width - size[1] + 1, drawn, generator=generator)
    if part is not None:
        top, left = top[part.rows], left[part.rows]
    rows = (top[:, None] + torch.arange(size[0])).to(padded.device)
    columns = (left[:, None] + torch.arange(size[1])).to(padded.device)
    index = torch.arange(count, device=padded.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def color(images: torch.Tensor, generator: torch.Generator, part: Part | None = None) -> torch.Tensor:
    """Each image with its contrast, brightness and saturation changed at random, in this order.

    Images come normalised, and are changed as they are. Contrast scales an image's deviation from the mean
    of each of its channels by 0.8 to 1.2, which is the same before and after normalising. Brightness adds
    one number to all channels, -0.4 to 0.4, where a factor would need the data set's mean. Saturation
    scales the deviation from the mean of the channels by 0.8 to 1.2: nearly that of the pixels, as the
    channels of photographs have nearly one mean and deviation; without 3 channels there is none. Nothing
    is clipped. EKG names the three and gives no strengths.
    """
    draws = (2 * _uniform(images, generator, part, 3) - 1).to(images.device)[:, :, None, None, None]
    middle = images.mean(dim=(2, 3), keepdim=True)
    out = middle + (images - middle) * (1 + COLOR_SHARE * draws[0]) + BRIGHTNESS * draws[1]
    if images.shape[1] != 3:
        return out
    grey = out.mean(dim=1, keepdim=True)
    return grey + (out - grey) * (1 + COLOR_SHARE * draws[2])


def cutmix(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image with a box of another of the batch in its place (Yun et al., CutMix, ICCV 2019).

    The box has the image's aspect ratio, an area uniform in 0..1 of it, and a uniform centre.
    """
    count, _, height, width = images.shape
    partner = images[torch.randperm(count, generator=generator).to(images.device)]
    side, centre_y, centre_x = torch.rand(3, count, 1, generator=generator)
    half = side.sqrt() / 2
    rows = ((torch.arange(height) + 0.5) / height - centre_y).abs() < half
    columns = ((torch.arange(width) + 0.5) / width - centre_x).abs() < half
    inside = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)
    return torch.where(inside, partner, images)


def resized_crop(images: torch.Tensor, generator: torch.Generator, part: Part | None = None) -> torch.Tensor:
    """Each image replaced by a crop of 8% to 100% of its area, of aspect ratio 3/4 to 4/3, resized back.

    These are the customary settings of ImageNet training, which PRACTISE uses. A crop that does not fit is
    narrowed to the image's side, where the customary code draws again.
    """
    count, _, height, width = images.shape
    area = 0.08 + 0.92 * _uniform(images, generator, part)
    log_ratio = (2 * _uniform(images, generator, part) - 1) * math.log(4 / 3)
    ratio = log_ratio.exp() * height / width
    share_w, share_h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    move_x, move_y = 2 * _uniform(images, generator, part, 2) - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = share_w, share_h
    theta[:, 0, 2], theta[:, 1, 2] = move_x * (1 - share_w), move_y * (1 - share_h)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _uniform(
    images: torch.Tensor, generator: torch.Generator, part: Part | None, *leading: int
) -> torch.Tensor:
    """Numbers between 0 and 1 (*leading, N), N for the images that are there."""
    if part is None:
        return torch.rand(*leading, len(images), generator=generator)
    return torch.rand(*leading, part.count, generator=generator)[..., part.rows]
