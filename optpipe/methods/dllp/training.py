"""The trainings of a search, as requests: the gates, the settling, and the zeros written into the weights."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, fx, nn

from optpipe import graph
from optpipe.methods.dllp import particles
from optpipe.methods.dllp.config import Config
from optpipe.methods.dllp.objective import Settings, Stein
from optpipe.methods.dllp.particles import PART, Particles
from optpipe.methods.dllp.pressure import Pressure, unit_costs
from optpipe.types import Fit, Fitted, Member, Objective, Plan, Scene, Start, Tune

VERSION = 5
"""Of the trainings: raise it where the same settings would come to other weights."""

Masking = Sequence[Sequence[Tensor]]
"""For each particle the masks of its units, true where a unit stays."""

SCALE_TRAVEL = 3.0
"""How far log lambda and log d would come in a training in which all gradients agree."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What all trainings of a search share: the units, and for how many steps they are trained."""

    scene: Scene
    config: Config
    model: fx.GraphModule
    masks: graph.Masks
    explore: int
    settle: int

    @property
    def count(self) -> int:
        """How many particles there are: one where units are ranked by magnitude."""
        return self.config.particles if self.config.score == "posterior" else 1

    def gates(self, aim: float, pressure: Pressure | None, depends: str) -> Fit:
        """The training in which the gates are learnt; ``depends`` is what the pressure depends on."""
        sizes = [shape.numel() for shape in self.masks.shapes]
        costs = [1.0] * len(sizes) if pressure is None else unit_costs(pressure, sizes)
        return self._fit("gates", self.explore, aim, pressure, None, partial(self._begin, costs), depends)

    def settling(self, found: Fitted | None, fixed: Masking) -> Fit:
        """The training that goes on with masks fixed from what was found, or from the start."""
        steps = self.settle if found is not None else self.explore + self.settle

        def begin() -> Particles:
            begun = self._begin([1.0] * len(self.masks.names))
            if found is not None:
                begun.load_state_dict(found.module.state_dict())
            return begun

        depends = repr((None if found is None else found.digest, _digest(fixed)))
        return self._fit("settling", steps, 1.0, None, fixed, begin, depends)

    def zeroed(self, last: Fitted, fixed: Masking) -> Fit:
        """The networks with the weights of masked units replaced by zeros; nothing is trained."""

        def make() -> tuple[nn.Module, Objective]:
            learnt = particles_of(last)
            states = [
                graph.with_weights(learnt.network(index), self.masks.weights(learnt.network(index), kept))
                for index, kept in enumerate(fixed)
            ]
            return Networks(self.model, states), Nothing()

        depends = repr((VERSION, last.digest, _digest(fixed)))
        return Fit("zeros", depends, Tune(steps=0), make)

    def members(self, last: Fitted, plans: Sequence[Plan]) -> tuple[Member, ...]:
        """The other particles' networks."""
        starts = [Start(last.key, Plan(), PART.format(index)) for index in range(len(plans))]
        return tuple(Member(plan, start) for plan, start in zip(plans[1:], starts[1:], strict=True))

    def _begin(self, costs: Sequence[float]) -> Particles:
        """The particles before any training."""
        config = self.config
        return particles.begin(
            self.model,
            self.masks,
            self.count,
            start=config.start,
            keep=config.keep,
            jitter=config.jitter,
            seed=self.scene.seed,
            unit_costs=costs,
        )

    def _fit(
        self,
        name: str,
        steps: int,
        aim: float,
        pressure: Pressure | None,
        fixed: Masking | None,
        begin: Callable[[], Particles],
        depends: str,
    ) -> Fit:
        config, labels = self.config, self.scene.calibration.labels
        assert labels is not None
        # The mean rate of a cosine is half of the first; momentum adds up to 1 / (1 - momentum) steps.
        unit = 2 * (1 - config.momentum) / (max(1, steps) * config.lr)
        settings = Settings(
            steps=steps,
            seed=self.scene.seed,
            images=len(labels),
            beta=config.beta if config.score == "posterior" else 0.0,
            kernel=config.kernel,
            spike=config.spike,
            temperature=config.temperature,
            aim=aim,
            gate_rate=config.travel * unit,
            scale_rate=SCALE_TRAVEL * unit,
            sharpen=config.sharpen,
        )

        def make() -> tuple[nn.Module, Objective]:
            begun = begin()
            return begun, Stein(begun, self.masks, labels, settings, pressure, fixed)

        tune = Tune(
            steps=steps,
            batch=config.batch,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=0.0,
            schedule="cosine",
            loss="labels",
            trainable="all",
            augment=config.augment,
            autocast=config.autocast,
        )
        kept = (config.granularity, self.count, config.start, config.keep, config.jitter)
        return Fit(name, repr((VERSION, settings, kept, depends)), tune, make)


def frame_of(scene: Scene, config: Config) -> Frame:
    """The frame of a search."""
    model = cast("fx.GraphModule", scene.model)
    widths = graph.width_map(model, scene.graph.input_shape)
    masks = graph.Masks(model, widths, config.granularity)
    images = len(scene.calibration)
    steps = max(1, math.ceil(config.epochs * images / min(config.batch, images) - 1e-9))
    settle = min(round(config.settle * steps), steps - 1)
    return Frame(scene, config, model, masks, steps - settle, settle)


def particles_of(found: Fitted) -> Particles:
    """The particles of a training that ended."""
    return cast("Particles", found.module)


class Networks(nn.Module):
    """Networks of one structure, named as the particles' are; not to be called."""

    def __init__(self, model: fx.GraphModule, states: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        found = []
        for state in states:
            network = copy.deepcopy(model)  # a module of the same graph would share the layers
            network.load_state_dict(state)
            found.append(network)
        self.networks = nn.ModuleList(found)


class Nothing:
    """The objective of what is not trained."""

    def loss(self, which: Sequence[int], images: Tensor) -> Tensor:
        """Never asked for."""
        raise AssertionError("a training of no steps has no loss")

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Nothing to put back."""


def _digest(fixed: Masking) -> str:
    """sha256 of which units stay."""
    text = hashlib.sha256()
    for masks in fixed:
        for mask in masks:
            text.update(mask.to(torch.uint8).contiguous().numpy().tobytes())
    return text.hexdigest()
