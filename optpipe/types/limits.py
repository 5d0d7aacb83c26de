"""What a finished run is held against: the recipe's ``[gate]`` table and the options of ``optpipe gate``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from optpipe.types.measurement import Precision

SHARES_LEFT_OUT = {"min_agreement", "min_latency_reduction"}
"""Limits that a share in the place of a percentage would all but switch off."""

NO_LIMITS = {"strict", "precision"}
"""What says how to hold a run against the limits, and is none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a finished run must keep; None is no limit.

    Accuracies in percentage points, all else in percent: 1.0 is one point or one percent, never all of it.
    ``max_accuracy_drop`` and ``min_latency_reduction`` are against the original. ``min_agreement`` is the
    share of images that keep the original's class. ``max_accuracy_regression`` and ``max_latency_regression``
    are against the run that ``--baseline`` names (0 where they are left out). With ``strict`` the measured
    value itself must keep a limit; without, a run fails only where its 95% interval lies wholly beyond.
    ``precision`` is that of the shipped engine which is held against them, None the target's.
    """

    max_accuracy_drop: float | None = None
    min_agreement: float | None = None
    min_latency_reduction: float | None = None
    max_accuracy_regression: float | None = None
    max_latency_regression: float | None = None
    strict: bool = False
    precision: Precision | None = None

    def problem(self) -> tuple[str, float, str] | None:
        """The first limit that cannot be meant: its key, its value, and what it must be; None if all can."""
        for field in dataclasses.fields(self):
            value: float | None = None if field.name in NO_LIMITS else getattr(self, field.name)
            if value is None:
                continue
            if not math.isfinite(value):
                return field.name, value, "must be finite"
            if value > 100 and field.name != "max_latency_regression":
                return field.name, value, "must be at most 100"
            if field.name in SHARES_LEFT_OUT and 0 < value <= 1:
                return field.name, value, f"is in percent: write {value * 100:g} for a share of {value:g}"
        return None

    def over(self, others: Limits) -> Limits:
        """These, and where one is not given the other's; strict where either is."""
        pairs = ((f.name, getattr(self, f.name), getattr(others, f.name)) for f in dataclasses.fields(self))
        chosen = {name: theirs if own is None else own for name, own, theirs in pairs}
        return dataclasses.replace(Limits(**chosen), strict=self.strict or others.strict)
