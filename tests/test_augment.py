"""Augmentation: what each step may do to an image, and that the generator alone decides it."""

from __future__ import annotations

import pytest
import torch

from optpipe.augment import augment, color, cutmix, flip, resized_crop, shift

KINDS = ("none", "resized_crop", "shift", "shift_color", "shift_cutmix")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 32, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=generator(99))


def ramp(count: int, height: int, width: int) -> torch.Tensor:
    """Channel 0 holds each pixel's row, channel 1 its column."""
    rows = torch.arange(height).float()[:, None].expand(height, width)
    columns = torch.arange(width).float()[None, :].expand(height, width)
    return torch.stack([rows, columns]).expand(count, 2, height, width).contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_shape_and_leaves_its_input(kind: str) -> None:
    images = pictures(height=12, width=20)
    before = images.clone()
    out = augment(kind, images, generator())
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "shift_color"])
def test_every_kind_that_leaves_colours_alone_keeps_the_range(kind: str) -> None:
    images = pictures(height=12, width=20)
    out = augment(kind, images, generator())
    assert out.min() >= images.min() - 1e-5
    assert out.max() <= images.max() + 1e-5


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_generator_alone_decides(kind: str) -> None:
    images = pictures()
    torch.manual_seed(1)
    first = augment(kind, images, generator(3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, augment(kind, images, generator(3)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, augment(kind, images, generator(4)))


def test_none_gives_the_images_themselves() -> None:
    images = pictures()
    assert augment("none", images, generator()) is images


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_image_is_fine(kind: str) -> None:
    assert augment(kind, pictures(1), generator()).shape == (1, 3, 16, 16)


def test_a_flip_mirrors_some_images_and_leaves_the_others() -> None:
    images = pictures(64)
    out = flip(images, generator())
    mirrored = [torch.equal(o, i.flip(2)) for o, i in zip(out, images, strict=True)]
    same = [torch.equal(o, i) for o, i in zip(out, images, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_a_shift_moves_whole_pixels_by_at_most_an_eighth_and_mirrors_the_border() -> None:
    out = shift(ramp(200, 16, 24), generator())
    down = out[:, 0, 8, 12] - 8
    right = out[:, 1, 8, 12] - 12
    assert sorted(set(down.tolist())) == [-2, -1, 0, 1, 2]
    assert sorted(set(right.tolist())) == [-3, -2, -1, 0, 1, 2, 3]
    assert out[down == -2][0, 0, :4, 0].tolist() == [2, 1, 0, 1]
    assert out[right == 3][0, 1, 0, -4:].tolist() == [23, 22, 21, 20]


def test_a_shifted_view_is_a_flip_of_a_shift() -> None:
    images = pictures()
    draws = generator(5)
    assert torch.equal(augment("shift", images, generator(5)), flip(shift(images, draws), draws))


def test_colours_change_after_the_same_shift_and_flip() -> None:
    images, draws = pictures(), generator(5)
    moved = flip(shift(images, draws), draws)
    assert torch.equal(augment("shift_color", images, generator(5)), color(moved, draws))


def test_contrast_and_brightness_of_one_channel_are_a_factor_around_the_mean_and_a_sum() -> None:
    images = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 2, 2).expand(2000, 1, 2, 2)
    out = color(images, generator()).view(2000, 4)
    brightness = out.mean(dim=1) - 3
    contrast = (out[:, 3] - out[:, 0]) / 5
    expected = 3 + brightness[:, None] + contrast[:, None] * torch.tensor([-2.0, -1.0, 0.0, 3.0])
    assert torch.allclose(out, expected, atol=1e-5)
    assert -0.4 <= brightness.min() < -0.39
    assert 0.39 < brightness.max() <= 0.4
    assert 0.8 - 1e-5 <= contrast.min() < 0.81
    assert 1.19 < contrast.max() <= 1.2 + 1e-5
    assert torch.corrcoef(torch.stack([brightness, contrast]))[0, 1].abs() < 0.1


def test_contrast_is_the_same_before_and_after_normalising() -> None:
    pixels = torch.rand(4, 1, 8, 8, generator=generator(1))
    mean, std = 0.4, 0.2
    out = color((pixels - mean) / std, generator(3)) * std + mean
    contrast = color(pixels, generator(3))
    # The additive brightness is in normalised units; contrast is all else.
    assert torch.allclose(out - out.mean((2, 3), True), contrast - contrast.mean((2, 3), True), atol=1e-6)


def test_saturation_scales_how_far_the_channels_are_apart() -> None:
    images = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1).expand(2000, 3, 2, 2)
    out = color(images, generator())[:, :, 0, 0]
    saturation = (out[:, 2] - out[:, 0]) / 5
    assert torch.allclose(out[:, 1] - out[:, 0], saturation, atol=1e-5)
    assert 0.8 - 1e-5 <= saturation.min() < 0.81
    assert 1.19 < saturation.max() <= 1.2 + 1e-5
    # One plane has no contrast of its own, and saturation keeps the mean of the channels.
    assert (out.mean(dim=1) - 3).abs().max() <= 0.4 + 1e-5


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_without_three_channels_there_is_no_saturation(channels: int) -> None:
    images = torch.arange(channels).float().view(1, channels, 1, 1).expand(64, channels, 2, 2)
    out = color(images, generator())[:, :, 0, 0]
    assert torch.allclose(out - out[:, :1], images[:, :, 0, 0], atol=1e-6)


def test_each_image_of_a_batch_has_colours_of_its_own() -> None:
    images = pictures(1).expand(16, -1, -1, -1)
    out = color(images, generator())
    assert len({float(picture.mean()) for picture in out}) == 16


def test_a_resized_crop_is_an_even_enlargement_of_a_part_inside_the_image() -> None:
    out = resized_crop(ramp(2000, 32, 32), generator())
    rows, columns = out[:, 0, 12:20, 16], out[:, 1, 16, 12:20]
    down = (rows[:, -1] - rows[:, 0]) / 7
    across = (columns[:, -1] - columns[:, 0]) / 7
    assert torch.allclose(rows.diff(dim=1), down[:, None].expand(-1, 7), atol=1e-3)
    area, ratio = down * across, across / down
    assert 0.08 - 1e-3 < area.min() < 0.1
    assert 0.9 < area.max() < 1 + 1e-3
    assert 0.75 - 1e-3 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 4 / 3 + 1e-3
    assert 0 <= out.min() <= out.max() <= 31


def test_a_resized_crop_of_one_colour_is_that_colour() -> None:
    images = torch.tensor([0.5, -1.0, 2.0])[None, :, None, None].expand(64, 3, 16, 24)
    assert torch.allclose(resized_crop(images, generator()), images, atol=1e-6)


def test_cutmix_puts_a_rectangle_of_one_other_image_into_each() -> None:
    count, size = 256, 16
    images = torch.arange(count).float()[:, None, None, None].expand(count, 1, size, size).contiguous()
    out = cutmix(images, generator())
    shares = []
    for number, picture in enumerate(out[:, 0]):
        foreign = picture != number
        shares.append(foreign.float().mean().item())
        rows, columns = foreign.any(dim=1), foreign.any(dim=0)
        assert len(picture[foreign].unique()) <= 1
        assert torch.equal(foreign, rows[:, None] & columns[None, :])
    assert min(shares) == 0
    assert max(shares) > 0.6
    assert 0.2 < sum(shares) / count < 0.45
