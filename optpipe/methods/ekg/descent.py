"""The greedy descent: from the whole network to the budget, one layer's filters at a time (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from optpipe import graph
from optpipe.errors import RunError
from optpipe.methods import _ladder as ladder
from optpipe.methods.ekg import budgets, layers
from optpipe.methods.ekg.config import Config
from optpipe.methods.ekg.reward import Candidate, Facts, Judge, Kept
from optpipe.methods.ekg.tables import Taken
from optpipe.types import (
    Answer,
    Ask,
    ChannelGroup,
    Plan,
    Request,
    Scene,
    Step,
    StepResult,
    Trial,
)

# Part of every step's key: raise it when a step would come out different.
_VERSION = 3


@dataclass(frozen=True, slots=True)
class Field:
    """What a search stands on and does not change."""

    scene: Scene
    config: Config
    widths: graph.WidthMap
    costs: graph.Costs
    judge: Judge
    ladders: tuple[ladder.Ladder, ...]
    weights: str

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups that can be narrowed, in execution order."""
        return self.widths.groups

    @property
    def by_time(self) -> bool:
        """Whether the budget is a latency."""
        return self.scene.budget.allowed_ratio(self.scene.baseline) is not None

    @property
    def per_saving(self) -> bool:
        """Whether candidates are compared by what they save."""
        chosen = self.config.select
        return self.by_time if chosen == "auto" else chosen == "reward_per_saving"

    def saving(self, kept: Kept) -> float:
        """What the budget's measure is expected to have fallen by, as a fraction of the original's."""
        if self.ladders and self.by_time:
            of = {index: one for one in self.ladders for index in one.groups}
            return sum(of[index].saving(index, len(channels)) for index, channels in enumerate(kept))
        parameters, macs = self.costs.of([len(channels) for channels in kept])
        if self.scene.budget.parameters_reduction is not None:
            return 1.0 - parameters / self.scene.graph.parameters
        return 1.0 - macs / self.scene.graph.macs


def descend(field: Field) -> Generator[Sequence[Request], Sequence[Answer], list[Taken]]:
    """Every accepted step from the whole network to the budget, and at the end the chosen network itself."""
    history: list[Kept] = [tuple(tuple(range(group.channels)) for group in field.groups)]
    taken: list[Taken] = []
    # Each step's key holds that of the step before, and with it all that came before.
    chain = _settings(field)
    done = False
    while not done:
        kept = history[-1]
        after = _after(field, kept)
        if all(count is None for count in after):
            raise RunError(_exhausted(field, taken))
        gains = _gains(field, kept, after)
        work = partial(_encoded, field.judge, tuple(history), after, gains)
        (answer,) = yield [Step(f"step {len(history)}", f"ekg {chain} {after} {gains}", work)]
        result = cast(StepResult, answer)
        facts = Facts.decode(result.values)
        best = _best(field, facts, gains)
        reached, trial, done = yield from _reached(field, kept, best)
        history.append(reached)
        taken.append(_taken(field, facts, best, kept, reached, trial))
        chain = f"{result.key} {reached[best.group]}"
    work = partial(_encoded, field.judge, tuple(history), None, ())
    (answer,) = yield [Step("chosen", f"ekg {chain}", work)]
    end = Facts.decode(cast(StepResult, answer).values)
    return [*taken, replace(taken[-1], facts=end, kept=history[-1], group=None)]


def _settings(field: Field) -> str:
    """What every step depends on beside the networks and the images."""
    config, scene = field.config, field.scene
    images = f"{config.score_images} {config.tuning_images} {config.tries}"
    machine = f"{config.autocast} {scene.native_bf16} {scene.device}"
    return f"{_VERSION} {field.weights} {config.score} {config.guide} {images} {machine}"


def _reached(
    field: Field, kept: Kept, best: Candidate
) -> Generator[Sequence[Request], Sequence[Answer], tuple[Kept, Trial | None, bool]]:
    """(the network after a step, its trial if it was timed, whether it meets the budget).

    A step that meets the budget is cut down to what the budget needs.
    """
    if not field.by_time:
        reached = _refined(field, kept, best)
        done = budgets.sizes_meet(field.scene.budget, *_sizes(field, reached))
        if not done and field.config.timed == "last":
            return reached, None, done
        (answer,) = yield [Ask(plan_of(field.groups, reached))]
        return reached, cast(Trial, answer), done
    reached = _without(kept, best.group, best.removed)
    (answer,) = yield [Ask(plan_of(field.groups, reached))]
    trial = cast(Trial, answer)
    assert trial.latency is not None
    done = budgets.latency_meets(field.scene, trial.latency)
    if done:
        reached, trial = yield from _finest(field, kept, best, trial)
    return reached, trial, done


def _encoded(
    judge: Judge, history: Sequence[Kept], after: Sequence[int | None] | None, gains: Sequence[float]
) -> tuple[float, ...]:
    facts = judge.measure(history) if after is None else judge.facts(history, after, gains)
    return facts.encode()


def _after(field: Field, kept: Kept) -> tuple[int | None, ...]:
    """How many channels each group would keep after a step; None where it has none to give."""
    of = {index: one for one in field.ladders for index in one.groups}
    found: list[int | None] = []
    for index, channels in enumerate(kept):
        count = len(channels)
        tied, blocks = field.widths.tied[index], field.widths.blocks[index]
        wanted = layers.fewer(count, field.config.ratio, tied, blocks)
        if field.ladders:
            found.append(of[index].below(count, wanted))
        else:
            found.append(wanted if wanted >= 1 else None)
    return tuple(found)


def _gains(field: Field, kept: Kept, after: Sequence[int | None]) -> tuple[float, ...]:
    """What each group's candidate is expected to save beyond ``kept``; 1 where only the reward counts."""
    if not field.per_saving:
        return (1.0,) * len(after)
    now = field.saving(kept)
    gains = []
    for index, count in enumerate(after):
        fewer = kept if count is None else (*kept[:index], kept[index][:count], *kept[index + 1 :])
        gains.append(max(field.saving(fewer) - now, 1e-9))
    return tuple(gains)


def _best(field: Field, facts: Facts, gains: Sequence[float]) -> Candidate:
    """The candidate of the highest reward, or of the least reward lost for what it saves.

    One that loses nothing comes before all that do.
    """
    if not field.per_saving:
        return max(facts.candidates, key=lambda one: one.reward)
    free = [one for one in facts.candidates if one.reward >= facts.reward]
    if free:
        return max(free, key=lambda one: one.reward)
    return min(facts.candidates, key=lambda one: (facts.reward - one.reward) / gains[one.group])


def _without(kept: Kept, group: int, removed: Sequence[int]) -> Kept:
    gone = set(removed)
    left = tuple(channel for channel in kept[group] if channel not in gone)
    return (*kept[:group], left, *kept[group + 1 :])


def _refined(field: Field, kept: Kept, best: Candidate) -> Kept:
    """The candidate, or as few of its channels, the lowest scores first, as meet the budget in size."""
    blocks = field.widths.blocks[best.group]
    for count in range(blocks, len(best.removed) + 1, blocks):
        reached = _without(kept, best.group, best.removed[:count])
        if budgets.sizes_meet(field.scene.budget, *_sizes(field, reached)):
            return reached
    return _without(kept, best.group, best.removed)


def _finest(
    field: Field, kept: Kept, best: Candidate, trial: Trial
) -> Generator[Sequence[Request], Sequence[Answer], tuple[Kept, Trial]]:
    """The fewest of the last candidate's channels that still meet the latency: halving, each half timed."""
    blocks = field.widths.blocks[best.group]
    few, enough = 0, len(best.removed) // blocks
    while enough - few > 1:
        middle = (few + enough) // 2
        fewer = _without(kept, best.group, best.removed[: middle * blocks])
        (answer,) = yield [Ask(plan_of(field.groups, fewer))]
        tried = cast(Trial, answer)
        assert tried.latency is not None
        if budgets.latency_meets(field.scene, tried.latency):
            enough, trial = middle, tried
        else:
            few = middle
    return _without(kept, best.group, best.removed[: enough * blocks]), trial


def _sizes(field: Field, kept: Kept) -> tuple[float, float]:
    """(MACs, parameters) as fractions of the original's."""
    parameters, macs = field.costs.of([len(channels) for channels in kept])
    return macs / field.scene.graph.macs, parameters / field.scene.graph.parameters


def _taken(
    field: Field, facts: Facts, best: Candidate, kept: Kept, reached: Kept, trial: Trial | None
) -> Taken:
    macs, parameters = _sizes(field, reached)
    return Taken(
        facts=facts,
        group=best.group,
        kept=kept,
        before=len(kept[best.group]),
        after=len(reached[best.group]),
        reward=best.reward,
        macs=macs,
        parameters=parameters,
        latency=None if trial is None else trial.latency,
    )


def _exhausted(field: Field, taken: Sequence[Taken]) -> str:
    reached = "nothing"
    if taken:
        end, budget = taken[-1], field.scene.budget
        if end.latency is not None and field.by_time:
            reached = f"{budgets.saved(end.latency):.1%} of the latency"
        elif budget.parameters_reduction is not None:
            reached = f"{1 - end.parameters:.1%} of the parameters"
        else:
            reached = f"{1 - end.macs:.1%} of the MACs"
    return (
        f"no widths meet the budget: every group is at the smallest count that the target executes well, "
        f'which saves {reached}; lower the budget, or let widths be any ([method] widths = "any")'
    )


def plan_of(groups: Sequence[ChannelGroup], kept: Kept) -> Plan:
    """The groups that lost a channel, in execution order."""
    return Plan(
        keep_channels=tuple(
            (group.name, channels)
            for group, channels in zip(groups, kept, strict=True)
            if len(channels) < group.channels
        )
    )
