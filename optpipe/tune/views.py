"""The random views of a step's images."""

from __future__ import annotations

import numpy as np
import torch

from optpipe.augment import augment
from optpipe.types import Tune


def views_of(images: torch.Tensor, tune: Tune, seed: int, step: int) -> torch.Tensor:
    """``tune.views`` views of each image (N, C, H, W), one view of all of them after the other.

    Seed and step decide them; every view has draws of its own. They are made where the images are.
    """
    state = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
    generator = torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
    repeated = images if tune.views == 1 else images.repeat(tune.views, 1, 1, 1)
    return augment(tune.augment, repeated, generator)
