"""The criteria: what each block is scored by. Low goes first; of equal scores the earlier block does.

``recoverability`` is the paper's R(B), the feature error that is left once adaptors have been trained around
the dropped block (Eq. 31), by either of the scorers of :class:`~optpipe.methods.practise.config.Config`. It
alone is divided by the measured saving tau(B) (Eq. 33).

The paper's rivals (Section 6.6, Fig. 9, Table 8) see the network without the block, before any recovery. It
gives them no equation, and nothing says that they are divided by tau, which is part of its own score: they
are not. All calibration images are looked at, unaugmented, in eval mode.

``l2``: the L2 distance between features. Read as Eq. 31 without adaptors: the mean squared difference of the
feature maps before global pooling.

``curl``: Luo and Wu, "Neural Network Pruning with Residual-Connections and Limited-Data", score by how far
the answers move: the mean over images of KL(p || q), p being the original's class probabilities and q the
candidate's. The calibration images stand for its proxy set.

``epsilon_resnet``: Yu et al., "Learning Strict Identity Mappings in Deep Residual Networks", take out a block
once all that it adds to its stream is below a threshold epsilon. Read as a ranking: the least epsilon that
takes the block out, the largest magnitude of its branch over images, channels and places.

``random`` is a permutation drawn by the run's seed, ``first`` the order of execution: what a criterion has to
beat. Neither looks at an image or at the network.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from optpipe import graph
from optpipe.methods.practise.config import Config, Criterion
from optpipe.types import Answer, Ask, Plan, Request, Scene, Step, StepResult, Trial, Tune


@dataclass(frozen=True, slots=True)
class Kind:
    """What a criterion's values are.

    ``name`` heads their column. ``of_set``: they are those of the whole set, a block with all that is gone
    already, so that a block has to answer for what it adds; else they are the block's own. ``per_saving``:
    they are divided by tau. ``looks``: they change with what is gone.
    """

    name: str
    of_set: bool = False
    per_saving: bool = False
    looks: bool = True


KINDS: dict[Criterion, Kind] = {
    "recoverability": Kind("R", of_set=True, per_saving=True),
    "l2": Kind("L2", of_set=True),
    "curl": Kind("KL", of_set=True),
    "epsilon_resnet": Kind("largest response"),
    "random": Kind("place", looks=False),
    "first": Kind("place", looks=False),
}
_EFFECTS: dict[Criterion, graph.Effect] = {
    "l2": "features",
    "curl": "answers",
    "epsilon_resnet": "response",
}


def values(
    scene: Scene, config: Config, dropped: Sequence[str], remaining: Sequence[str]
) -> Generator[Sequence[Request], Sequence[Answer], dict[str, float]]:
    """The criterion's value of dropping each remaining block beside those already dropped."""
    if not KINDS[config.criterion].looks:
        places = _places(scene, config.criterion)
        return {name: places[name] for name in remaining}
    if config.criterion == "recoverability" and config.scorer == "exact":
        plans = [plan_of(scene, [*dropped, name]) for name in remaining]
        tune = Tune(steps=config.exact_steps, trainable="adaptors", batch_norm="eval")
        trials = yield [Ask(plan, wants=("distance",), tune=tune) for plan in plans]
        found = [cast(float, cast(Trial, trial).distance) for trial in trials]
    else:
        (result,) = yield [_step(scene, config, plan_of(scene, dropped), remaining)]
        found = list(cast(StepResult, result).values)
    return dict(zip(remaining, found, strict=True))


def _step(scene: Scene, config: Config, base: Plan, remaining: Sequence[str]) -> Step:
    name = f"scores after {len(base.drop_blocks)} drops"
    asked = (scene.model, base, remaining, scene.calibration, scene.graph.input_shape)
    if config.criterion == "recoverability":
        refit = partial(graph.refit_errors, *asked, config.fast_images)
        return Step(name, f"refit 3, {config.fast_images} images, {base}, {remaining}", refit)
    effect = partial(graph.removal_effects, *asked, _EFFECTS[config.criterion])
    return Step(name, f"{config.criterion} 1, all images, {base}, {remaining}", effect)


def _places(scene: Scene, criterion: Criterion) -> dict[str, float]:
    """The place of each droppable block in an order that nothing has to be computed for, from 1."""
    blocks = scene.graph.droppable
    places = np.arange(len(blocks))
    if criterion == "random":
        generator = np.random.default_rng(scene.seed)
        places = generator.permutation(len(blocks))
    return {block.name: float(place) + 1.0 for block, place in zip(blocks, places, strict=True)}


def plan_of(scene: Scene, names: Sequence[str]) -> Plan:
    """The names in execution order, so that equal sets are equal plans."""
    order = [block.name for block in scene.graph.blocks]
    return Plan(drop_blocks=tuple(sorted(names, key=order.index)))
