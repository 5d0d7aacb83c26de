"""Which images train the networks on the way, and which score them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from optpipe.types import Images, Scene


@dataclass(frozen=True, slots=True)
class Split:
    """The calibration images that trainings see, and those on which their accuracy is taken.

    These are held out of the calibration images, or the validation images, which are none of them.
    """

    fit: tuple[int, ...]
    score: tuple[int, ...] | Literal["validation"]

    @property
    def trained(self) -> tuple[int, ...] | None:
        """The images of a training; None for all that there are."""
        return None if self.score == "validation" else self.fit


def parts_of(scene: Scene, share: float) -> Split:
    """All calibration images to fit and the validation images to score, else that share of each class."""
    if scene.validation is not None:
        return Split(tuple(range(len(scene.calibration))), "validation")
    return split(scene.calibration, share, scene.seed)


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
