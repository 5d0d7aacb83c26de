"""Whether a candidate meets the budget, in time or in size."""

from __future__ import annotations

from optpipe.types import Budget, Latency, Scene


def sizes_meet(budget: Budget, macs: float, parameters: float) -> bool:
    """Whether these fractions of the original's MACs and parameters meet a budget in size."""
    met = budget.met_in_size(macs, parameters)
    assert met is not None
    return met


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


def asked_in_words(scene: Scene) -> str:
    """What the budget asks for, as the recipe has it."""
    budget = scene.budget
    if budget.macs_reduction is not None:
        return f"macs_reduction = {budget.macs_reduction} is asked"
    if budget.parameters_reduction is not None:
        return f"parameters_reduction = {budget.parameters_reduction} is asked"
    return f"{asked(scene):.1%} is asked"
