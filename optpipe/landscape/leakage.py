"""How much more images would help: errors on images seen and unseen, and loss leakage (PRACTISE, Eq. 11).

Both rest on the paper's Claim 3: weights fitted to n images scatter with variance 1 / (n I) around those
that all images would give, so that near the minimum of a quadratic loss L of p parameters

- the loss on unseen images is L(n) = L(oo) + c / n, and that on the n images L(oo) - c / n: half of the gap
  between the two is what the number of images is to blame for, and twice the images take half of that away;
- two networks fitted to n images each differ by twice their variance, and the chord between them is highest
  above the loss in the middle, by c / (2 n): Eq. 11 says what the union of their images takes away.

A network that is trained for long on few images knows them by heart, and the first bound is then a rough
one; the second is measured on unseen images alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpipe.errors import UsageError

Errors = NDArray[np.float64]

RESAMPLES = 1000
"""How many sets of images the bootstrap draws for an interval."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and the 95% interval that a bootstrap over images gives it."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Gap:
    """Errors on images that a recovery trained on, and on others.

    ``ratio`` is the error on unseen images as a multiple of that on seen ones after recovery, ``control`` the
    same before, when neither were trained on: what the two sets differ in by themselves. ``growth`` is
    ratio / control. ``doubling`` is the share of the unseen images' error that twice as many images would
    take away, (1 - 1 / growth) / 4 by the module's first point; below 0 is chance.
    """

    seen: float
    unseen: float
    ratio: Estimate
    control: Estimate
    growth: Estimate
    doubling: Estimate


def gap(seen: tuple[Errors, Errors], unseen: tuple[Errors, Errors], rng: np.random.Generator) -> Gap:
    """The gap from the error of each image, before and after recovery, (N,) each; both of a pair alike long.

    Raises UsageError where a set is empty or an error on seen images is 0 or not finite.
    """
    means = []
    for before, after in (seen, unseen):
        if not len(before) or before.shape != after.shape:
            raise UsageError(f"{len(before)} errors before recovery and {len(after)} after it: one an image")
        if not (np.isfinite(before).all() and np.isfinite(after).all() and before.any() and after.any()):
            raise UsageError("without errors above 0 that are finite there is no ratio between them")
        counts = _resampled(len(before), rng)
        means.append((counts @ before, counts @ after))
    (seen_before, seen_after), (unseen_before, unseen_after) = means
    ratio, control = unseen_after / seen_after, unseen_before / seen_before
    growth = ratio / control
    return Gap(
        seen=float(seen[1].mean()),
        unseen=float(unseen[1].mean()),
        ratio=_estimate(ratio),
        control=_estimate(control),
        growth=_estimate(growth),
        doubling=_estimate((1 - 1 / growth) / 4),
    )


@dataclass(frozen=True, slots=True)
class Leakage:
    """Eq. 11 between networks recovered on two halves A and B of n images, all errors on unseen images.

    ``leakage`` is its value; ``relative`` is it divided by the error of the network recovered on all n. By
    the module's second point that is the share of the error that all images in the world would take away,
    and twice as many take away half of it. ``union`` is what going from a half to the whole really took
    away, as a share of the same error (the left side of Eq. 12).
    """

    half: float
    whole: float
    leakage: Estimate
    relative: Estimate
    union: Estimate


def leakage(
    shares: Sequence[float], line: Sequence[Errors], whole: Errors, rng: np.random.Generator
) -> Leakage:
    """Eq. 11 from the errors (N,) of the same images at each share of the line from A to B, and on the whole.

    ``shares`` hold 0, 1 and some between. Raises UsageError without those, or where ``whole`` is all 0.
    """
    inner = [index for index, share in enumerate(shares) if 0 < share < 1]
    if 0 not in shares or 1 not in shares or not inner or not whole.any():
        raise UsageError(
            f"loss leakage takes the shares 0, 1 and some between, and errors; there are {shares}"
        )
    counts = _resampled(len(whole), rng)
    curves = counts @ np.stack(line, axis=1)
    a, b = curves[:, list(shares).index(0)], curves[:, list(shares).index(1)]
    all_images = counts @ whole
    depth = [(1 - shares[i]) * a + shares[i] * b - curves[:, i] for i in inner]
    leak = np.maximum(np.max(depth, axis=0), 0)
    return Leakage(
        half=float((a[0] + b[0]) / 2),
        whole=float(all_images[0]),
        leakage=_estimate(leak),
        relative=_estimate(leak / all_images),
        union=_estimate(((a + b) / 2 - all_images) / all_images),
    )


def _resampled(count: int, rng: np.random.Generator) -> Errors:
    """Weights (1 + RESAMPLES, count) whose product with errors are means: of all, then of drawn images."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.concatenate([np.full((1, count), 1 / count), drawn / count])


def _estimate(values: Errors) -> Estimate:
    """The first value, with the interval that the others give."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), (float(low), float(high)))
