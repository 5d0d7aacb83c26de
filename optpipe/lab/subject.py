"""What every answer depends on beside the request itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from optpipe import data, graph
from optpipe.errors import UsageError
from optpipe.types import Plan

if TYPE_CHECKING:
    from torch import fx

# Part of every key: raise it when an answer to the same request would come out different.
KEY_VERSION = 2

Origin = Literal["computed", "reused", "cached"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The original, the images that a search may look at, and the seed. Not JSON-able.

    ``validation`` are images that no training sees; None where there are none.
    """

    original: fx.GraphModule
    model_digest: str
    calibration: data.ImageSet
    seed: int
    validation: data.ImageSet | None = None


@dataclass(frozen=True, slots=True)
class Clock:
    """How long to measure: to a half-width of the ratio's 95% interval, or for so many seconds."""

    tolerance: float
    budget_s: float


class Resolutions:
    """A set of images at the sizes of plans.

    One other size than the recipe's is held at a time: sets are large, and a search asks for one size after
    the other.
    """

    def __init__(self, images: data.ImageSet) -> None:
        self._whole = images
        self._last = images

    def shape(self, plan: Plan) -> tuple[int, int, int]:
        """(C, H, W) of the images that the plan's network takes."""
        return graph.image_shape(plan, self._whole.shape)

    def images(self, plan: Plan) -> data.ImageSet:
        """The images at the plan's size."""
        _, height, width = self.shape(plan)
        if (height, width) == self._whole.shape[1:]:
            return self._whole
        if (height, width) != self._last.shape[1:]:
            self._last = self._whole  # the other size goes before this one comes
            self._last = data.resized(self._whole, (height, width))
        return self._last


def refuse_other_size(plan: Plan, shape: tuple[int, int, int], loss: str) -> None:
    """UsageError where a network at another resolution would be compared with the original on each image.

    ``shape`` is (C, H, W) of the original's images, ``loss`` what compares the two.
    """
    _, height, width = graph.image_shape(plan, shape)
    if (height, width) != shape[1:]:
        raise UsageError(
            f'[recover] loss = "{loss}" compares networks on images of one size, and this plan takes images '
            f'of {height}x{width} where the original takes {shape[1]}x{shape[2]}; use loss = "labels"'
        )
