"""Images that a run makes from its network alone: announced before, and found where it keeps them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from optpipe.data.preparing import Labels, Preprocess, check_preprocess
from optpipe.data.sets import ImageSet
from optpipe.data.sources import DataSpec
from optpipe.errors import UsageError
from optpipe.types import Synthesis

SYNTHESIZE = "synthesize"
"""The source of images that are made from the network."""

MOST = 1_000_000
"""How many images can be asked for."""

SYNTHESIZED = "synthesized.npz"
"""Where a run keeps them, in its folder: ``images`` and ``labels`` as in any .npz."""


def check_synthesis(spec: DataSpec, preprocess: Preprocess, settings: Synthesis | None, where: str) -> None:
    """UsageError where calibration images cannot be made as asked, or settings are there for none."""
    if spec.source != SYNTHESIZE:
        if settings is not None:
            raise UsageError(
                f'{where}: [data.synthesize]: needs [data.calibration] source = "{SYNTHESIZE}"; leave this '
                "table out"
            )
        return
    asked = f'{where}: [data.calibration] source = "{SYNTHESIZE}"'
    if preprocess.size is None:
        raise UsageError(f"{asked}: how large are the images? give [data.preprocess] size = [H, W]")
    if spec.count is None or spec.count < 1 or spec.skip or spec.seed < 0:
        raise UsageError(f"{asked}: give how many in count, above 0, a seed not below 0, and no skip")
    if spec.count > MOST:
        raise UsageError(f"{asked}: count = {spec.count}: must be at most {MOST}")
    assert settings is not None
    for key in ("steps", "lr", "batch"):
        value = getattr(settings, key)
        if not 0 < value < math.inf:
            raise UsageError(f"{where}: [data.synthesize] {key} = {value}: must be above 0 and finite")
    for key in ("tv", "l2", "statistics", "competition"):
        value = getattr(settings, key)
        if not 0 <= value < math.inf:
            raise UsageError(f"{where}: [data.synthesize] {key} = {value}: must be finite and not below 0")


def awaited(spec: DataSpec, preprocess: Preprocess, channels: int) -> ImageSet:
    """The set that is to be made, without labels: its pixels have a shape and nothing that could be read.

    They lie on torch's meta device, so that whoever takes them for images is stopped.
    """
    import torch

    assert spec.count is not None and preprocess.size is not None
    check_preprocess(preprocess, channels)
    return ImageSet(
        pixels=torch.empty(spec.count, channels, *preprocess.size, dtype=torch.uint8, device="meta"),
        labels=None,
        names=tuple(f"{SYNTHESIZED}[{index}]" for index in range(spec.count)),
        mean=preprocess.mean,
        std=preprocess.std,
        digest="",
    )


def labelled(images: ImageSet, labels: Labels) -> ImageSet:
    """The same set with these labels (N,)."""
    import torch

    return dataclasses.replace(images, labels=torch.from_numpy(labels))


def made(spec: DataSpec, run: Path) -> DataSpec:
    """Where images of ``spec`` are once the run has been: in its folder, if it made them."""
    if spec.source != SYNTHESIZE:
        return spec
    return DataSpec(str((run / SYNTHESIZED).resolve()), labels=spec.labels)
