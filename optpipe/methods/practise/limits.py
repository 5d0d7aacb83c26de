"""What the budget asks and what dropping blocks can give: refusals, and when a candidate meets it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

from optpipe.errors import RunError, UsageError
from optpipe.methods._meter import refuse_sparsity
from optpipe.methods.practise.config import Config
from optpipe.methods.practise.scores import KINDS, plan_of
from optpipe.types import Answer, Ask, Budget, Images, ModelGraph, Request, Scene, Trial, Tune


@dataclass(frozen=True, slots=True)
class Saving:
    """tau of one block (Eq. 32): the share of the original's latency, with its 95% interval."""

    tau: float
    low: float
    high: float


def check(
    shown: ModelGraph,
    calibration: Images,
    budget: Budget,
    config: Config,
    recover: Tune,
    validation: Images | None = None,
) -> None:
    """UsageError where there is nothing to drop, zeros are asked for, or scoring anew changes nothing."""
    refuse_sparsity(budget, "practise")
    if config.select == "joint" and not KINDS[config.criterion].looks:
        raise UsageError(
            f'[method] select = "joint": criterion = "{config.criterion}" looks at no network, so that '
            'nothing changes when blocks are scored anew; use select = "greedy", or another criterion'
        )
    if not shown.droppable:
        raise UsageError(
            "[method] practise: the network has no droppable block (a residual block with an identity "
            "shortcut); `optpipe inspect` says why not for each"
        )
    if budget.drop_blocks is not None and budget.drop_blocks > len(shown.droppable):
        raise UsageError(
            f"[budget] drop_blocks = {budget.drop_blocks}: only {len(shown.droppable)} blocks can be dropped"
        )


def saving_of(trial: Trial) -> Saving:
    """What a timed candidate saves."""
    latency = trial.latency
    assert latency is not None and latency.ratio_to_original is not None and latency.ratio_ci95 is not None
    low, high = latency.ratio_ci95
    return Saving(1.0 - latency.ratio_to_original, 1.0 - high, 1.0 - low)


def check_reachable(
    scene: Scene, eligible: Sequence[str], droppable: int
) -> Generator[Sequence[Request], Sequence[Answer], None]:
    """Time the smallest candidate first: a budget that even it misses is refused before any scoring."""
    budget = scene.budget
    if budget.drop_blocks is not None:
        if budget.drop_blocks > len(eligible):
            raise UsageError(
                f"[budget] drop_blocks = {budget.drop_blocks}: only {len(eligible)} of the {droppable} "
                "droppable blocks save measurable time"
            )
        return
    if not eligible:
        raise RunError("no block saves measurable time on this target: there is nothing to drop for speed")
    (answer,) = yield [Ask(plan_of(scene, eligible))]
    if met(scene, cast(Trial, answer), len(eligible)):
        return
    every = f"dropping all {len(eligible)} blocks that save time"
    size = _size(scene, cast(Trial, answer))
    if size is not None:
        what, reduced, asked = size
        raise RunError(
            f"no plan meets the budget: {every} reduces the {what} by {reduced:.1%}, {asked:.1%} is asked: "
            f"it misses by {asked - reduced:.1%}; lower the budget"
        )
    best = saving_of(cast(Trial, answer))
    allowed = budget.allowed_ratio(scene.baseline)
    assert allowed is not None
    raise RunError(
        f"no plan meets the budget: {every} reduces the latency by {best.tau:.1%} (at least "
        f"{best.low:.1%}), {1 - allowed:.1%} is asked: it misses by {1 - allowed - best.low:.1%}; lower the "
        "budget"
    )


def _size(scene: Scene, trial: Trial) -> tuple[str, float, float] | None:
    """What a budget in size counts, the share that a candidate saves of it, the share that is asked."""
    budget = scene.budget
    if budget.macs_reduction is not None:
        return "MACs", 1.0 - trial.macs / scene.graph.macs, budget.macs_reduction
    if budget.parameters_reduction is not None:
        return "parameters", 1.0 - trial.parameters / scene.graph.parameters, budget.parameters_reduction
    return None


def met(scene: Scene, trial: Trial, dropped: int) -> bool:
    """Whether a candidate meets the budget: in size, or with the whole interval of its latency's ratio."""
    if scene.budget.drop_blocks is not None:
        return dropped >= scene.budget.drop_blocks
    shown = scene.graph
    in_size = scene.budget.met_in_size(trial.macs / shown.macs, trial.parameters / shown.parameters)
    if in_size is not None:
        return in_size
    allowed = scene.budget.allowed_ratio(scene.baseline)
    assert allowed is not None and trial.latency is not None and trial.latency.ratio_ci95 is not None
    return trial.latency.ratio_ci95[1] <= allowed
