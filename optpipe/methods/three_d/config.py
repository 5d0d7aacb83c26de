"""The settings of three dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dimension = Literal["depth", "width", "resolution"]
DIMENSIONS: tuple[Dimension, ...] = ("depth", "width", "resolution")


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of ``[method]``.

    ``dimensions``: along which to prune; with one alone there is nothing to weigh up, and nothing is trained
    before the recovery. ``rounds``: how often each is pruned and fine-tuned for the predictor (Algorithm 1),
    ``epochs`` for how long each time. ``inside``: whether networks between the dimensions are trained too,
    since points on the axes alone tell no product of polynomials from any other. ``validation``: the share
    of the calibration images that these trainings never see, on which their accuracy is taken where the
    recipe has no validation images. ``rank`` and
    ``degree`` are R and K of Eq. 7. ``monotone`` keeps predicted accuracy from falling where less is taken
    out; false is the paper's least squares.

    ``begin``: "nearest" makes the result of that network trained on the way which has most of it taken out
    already, so that those trainings are not lost; "original" of the original, as the paper does.

    ``cost``: "measured" is what the budget counts, taken of networks as they are built; "formula" is
    d w^2 r^2 (Eq. 4), for a budget in MACs. ``widths``: "measured" lets the width be only such a ratio that
    the target executes clearly faster than every larger one, "any" each sixteenth. ``resolution_step``: input
    sizes are multiples of it; by default about a sixteenth of the original's. ``corrections``: how often the
    optimum may be sought again after a network that was built costs otherwise than predicted.
    """

    dimensions: tuple[Dimension, ...] = DIMENSIONS
    rounds: int = 4
    epochs: float = 40.0
    inside: bool = True
    validation: float = 0.2
    rank: int = 1
    degree: int = 3
    monotone: bool = True
    begin: Literal["nearest", "original"] = "nearest"
    cost: Literal["measured", "formula"] = "measured"
    widths: Literal["measured", "any"] = "measured"
    resolution_step: int | None = None
    corrections: int = 3
