"""Which images a search looks at."""

from __future__ import annotations

import numpy as np

from optpipe.errors import UsageError
from optpipe.methods.ekg.config import Config
from optpipe.types import Images


def draw(images: Images, config: Config, classes: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(D_val, D_subset): that many images of each class, disjoint, drawn by the seed.

    Where a class has fewer than both need, at most half of its images are for validation.
    """
    assert images.labels is not None
    labels = images.labels.numpy()
    rng = np.random.default_rng(seed)
    validation: list[int] = []
    subset: list[int] = []
    for label in range(classes):
        own = rng.permutation(np.flatnonzero(labels == label)).tolist()
        if len(own) < 2:
            raise UsageError(
                f"[data] calibration: class {label} has {len(own)} images; ekg needs at least two of each "
                f"({config.score_images} to score and {config.tuning_images} to tune, if there are)"
            )
        count = min(config.score_images, len(own) // 2)
        validation += own[:count]
        subset += own[count : count + config.tuning_images]
    return tuple(rng.permutation(validation).tolist()), tuple(rng.permutation(subset).tolist())
