"""Whether a candidate meets the budget, in time or in size."""

from __future__ import annotations

from optpipe.types import Budget, Latency, Scene


def sizes_meet(budget: Budget, macs: float, parameters: float) -> bool:
    """Whether these fractions of the original's MACs and parameters meet a budget in size."""
    if budget.macs_reduction is not None:
        return 1.0 - macs >= budget.macs_reduction
    assert budget.parameters_reduction is not None
    return 1.0 - parameters >= budget.parameters_reduction


def latency_meets(scene: Scene, latency: Latency) -> bool:
    """Whether the whole interval meets the budget."""
    allowed = scene.budget.allowed_ratio(scene.baseline)
    assert allowed is not None and latency.ratio_ci95 is not None
    return latency.ratio_ci95[1] <= allowed


def saved(latency: Latency) -> float:
    """The share of the original's latency that is saved."""
    assert latency.ratio_to_original is not None
    return 1.0 - latency.ratio_to_original


def asked(scene: Scene) -> float:
    """The share of the original's latency that must be saved."""
    allowed = scene.budget.allowed_ratio(scene.baseline)
    assert allowed is not None
    return 1.0 - allowed
