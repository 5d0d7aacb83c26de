"""How well a network does, from its logits. Pure: arrays in, :class:`~optpipe.types.Quality` out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from optpipe.types import Quality

if TYPE_CHECKING:
    from numpy.typing import NDArray


def wilson_ci95(successes: int, count: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion (Wilson 1927), as fractions."""
    z = 1.959963984540054
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def score(
    logits: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    reference: NDArray[np.float32],
    split: str,
) -> Quality:
    """Top-1 (and top-5 from 6 classes on) where there are labels, else agreement with ``reference``.

    ``logits`` and ``reference`` are (N, classes), ``labels`` (N,).
    """
    if labels is None:
        return agreement(logits, reference, split)
    hits = int((logits.argmax(axis=1) == labels).sum())
    top5 = None
    if logits.shape[1] > 5:
        best = np.argpartition(logits, -5, axis=1)[:, -5:]
        top5 = float((best == labels[:, None]).any(axis=1).mean())
    count = len(logits)
    return Quality("top1", hits / count, wilson_ci95(hits, count), count, split, top5)


def agreement(logits: NDArray[np.float32], reference: NDArray[np.float32], split: str) -> Quality:
    """The share of images to which both networks give the same class; arrays are (N, classes)."""
    same = int((logits.argmax(axis=1) == reference.argmax(axis=1)).sum())
    count = len(logits)
    return Quality("agreement", same / count, wilson_ci95(same, count), count, split)
