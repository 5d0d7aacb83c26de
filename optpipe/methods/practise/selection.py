"""From the blocks' savings and scores to the set that meets the budget."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

from optpipe.methods.practise import tables
from optpipe.methods.practise.config import Config
from optpipe.methods.practise.limits import Saving, check, check_reachable, met, saving_of
from optpipe.methods.practise.scores import KINDS, plan_of, values
from optpipe.methods.practise.tables import Drop, End
from optpipe.types import Answer, Ask, Block, Choice, Interim, Plan, Request, Scene, Search, Trial


@dataclass(frozen=True, slots=True)
class _Field:
    """What a selection chooses from: the droppable blocks, what each saves alone, those that may go."""

    scene: Scene
    config: Config
    blocks: tuple[Block, ...]
    savings: dict[str, Saving]
    eligible: tuple[str, ...]


def search(scene: Scene, config: Config) -> Search:
    """Score every droppable block, then drop the lowest scores until the measured budget is met.

    Raises:
        UsageError: the network has no droppable block, or fewer than the budget asks for; the settings
            contradict each other.
        RunError: no plan meets the budget; says what can be reached.
    """
    check(scene.graph, scene.calibration, scene.budget, config, scene.recover)
    blocks, kind = scene.graph.droppable, KINDS[config.criterion]
    savings = yield from _time_each(blocks)
    eligible = tuple(block.name for block in blocks if savings[block.name].low > 0)
    yield from check_reachable(scene, eligible, len(blocks))
    field = _Field(scene, config, blocks, savings, eligible)
    first = yield from values(scene, config, (), [block.name for block in blocks])
    drops = yield from _walk(field, first, anew=config.select == "joint")
    shown = [
        tables.of_blocks(kind, blocks, savings, first, drops),
        tables.of_prefixes(kind, scene, savings, drops),
    ]
    if config.select == "joint":
        greedy = yield from _walk(field, first, anew=False)
        ends = yield from _ends(field, drops, greedy)
        shown += [tables.of_rounds(drops), tables.of_ends(kind, *ends)]
    plan = drops[-1].trial.ask.plan
    interim = (Interim(Plan()), *(Interim(drop.trial.ask.plan) for drop in drops))
    return Choice(plan, scene.recover, _reason(field, drops), tuple(shown), interim=interim)


def _time_each(blocks: Sequence[Block]) -> Generator[Sequence[Request], Sequence[Answer], dict[str, Saving]]:
    trials = yield [Ask(Plan(drop_blocks=(block.name,))) for block in blocks]
    return {block.name: saving_of(cast(Trial, trial)) for block, trial in zip(blocks, trials, strict=True)}


def _walk(
    field: _Field, first: dict[str, float], *, anew: bool
) -> Generator[Sequence[Request], Sequence[Answer], list[Drop]]:
    """The drops one after another, each prefix built and timed, until the budget is met.

    ``first`` are the criterion's values with nothing dropped; with ``anew`` they are taken again after each
    drop, and a block answers for what it adds to the value of the set.
    """
    scene, kind = field.scene, KINDS[field.config.criterion]
    drops: list[Drop] = []
    found = first
    while not drops or not met(scene, drops[-1].trial, len(drops)):
        dropped = [drop.block for drop in drops]
        if anew and drops:
            remaining = [block.name for block in field.blocks if block.name not in dropped]
            found = yield from values(scene, field.config, dropped, remaining)
        before = drops[-1].value if anew and drops and kind.of_set else 0.0
        scores = {
            name: (found[name] - before) / (field.savings[name].tau if kind.per_saving else 1.0)
            for name in field.eligible
            if name not in dropped
        }
        best = min(scores, key=scores.__getitem__)
        (answer,) = yield [Ask(plan_of(scene, [*dropped, best]))]
        drops.append(Drop(best, found[best], scores, cast(Trial, answer)))
    return drops


def _ends(
    field: _Field, joint: Sequence[Drop], greedy: Sequence[Drop]
) -> Generator[Sequence[Request], Sequence[Answer], tuple[End, End]]:
    """Where joint and greedy end, the criterion's value of both sets taken in the same way.

    It is that of the block dropped last beside all the others of its set; None where it is no set's.
    """
    *others, last = [drop.block for drop in greedy]
    chosen = End(tuple(drop.block for drop in joint), joint[-1].value, joint[-1].trial)
    if not KINDS[field.config.criterion].of_set:
        return End(chosen.blocks, None, chosen.trial), End((*others, last), None, greedy[-1].trial)
    if set(chosen.blocks) == {*others, last}:
        return chosen, End((*others, last), chosen.value, greedy[-1].trial)
    found = yield from values(field.scene, field.config, others, [last])
    return chosen, End((*others, last), found[last], greedy[-1].trial)


def _reason(field: _Field, drops: Sequence[Drop]) -> str:
    saving, config = saving_of(drops[-1].trial), field.config
    names = ", ".join(drop.block for drop in drops)
    order = "R/tau" if config.criterion == "recoverability" else f'"{config.criterion}"'
    again = ", scored anew after each drop" if config.select == "joint" else ""
    return (
        f"{len(drops)} of {len(field.blocks)} droppable blocks, in order of {order}{again}: {names}. "
        f"Together they save {saving.tau:.1%} ({saving.low:.1%} to {saving.high:.1%}) of the measured latency"
    )
