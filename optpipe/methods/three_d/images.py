"""Which calibration images train the networks on the way, and which score them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optpipe.types import Images


@dataclass(frozen=True, slots=True)
class Split:
    """The calibration images that trainings see, and those on which their accuracy is taken."""

    fit: tuple[int, ...]
    score: tuple[int, ...]


def split(images: Images, share: float, seed: int) -> Split:
    """That share of the images of each class to score, at least one of each, drawn by the seed."""
    assert images.labels is not None
    labels = images.labels.numpy()
    rng = np.random.default_rng(seed)
    fit: list[int] = []
    score: list[int] = []
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label)).tolist()
        count = min(max(1, round(share * len(own))), len(own) - 1)
        score += own[:count]
        fit += own[count:]
    return Split(tuple(sorted(fit)), tuple(sorted(score)))
