"""How long a training is, how its learning rate moves, and which images each step sees."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import NDArray

from optpipe.types import Tune


def steps_of(tune: Tune, count: int) -> int:
    """The steps of ``tune.epochs`` over ``count`` images, rounded up; without epochs ``tune.steps``."""
    if tune.epochs is None:
        return tune.steps
    # 1.1 epochs of 100 images in batches of 10 are 11 steps, though the product is a hair above.
    return math.ceil(tune.epochs * count / min(tune.batch, count) - 1e-9)


def with_steps(tune: Tune, count: int) -> Tune:
    """``tune`` with its steps as its epochs decide them for ``count`` images; the epochs stay."""
    return dataclasses.replace(tune, steps=steps_of(tune, count))


def rate(step: int, tune: Tune) -> float:
    """The factor on the learning rate at a step, from 0 to 1."""
    warmup = round(tune.warmup * tune.steps)
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if tune.schedule == "cosine":
        return rise * 0.5 * (1.0 + math.cos(math.pi * step / tune.steps))
    if tune.schedule == "milestones":
        return rise * tune.decay ** sum(step >= round(share * tune.steps) for share in tune.milestones)
    return rise * 0.1 ** (step // max(1, math.ceil(0.4 * tune.steps)))


def batch_indices(count: int, batch: int, seed: int, step: int) -> list[int]:
    """The images of a step: the next ``batch`` of an endless row of seeded permutations of all images."""
    size = min(batch, count)
    begin = step * size
    epochs = range(begin // count, (begin + size - 1) // count + 1)
    row = np.concatenate([_permutation(count, seed, epoch) for epoch in epochs])
    offset = begin - epochs[0] * count
    return [int(index) for index in row[offset : offset + size]]


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch, kept over its steps: for a large set it takes longer than a step's images."""
    return np.random.default_rng([seed, epoch]).permutation(count)
