"""Any number of images, cut into the batches that an engine takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe.errors import RunError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def batches(
    images: NDArray[np.float32], shape: Sequence[int], engine: Path
) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Contiguous float32 batches of exactly ``shape`` (N, C, H, W), each with how many images are in it.

    The last one is padded with zeros. The strides of ``images`` do not matter, and a batch is the caller's
    to keep. Raises RunError where the images are not of the engine's shape; any number but 0 is.
    """
    import numpy as np

    if images.ndim != 4 or images.shape[1:] != tuple(shape[1:]) or not len(images):
        raise RunError(f"{engine} takes images of shape {shape_text(shape)}, got {shape_text(images.shape)}")
    for start in range(0, len(images), shape[0]):
        part = images[start : start + shape[0]]
        batch = np.zeros(shape, np.float32)
        batch[: len(part)] = part
        yield batch, len(part)


def shape_text(shape: Sequence[object]) -> str:
    """A shape as messages write it: 16x3x32x32."""
    return "x".join(str(size) for size in shape)
