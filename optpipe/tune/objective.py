"""What a training minimises: the distance to the original, or the error in the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from optpipe import graph
from optpipe.errors import UsageError
from optpipe.losses import cross_distillation, distillation, label_errors, mimicking_loss
from optpipe.tune.machine import there
from optpipe.types import Images, Objective, Tune


class Teachers(Protocol):
    """What networks said about the training images, none of which were augmented."""

    @property
    def losses(self) -> tuple[float, ...]:
        """The cross-entropy of each teacher to the labels of all training images."""

    def mean(self, which: Sequence[int], images: Sequence[int]) -> torch.Tensor:
        """The mean logits of those teachers on those training images, float32 (B, classes)."""


def objective_of(
    student: fx.GraphModule,
    original: fx.GraphModule | None,
    images: Images,
    tune: Tune,
    teachers: Teachers | None,
    device: str,
) -> Objective:
    """The objective that ``tune.loss`` names, for a student that is on ``device``.

    Raises:
        UsageError: something that it needs is missing, or a view of an image may lose its class.
    """
    if tune.loss != "labels":
        if original is None:
            raise UsageError(
                f'[recover] loss = "{tune.loss}" compares with the original network: none was given'
            )
        if tune.loss == "kd":
            return Compared(answers(student, original, tune.temperature, device))
        if tune.loss == "cross":
            return Compared(crossed(student, original, tune, device))
        return Compared(features(student, original, tune, device))
    if images.labels is None:
        raise UsageError(
            '[recover] loss = "labels" needs labelled calibration images; give labels, or loss = "mimic"'
        )
    if tune.augment == "shift_cutmix":
        raise UsageError(
            '[recover] augment = "shift_cutmix" puts other classes into an image, and loss = "labels" has '
            'one label for it; use augment = "shift" or "shift_color"'
        )
    if tune.views < 1:
        raise UsageError(f"[recover] views = {tune.views}: must be at least 1")
    if tune.teachers != "none" and teachers is None:
        raise UsageError(f'[recover] teachers = "{tune.teachers}": training was given none')
    return Labels(student, images.labels, tune, None if tune.teachers == "none" else teachers, device)


@dataclass(frozen=True, slots=True)
class Compared:
    """How far the student is from the original on the same views, whichever images they are of."""

    error: Callable[[torch.Tensor], torch.Tensor]

    def loss(self, which: Sequence[int], images: torch.Tensor) -> torch.Tensor:
        """The error on the views."""
        return self.error(images)

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing: each step stands alone."""
        return {}

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Nothing to put back."""

    def noted(self) -> torch.Tensor:
        """Nothing."""
        return torch.zeros(0)

    def remember(self, noted: torch.Tensor) -> None:
        """Nothing to take over."""


def features(
    student: fx.GraphModule, original: fx.GraphModule, tune: Tune, device: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The error of the student's features, and of its stages' outputs (PRACTISE, Eqs 31 and 34)."""
    pupil, teacher = _observers(student, original, tune, device)

    def error(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(images)
        return _feature_error(pupil(images), wanted, tune)

    return error


def answers(
    student: fx.GraphModule, original: fx.GraphModule, temperature: float, device: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The divergence of the student's softened answers from the original's (Hinton et al., 2015).

    Without the labels' term, since a tiny set may have none.
    """
    teacher = there(original.eval(), device)

    def error(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(images)
        return distillation(student(images), wanted, temperature)

    return error


def crossed(
    student: fx.GraphModule, original: fx.GraphModule, tune: Tune, device: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The features' error plus :func:`cross_distillation` (PRACTISE, Eqs 17 and 18; a term is ours)."""
    pupil, teacher = _observers(student, original, tune, device)
    _, classifier = graph.split(student)
    theirs = there(graph.split(original)[1].eval(), device)

    def error(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(images)
            answer = theirs(wanted[0])
        found = pupil(images)
        error = _feature_error(found, wanted, tune)
        return error + cross_distillation(
            classifier(found[0]), classifier(wanted[0]), answer, tune.temperature
        )

    return error


def _observers(
    student: fx.GraphModule, original: fx.GraphModule, tune: Tune, device: str
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Student and original as functions from images to their features and what their stages put out."""
    readers = graph.stage_readers(original) if tune.stage_weight else ()
    return graph.observe(student, readers), there(graph.observe(original, readers).eval(), device)


def _feature_error(own: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], tune: Tune) -> torch.Tensor:
    for mine, other in zip(own, wanted, strict=True):
        if mine.shape != other.shape:
            raise UsageError(
                f'[recover] loss = "{tune.loss}" compares feature maps of one shape: the student has '
                f'{tuple(mine.shape[1:])}, the original {tuple(other.shape[1:])}; use loss = "kd" or '
                '"labels"'
            )
    return mimicking_loss(own, wanted, tune.stage_weight)


class Labels:
    """Cross-entropy to the labels and divergence from the teachers, summed over an image's views.

    With one view and no teachers it is the cross-entropy alone, the "BP" of PRACTISE's tables; else EKG,
    Eq. 12. With ``tune.teachers = "ensemble"`` only those teachers speak at a step whose loss is at most the
    student's (Eq. 13): its mean cross-entropy over the last whole epoch, and all of them until there is one.
    The student's is that of the random views that it trained on, which costs no further pass; on plain
    images, as the teachers', it would be lower, so that a teacher goes on a little longer than it should.
    A "single" teacher always speaks. Like the others it is read from the bank, where the paper's is run on
    every view: the comparison with the ensemble is then of teachers alone, not of augmentations.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        labels: torch.Tensor,
        tune: Tune,
        teachers: Teachers | None,
        device: str,
    ) -> None:
        self._student = student
        self._labels = labels.to(device)
        self._tune = tune
        self._teachers = teachers
        # The sum stays on the device: reading it would make each step wait for the one before.
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._seen = 0
        self._epoch_loss = math.inf
        self._noted = torch.zeros(0)

    def loss(self, which: Sequence[int], images: torch.Tensor) -> torch.Tensor:
        """The batch mean, the views summed."""
        logits = self._student(images)
        labels = self._labels[torch.tensor(which, device=self._labels.device)]
        errors = label_errors(logits, labels, self._tune.views)
        loss = errors.mean(dim=1).sum()
        ahead = self._ahead()
        if self._teachers is not None and ahead:
            wanted = self._teachers.mean(ahead, which).to(self._labels.device)
            loss = loss + distillation(logits, wanted, self._tune.temperature)
        self._noted = errors.detach().mean(dim=0)
        return loss

    def noted(self) -> torch.Tensor:
        """The errors (B,) of the last loss's images, the mean over views."""
        noted, self._noted = self._noted, torch.zeros(0)
        return noted

    def remember(self, noted: torch.Tensor) -> None:
        """Add the errors (B,) of a step's images; those beyond the last of an epoch begin the next one."""
        left = len(self._labels) - self._seen
        self._sum = self._sum + noted[:left].sum(dtype=torch.float64)
        self._seen += len(noted)
        if self._seen >= len(self._labels):
            self._epoch_loss = float(self._sum) / len(self._labels)
            self._sum = noted[left:].sum(dtype=torch.float64)
            self._seen -= len(self._labels)

    def state(self) -> dict[str, torch.Tensor]:
        """The sum of the epoch's errors so far, of how many images, and the last epoch's mean."""
        return {
            "sum": self._sum,
            "seen": torch.tensor(self._seen),
            "epoch_loss": torch.tensor(self._epoch_loss, dtype=torch.float64),
        }

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Go on in the midst of an epoch."""
        self._sum = saved["sum"].to(self._labels.device)
        self._seen = int(saved["seen"])
        self._epoch_loss = float(saved["epoch_loss"])

    def _ahead(self) -> tuple[int, ...]:
        losses = () if self._teachers is None else self._teachers.losses
        if self._tune.teachers == "single":
            return tuple(range(len(losses)))
        return tuple(number for number, loss in enumerate(losses) if loss <= self._epoch_loss)
