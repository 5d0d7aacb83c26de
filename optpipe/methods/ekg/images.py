"""Which images a search looks at."""

from __future__ import annotations

import numpy as np

from optpipe.errors import UsageError
from optpipe.methods.ekg.config import Config
from optpipe.types import Images


def check(images: Images, config: Config, classes: int) -> None:
    """UsageError where a class has too few images for both sets."""
    assert images.labels is not None
    for label, count in enumerate(np.bincount(images.labels.numpy(), minlength=classes)):
        if count < 2:
            raise UsageError(
                f"[data] calibration: class {label} has {count} images; ekg needs at least two of each "
                f"({config.score_images} to score and {config.tuning_images} to tune, if there are): raise "
                "count, or give images of that class"
            )


def draw(images: Images, config: Config, classes: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(D_val, D_subset): that many images of each class, disjoint, drawn by the seed.

    Where a class has fewer than both need, at most half of its images are for validation. The images are
    those that :func:`check` passed.
    """
    assert images.labels is not None
    labels = images.labels.numpy()
    rng = np.random.default_rng(seed)
    validation: list[int] = []
    subset: list[int] = []
    for label in range(classes):
        own = rng.permutation(np.flatnonzero(labels == label)).tolist()
        count = min(config.score_images, len(own) // 2)
        validation += own[:count]
        subset += own[count : count + config.tuning_images]
    return tuple(rng.permutation(validation).tolist()), tuple(rng.permutation(subset).tolist())
