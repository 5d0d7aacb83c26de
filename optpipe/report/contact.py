"""Many images on one sheet."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

_COLUMNS = 10
_MOST = 100
_LONGEST = 112
_GAP = 2


def contact_sheet(images: NDArray[np.uint8]) -> bytes:
    """A PNG of the first 100 images (N, H, W, C), ten in a row, each at most 112 pixels long.

    Where images have neither 1 nor 3 channels their first one is shown, in grey.
    """
    from PIL import Image

    shown = [_thumbnail(image) for image in images[:_MOST]]
    width, height = shown[0].size
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP)
    sheet = Image.new(shown[0].mode, size, "white")
    for place, image in enumerate(shown):
        row, column = divmod(place, columns)
        sheet.paste(image, (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP)))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _thumbnail(image: NDArray[np.uint8]) -> Image.Image:
    from PIL import Image

    pixels = image if image.shape[2] == 3 else image[..., 0]
    small = Image.fromarray(np.ascontiguousarray(pixels))
    small.thumbnail((_LONGEST, _LONGEST))
    return small
