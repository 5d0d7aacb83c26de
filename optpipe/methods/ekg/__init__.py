"""EKG: prune filters one layer at a time, guided by the networks on the way (Lee and Song, "Ensemble
Knowledge Guided Sub-network Search and Fine-tuning for Filter Pruning").

The original is fine-tuned for an epoch. Then, step by step (Algorithm 1): all filters are scored in one
backward pass (Eq. 9); each layer's candidate loses its lowest-scored share; of the layers below a trimmed
Otsu threshold the candidate of the highest reward (Eqs 4 and 7) is taken, and its logits join the ensemble
(Eq. 8) that guides the next step. The last step is cut finer to meet the budget closely. Recovery takes
labels and, as teachers, those networks on the way that are still ahead (Eqs 10 to 13).

What is measured decides what a step buys. For a latency budget the channel counts that the target executes
well are measured first (:mod:`~optpipe.methods.ekg.ladder`), candidates go from one to the next, and the
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
from optpipe.methods.ekg import budgets, images, ladder, layers, tables
from optpipe.methods.ekg.config import Config
from optpipe.methods.ekg.descent import Field, descend, plan_of
from optpipe.methods.ekg.reward import Judge, Kept
from optpipe.methods.ekg.tables import Taken
from optpipe.types import (
    Answer,
    Ask,
    Choice,
    Interim,
    Plan,
    Request,
    Scene,
    Search,
    Train,
    Trained,
    Trial,
    Tune,
)

__all__ = ["NEEDS_LABELS", "RECOVER", "Config", "search"]

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


def search(scene: Scene, config: Config) -> Search:
    """Take filters out, a layer's share at a time, until the measured budget is met.

    Raises:
        UsageError: nothing can be narrowed, a setting is out of range, or images of a class are too few.
        RunError: no widths meet the budget; says what can be reached.
    """
    _check(scene, config)
    shape = scene.graph.input_shape
    widths = graph.width_map(scene.model, shape)
    if not widths.groups:
        raise UsageError(
            "[method] ekg: the network has no channel group that can be narrowed; `optpipe inspect` says why "
            "not for each"
        )
    validation, subset = images.draw(scene.calibration, config, scene.graph.classes, scene.seed)
    tune = replace(_TUNE, steps=-(-len(subset) // _TUNE.batch))
    (answer,) = yield [Train(Plan(), tune, subset)]
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
    costs = graph.Costs(scene.model, shape, widths)
    yield from _check_reachable(scene, widths, costs)
    ladders: tuple[ladder.Ladder, ...] = ()
    if _measures_widths(scene, config):
        ladders = yield from ladder.measure(widths, costs)
    field = Field(scene, config, widths, costs, judge, ladders, trained.key)
    taken = yield from descend(field)
    return _choice(field, taken)


def _check(scene: Scene, config: Config) -> None:
    """UsageError for settings that make no search."""
    if scene.budget.drop_blocks is not None:
        raise UsageError(
            "[budget] drop_blocks: ekg narrows layers and drops no block; give latency_reduction, "
            "latency_ms, macs_reduction or parameters_reduction"
        )
    for key, value, most in (
        ("ratio", config.ratio, 0.9),
        ("score_images", config.score_images, float("inf")),
        ("tuning_images", config.tuning_images, float("inf")),
    ):
        if not 0 < value <= most:
            raise UsageError(f"[method] {key} = {value}: must be above 0" + (" and at most 0.9" * (most < 1)))
    if config.tries < 0:
        raise UsageError(f"[method] tries = {config.tries}: must be above 0, or 0 for no limit")
    if config.timed == "last" and scene.budget.allowed_ratio(scene.baseline) is not None:
        raise UsageError('[method] timed = "last": a latency budget needs every step timed; set "every"')


def _measures_widths(scene: Scene, config: Config) -> bool:
    if config.widths == "auto":
        return scene.budget.allowed_ratio(scene.baseline) is not None
    return config.widths == "measured"


def _check_reachable(
    scene: Scene, widths: graph.WidthMap, costs: graph.Costs
) -> Generator[Sequence[Request], Sequence[Answer], None]:
    """Look at the narrowest network first: a budget that even it misses is refused before any search."""
    groups, few = widths.groups, widths.blocks
    if scene.budget.allowed_ratio(scene.baseline) is None:
        parameters, macs = costs.of(few)
        ratios = (macs / scene.graph.macs, parameters / scene.graph.parameters)
        if not budgets.sizes_meet(scene.budget, *ratios):
            raise RunError(
                f"no widths meet the budget: one channel in each of the {len(groups)} groups that can be "
                f"narrowed leaves {ratios[0]:.1%} of the MACs and {ratios[1]:.1%} of the parameters; lower "
                "the budget"
            )
        return
    narrowest: Kept = tuple(
        layers.first(group.channels, blocks, blocks) for group, blocks in zip(groups, few, strict=True)
    )
    (answer,) = yield [Ask(plan_of(groups, narrowest))]
    latency = cast(Trial, answer).latency
    assert latency is not None
    if not budgets.latency_meets(scene, latency):
        raise RunError(
            f"no widths meet the budget: one channel in each of the {len(groups)} groups that can be "
            f"narrowed reduces the latency by {budgets.saved(latency):.1%}, {budgets.asked(scene):.1%} is "
            "asked; lower the budget"
        )


def _choice(field: Field, taken: Sequence[Taken]) -> Choice:
    """The end of the search as a choice; the last of ``taken`` holds the chosen network itself."""
    *steps, end = taken
    plan = plan_of(field.groups, end.kept)
    interim = [Interim(plan_of(field.groups, one.kept), one.facts.loss) for one in taken]
    thinned = [interim[round(n)] for n in np.linspace(0, len(interim) - 1, min(len(interim), _MOST_INTERIM))]
    shown = [
        tables.step_table(field.groups, steps),
        tables.width_table(field.scene.graph.groups, field.groups, end.kept),
    ]
    if field.ladders:
        shown.append(ladder.table(field.groups, field.ladders))
    narrowed = len(plan.keep_channels)
    reason = (
        f"{len(steps)} steps narrowed {narrowed} of {len(field.groups)} prunable channel groups: "
        f"{1 - end.macs:.1%} fewer MACs, {1 - end.parameters:.1%} fewer parameters"
    )
    if end.latency is not None:
        reason += f", {budgets.saved(end.latency):.1%} of the measured latency saved"
    return Choice(plan, field.scene.recover, reason, tuple(shown), field.tuned, tuple(thinned))
