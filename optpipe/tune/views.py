"""The random views of a step's images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from optpipe.augment import Part, augment
from optpipe.types import Images, Tune


def views_of(
    calibration: Images,
    chosen: Sequence[int],
    tune: Tune,
    seed: int,
    step: int,
    *,
    rows: range | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    """``tune.views`` views (views * N, C, H, W) of the images ``chosen``, one view of all after the other.

    With ``rows`` only those of the step's images are looked at, and their views are those that they have
    with all others beside them. Seed and step decide them; every view has draws of its own. They are made on
    ``device``.
    """
    state = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
    generator = torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
    count = len(chosen)
    if rows is None or len(rows) == count:
        return augment(tune.augment, _repeated(calibration, chosen, tune, device), generator)
    places = torch.cat([torch.tensor(rows) + view * count for view in range(tune.views)])
    if tune.augment == "shift_cutmix":
        whole = augment(tune.augment, _repeated(calibration, chosen, tune, device), generator)
        return whole[places.to(device)]
    own = _repeated(calibration, [chosen[row] for row in rows], tune, device)
    return augment(tune.augment, own, generator, Part(count * tune.views, places))


def _repeated(calibration: Images, which: Sequence[int], tune: Tune, device: str) -> torch.Tensor:
    images = calibration.batch(list(which)).to(device)
    return images if tune.views == 1 else images.repeat(tune.views, 1, 1, 1)
