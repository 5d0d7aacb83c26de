"""The original as the teacher of a training on the way: its logits, computed once for a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F

from optpipe import bank, data, tune
from optpipe.errors import UsageError
from optpipe.types import Emit, Tune

if TYPE_CHECKING:
    import torch

    from optpipe.lab.subject import Subject


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What a bank's teachers said about some of its images, which are counted among those alone.

    A :class:`~optpipe.tune.Teachers` of a training that sees the images ``rows``, in that order.
    """

    whole: bank.MemoryBank
    rows: tuple[int, ...]
    losses: tuple[float, ...]

    def mean(self, which: Sequence[int], images: Sequence[int]) -> torch.Tensor:
        """The mean logits of those teachers on those of the images, float32 (B, classes)."""
        return self.whole.mean(which, [self.rows[index] for index in images])


def teachers_of(
    tuning: Tune, rows: Sequence[int] | None, subject: Subject, folder: Path, device: str, emit: Emit
) -> tune.Teachers | None:
    """What ``tuning`` wants to hear on those calibration images, all of them by default; None if nothing.

    The original speaks at its own resolution, whatever the student's is. Its bank stays in ``folder``, whose
    name must say what it depends on.

    Raises:
        UsageError: an ensemble is wanted, of which there are no networks yet, or the images have no labels.
    """
    if tuning.loss != "labels" or tuning.teachers == "none":
        return None
    if tuning.teachers == "ensemble":
        raise UsageError(
            '[recover] teachers = "ensemble": a training within a search has no networks on the way to learn '
            'from; use "single"'
        )
    images = subject.calibration
    classes = tune.logits(subject.original, data.part(images, [0]), device).shape[1]
    half = tune.on_this_machine(tuning, device).autocast == "bf16"
    whole = bank.build(
        folder,
        [lambda: subject.original],
        images,
        classes=classes,
        device=device,
        half=half,
        # Once is enough: every training of the search comes by here.
        emit=None if folder.exists() else emit,
    )
    return whole if rows is None else part(whole, rows, images)


def part(whole: bank.MemoryBank, rows: Sequence[int], images: data.ImageSet) -> Rows:
    """A bank's teachers on some of its images, with their cross-entropy on those."""
    chosen = list(rows)
    labels = images.labels
    assert labels is not None, "a bank is of labelled images"
    losses = [
        float(F.cross_entropy(whole.mean([one], chosen), labels[chosen])) for one in range(len(whole.logits))
    ]
    return Rows(whole, tuple(chosen), tuple(losses))
