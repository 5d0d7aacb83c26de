"""What makes a recovery: numbers within their ranges, and no setting that its loss cannot use."""

from __future__ import annotations

import dataclasses
import json
import math

from optpipe.errors import UsageError
from optpipe.types import Tune

Check = tuple[str, bool, str]
"""The key, whether all is well, and what to say where it is not."""


def without_unused(recover: Tune) -> Tune:
    """``recover`` without a weight of the stages' outputs where its loss reads none.

    For one that was inherited: practise's own recovery has such a weight, and another loss in its place is
    no reason to ask for it to be taken back. What asks for a decision (views, teachers, what is trained)
    is left to :func:`check_recovery`.
    """
    return recover if recover.compares_features else dataclasses.replace(recover, stage_weight=0.0)


def check_recovery(recover: Tune, place: str) -> None:
    """UsageError, in one line that begins with ``place``, where the settings make no training."""
    milestones = recover.milestones
    ascending = all(a < b for a, b in zip((0.0, *milestones), (*milestones, 1.0), strict=True))
    positive, whole = "must be above 0 and finite", "must be at least 1"
    checks: list[Check] = [
        ("steps", recover.epochs is not None or recover.steps >= 0, "must not be below 0; 0 is no recovery"),
        ("epochs", recover.epochs is None or 0 < recover.epochs < math.inf, positive),
        ("batch", recover.batch > 0, positive),
        ("lr", 0 < recover.lr < math.inf, positive),
        ("temperature", 0 < recover.temperature < math.inf, positive),
        ("stage_weight", 0 <= recover.stage_weight < math.inf, "must not be below 0, and finite"),
        ("views", recover.views >= 1, whole),
        ("bank", recover.bank >= 1, whole),
        ("decay", 0 < recover.decay <= 1, "must be above 0 and at most 1"),
        ("milestones", ascending, "must be shares of the steps between 0 and 1, each above the one before"),
        (
            "milestones",
            recover.schedule != "milestones" or bool(milestones),
            'schedule = "milestones" lowers the rate at them: give shares of the steps, say [0.5, 0.75]',
        ),
        *_contradictions(recover),
    ]
    for key, good, message in checks:
        if not good:
            shown = json.dumps(getattr(recover, key))
            raise UsageError(f"{place}: [recover] {key} = {shown}: {message}")


def _contradictions(recover: Tune) -> list[Check]:
    """What a loss cannot use."""
    loss = recover.loss
    checks: list[Check] = [
        (
            "stage_weight",
            recover.compares_features or not recover.stage_weight,
            f'loss = "{loss}" reads no features on the way; leave it out, or set loss = "mimic" or "cross"',
        )
    ]
    if loss == "labels":
        mixed = (
            'puts other classes into an image, and loss = "labels" has one label for it; use "shift" or '
            '"shift_color"'
        )
        return [*checks, ("augment", recover.augment != "shift_cutmix", mixed)]
    heard = {
        "mimic": "compares features with the original's alone and hears no teacher's logits",
        "kd": "runs the original on every view and hears no other teacher",
        "cross": "runs the original on every view and hears no other teacher",
    }[loss]
    return [
        *checks,
        (
            "teachers",
            recover.teachers == "none",
            f'loss = "{loss}" {heard}; set loss = "labels" or teachers = "none"',
        ),
        (
            "views",
            recover.views == 1,
            f'loss = "{loss}" compares networks on one view of an image; set loss = "labels" or views = 1',
        ),
        (
            "trainable",
            loss != "mimic" or recover.trainable != "all",
            'loss = "mimic" compares the features before the classifier, from which that learns nothing; '
            'set loss = "labels" or trainable = "backbone"',
        ),
    ]
