"""EKG: prune filters one layer at a time, guided by the networks on the way (Lee and Song, "Ensemble
Knowledge Guided Sub-network Search and Fine-tuning for Filter Pruning").

The original is fine-tuned for an epoch. Then, step by step (Algorithm 1): all filters are scored in one
backward pass (Eq. 9); each layer's candidate loses its lowest-scored share; of the layers below a trimmed
Otsu threshold the candidate of the highest reward (Eqs 4 and 7) is taken, and its logits join the ensemble
(Eq. 8) that guides the next step. The last step is cut finer to meet the budget closely. Recovery takes
labels and, as teachers, those networks on the way that are still ahead (Eqs 10 to 13). Of a way of more than
32 networks those of evenly spread losses are handed on.

What is measured decides what a step buys. For a latency budget the channel counts that the target executes
well are measured first (:mod:`~optpipe.methods._ladder`), candidates go from one to the next, and the
candidate that costs least reward for the time it saves is taken; each accepted step is built and timed.
``widths = "any"`` and ``select = "reward"`` take this back. For a budget in MACs or parameters the search is
the paper's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from optpipe import graph
from optpipe.errors import RunError, UsageError
from optpipe.methods import _ladder as ladder
from optpipe.methods._meter import refuse_blocks, refuse_met, refuse_sparsity
from optpipe.methods._widths import narrowable
from optpipe.methods.ekg import budgets, images, tables
from optpipe.methods.ekg.config import Config
from optpipe.methods.ekg.descent import Field, descend, plan_of
from optpipe.methods.ekg.reward import Judge, Kept
from optpipe.methods.ekg.tables import Taken
from optpipe.types import (
    Answer,
    Ask,
    Budget,
    Choice,
    Images,
    Interim,
    Latency,
    ModelGraph,
    Plan,
    Request,
    Scene,
    Search,
    Start,
    Table,
    Train,
    Trained,
    Trial,
    Tune,
)

__all__ = ["NEEDS_LABELS", "RECOVER", "Config", "check", "search"]

NEEDS_LABELS = True

RECOVER = Tune(
    steps=0,
    epochs=100,
    batch=128,
    lr=0.01,
    nesterov=True,
    weight_decay=5e-4,
    schedule="milestones",
    milestones=(0.3, 0.6, 0.8),
    decay=0.2,
    loss="labels",
    teachers="ensemble",
    bank=5,
    temperature=4.0,
    views=2,
    rescale=True,
    trainable="all",
    augment="shift_color",
    autocast="auto",
)

# The epoch before the search.
_TUNE = Tune(
    steps=0,
    epochs=1,
    batch=256,
    lr=1e-3,
    nesterov=True,
    weight_decay=5e-4,
    schedule="milestones",
    loss="labels",
    trainable="all",
    augment="none",
    autocast="auto",
)

# A long search hands on this many of the networks on the way at the most; five of them become teachers.
_MOST_INTERIM = 32


def check(
    shown: ModelGraph,
    calibration: Images,
    budget: Budget,
    config: Config,
    recover: Tune,
    validation: Images | None = None,
) -> None:
    """UsageError for what no search can be made of: settings, a budget, a network, images."""
    refuse_sparsity(budget, "ekg")
    refuse_blocks(budget, "ekg")
    if not 0 < config.ratio <= 0.9:
        raise UsageError(f"[method] ratio = {config.ratio}: must be above 0 and at most 0.9")
    for key in ("score_images", "tuning_images"):
        if getattr(config, key) < 1:
            raise UsageError(f"[method] {key} = {getattr(config, key)}: must be above 0")
    if config.tries < 0:
        raise UsageError(f"[method] tries = {config.tries}: must be above 0, or 0 for no limit")
    if config.timed == "last" and (budget.latency_reduction or budget.latency_ms):
        raise UsageError('[method] timed = "last": a latency budget needs every step timed; set "every"')
    if not any(group.prunable for group in shown.groups):
        reason = next((group.why_not for group in shown.groups), "it has no layer")
        raise UsageError(
            f"[method] ekg: the network has no channel group that can be narrowed ({reason}); `optpipe "
            "inspect` says why not for each"
        )
    images.check(calibration, config, shown.classes)


def search(scene: Scene, config: Config) -> Search:
    """Take filters out, a layer's share at a time, until the measured budget is met.

    Raises:
        UsageError: what :func:`check` refuses, or a latency that the original meets already.
        RunError: no widths meet the budget; says what can be reached.
    """
    check(scene.graph, scene.calibration, scene.budget, config, scene.recover)
    refuse_met(scene)
    shape = scene.graph.input_shape
    widths = narrowable(scene, "ekg")
    costs = graph.Costs(scene.model, shape, widths)
    yield from _check_reachable(scene, widths, costs)
    ladders: tuple[ladder.Ladder, ...] = ()
    timed: tuple[Table, ...] = ()
    if _measures_widths(scene, config):
        ladders = yield from ladder.measure(widths, costs)
        timed = (ladder.table(widths.groups, ladders),)
        if not (yield from _rungs_reach(scene, widths, ladders, must=config.widths == "measured")):
            ladders = ()
    validation, subset = images.draw(scene.calibration, config, scene.graph.classes, scene.seed)
    steps = -(-len(subset) // _TUNE.batch)
    (answer,) = yield [Train(Plan(), replace(_TUNE, steps=steps, autocast=config.autocast), subset)]
    trained = cast(Trained, answer)
    judge = Judge(
        trained.network,
        shape,
        scene.calibration,
        validation,
        widths=widths,
        score=config.score,
        guide=config.guide,
        autocast=config.autocast == "bf16" or (config.autocast == "auto" and scene.native_bf16),
        device=scene.device,
        seed=scene.seed,
        most=config.tries,
    )
    field = Field(scene, config, widths, costs, judge, ladders, trained.digest)
    taken = yield from descend(field)
    return _choice(field, taken, trained.key, timed)


def _measures_widths(scene: Scene, config: Config) -> bool:
    if config.widths == "auto":
        return scene.budget.allowed_ratio(scene.baseline) is not None
    return config.widths == "measured"


def _check_reachable(
    scene: Scene, widths: graph.WidthMap, costs: graph.Costs
) -> Generator[Sequence[Request], Sequence[Answer], None]:
    """Look at the narrowest network first: a budget that even it misses is refused before any search."""
    what = f"the narrowest layers in all {len(widths.groups)} groups that can be narrowed"
    if scene.budget.allowed_ratio(scene.baseline) is None:
        parameters, macs = costs.of(widths.blocks)
        left = macs / scene.graph.macs, parameters / scene.graph.parameters
        if not budgets.sizes_meet(scene.budget, *left):
            raise RunError(
                f"no widths meet the budget: {what} save {1 - left[0]:.1%} of the MACs and {1 - left[1]:.1%} "
                f"of the parameters; {budgets.asked_in_words(scene)}; lower it"
            )
        return
    latency = yield from _narrowed(widths, widths.blocks)
    if not budgets.latency_meets(scene, latency):
        raise RunError(
            f"no widths meet the budget: {what} save {budgets.saved(latency):.1%} of the latency; "
            f"{budgets.asked_in_words(scene)}; lower it"
        )


def _rungs_reach(
    scene: Scene, widths: graph.WidthMap, ladders: Sequence[ladder.Ladder], *, must: bool
) -> Generator[Sequence[Request], Sequence[Answer], bool]:
    """Whether the narrowest network that the measured channel counts allow meets a latency budget.

    Where it does not, because noise hides counts that save little, any width will have to do: False, or
    RunError if it ``must``.
    """
    if scene.budget.allowed_ratio(scene.baseline) is None:
        return True
    of = {index: one.lowest for one in ladders for index in one.groups}
    latency = yield from _narrowed(widths, [of[index] for index in range(len(widths.groups))])
    if not budgets.latency_meets(scene, latency) and must:
        raise RunError(
            "no widths meet the budget: the smallest channel counts that the target executes faster than "
            f"larger ones, in all groups, save {budgets.saved(latency):.1%} of the latency; "
            f'{budgets.asked_in_words(scene)}; lower it, or let widths be any ([method] widths = "any")'
        )
    return budgets.latency_meets(scene, latency)


def _narrowed(
    widths: graph.WidthMap, counts: Sequence[int]
) -> Generator[Sequence[Request], Sequence[Answer], Latency]:
    """The latency of a network of these widths."""
    kept: Kept = tuple(
        ladder.first(group.channels, blocks, count)
        for group, blocks, count in zip(widths.groups, widths.blocks, counts, strict=True)
    )
    (answer,) = yield [Ask(plan_of(widths.groups, kept))]
    latency = cast(Trial, answer).latency
    assert latency is not None
    return latency


def _choice(field: Field, taken: Sequence[Taken], weights: str, timed: Sequence[Table]) -> Choice:
    """The end of the search as a choice; the last of ``taken`` holds the chosen network itself."""
    *steps, end = taken
    plan = plan_of(field.groups, end.kept)
    interim = [Interim(plan_of(field.groups, one.kept), one.facts.loss) for one in taken]
    shown = [
        tables.step_table(field.groups, steps),
        tables.width_table(field.scene.graph.groups, field.widths, end.kept),
    ]
    shown += timed
    narrowed = len(plan.keep_channels)
    reason = (
        f"{len(steps)} steps narrowed {narrowed} of {len(field.groups)} prunable channel groups: "
        f"{1 - end.macs:.1%} fewer MACs, {1 - end.parameters:.1%} fewer parameters"
    )
    if end.latency is not None:
        reason += f", {budgets.saved(end.latency):.1%} of the measured latency saved"
    return Choice(plan, field.scene.recover, reason, tuple(shown), Start(weights, Plan()), _thinned(interim))


def _thinned(interim: Sequence[Interim]) -> tuple[Interim, ...]:
    """Of a long way the networks whose losses are spread evenly, and both ends: a plan is large as JSON."""
    if len(interim) <= _MOST_INTERIM:
        return tuple(interim)
    losses = np.array([one.loss for one in interim], dtype=float)
    wanted = np.linspace(losses.min(), losses.max(), _MOST_INTERIM - 2)
    chosen = {int(np.abs(losses - loss).argmin()) for loss in wanted} | {0, len(interim) - 1}
    return tuple(interim[index] for index in sorted(chosen))
