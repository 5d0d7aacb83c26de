"""What the budget counts, as a fraction of the original's: measured latency, MACs or parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from optpipe.errors import UsageError
from optpipe.types import Ask, Budget, Plan, Scene, Trial


@dataclass(frozen=True, slots=True)
class Reading:
    """The cost of a network that was built or counted, with its interval; counts have none."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Meter:
    """Reads the budget's cost from trials; ``allowed`` is the fraction that the budget leaves."""

    what: Literal["latency", "MACs", "parameters"]
    allowed: float
    macs: int
    parameters: int

    def ask(self, plan: Plan) -> Ask:
        """The question whose answer can be read."""
        return Ask(plan, wants=("latency",) if self.what == "latency" else ())

    def read(self, trial: Trial) -> Reading:
        """The cost in a trial."""
        if self.what == "latency":
            latency = trial.latency
            assert latency is not None and latency.ratio_to_original is not None
            assert latency.ratio_ci95 is not None
            return Reading(latency.ratio_to_original, *latency.ratio_ci95)
        ratio = trial.macs / self.macs if self.what == "MACs" else trial.parameters / self.parameters
        return Reading(ratio, ratio, ratio)

    def meets(self, reading: Reading) -> bool:
        """Whether the whole interval is within the budget."""
        return reading.high <= self.allowed + 1e-9


def refuse_sparsity(budget: Budget, method: str) -> None:
    """UsageError for a budget in zeros, of a method that takes out whole parts and leaves none."""
    if budget.sparsity is not None:
        raise UsageError(
            f"[budget] sparsity: {method} takes whole parts out of a network and leaves no zeros; give "
            "latency_reduction, latency_ms, macs_reduction or parameters_reduction"
        )


def refuse_met(scene: Scene) -> None:
    """UsageError for a latency that the original meets already."""
    allowed = scene.budget.latency_ms
    if allowed is not None and scene.baseline.median_ms <= allowed:
        raise UsageError(
            f"[budget] latency_ms = {allowed}: the original takes {scene.baseline.median_ms:.3f} ms already; "
            "lower it"
        )


def refuse_blocks(budget: Budget, method: str) -> None:
    """UsageError for a budget in blocks, of a method that drops none."""
    if budget.drop_blocks is not None:
        raise UsageError(
            f"[budget] drop_blocks: {method} narrows layers and drops no block; give latency_reduction, "
            "latency_ms, macs_reduction or parameters_reduction"
        )


def meter_of(scene: Scene) -> Meter:
    """The meter of a scene's budget."""
    budget, shown = scene.budget, scene.graph
    if budget.macs_reduction is not None:
        return Meter("MACs", 1 - budget.macs_reduction, shown.macs, shown.parameters)
    if budget.parameters_reduction is not None:
        return Meter("parameters", 1 - budget.parameters_reduction, shown.macs, shown.parameters)
    allowed = budget.allowed_ratio(scene.baseline)
    assert allowed is not None, "blocks are no budget of this method"
    return Meter("latency", allowed, shown.macs, shown.parameters)
