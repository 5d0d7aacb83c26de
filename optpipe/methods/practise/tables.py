"""The tables of a PRACTISE search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optpipe.methods.practise.limits import Saving, saving_of
from optpipe.methods.practise.scores import Kind
from optpipe.types import Block, Cell, Scene, Table, Trial


@dataclass(frozen=True, slots=True)
class Drop:
    """One step of a selection: the block, the criterion's value and all scores then, the timed candidate."""

    block: str
    value: float
    scores: dict[str, float]
    trial: Trial

    @property
    def score(self) -> float:
        """The score that the block was chosen by."""
        return self.scores[self.block]


@dataclass(frozen=True, slots=True)
class End:
    """Where a selection ended: blocks in the order of their drops; ``value`` is None where sets have none."""

    blocks: tuple[str, ...]
    value: float | None
    trial: Trial


def of_blocks(
    kind: Kind,
    blocks: Sequence[Block],
    savings: dict[str, Saving],
    first: dict[str, float],
    drops: Sequence[Drop],
) -> Table:
    """Every block with its value and saving alone, and what became of it and why."""
    order = {drop.block: number for number, drop in enumerate(drops, start=1)}
    rows: list[tuple[Cell, ...]] = []
    for block in blocks:
        saving, value = savings[block.name], first[block.name]
        clear = saving.low > 0
        if block.name in order:
            verdict = f"dropped as number {order[block.name]}"
        else:
            verdict = "kept: not needed for the budget" if clear else "kept: saves no measurable time"
        score: tuple[Cell, ...] = (value / saving.tau if clear else None,) if kind.per_saving else ()
        rows.append(
            (block.name, value, saving.tau, saving.low, saving.high, *score, block.macs, verdict),
        )
    divided = (f"{kind.name}/tau",) if kind.per_saving else ()
    columns = ("block", kind.name, "tau", "tau low", "tau high", *divided, "MACs", "verdict")
    return Table("Blocks", columns, tuple(rows))


def of_prefixes(kind: Kind, scene: Scene, savings: dict[str, Saving], drops: Sequence[Drop]) -> Table:
    """What each further drop was predicted to save and what the engine measured."""
    rows: list[tuple[Cell, ...]] = []
    total = 0.0
    for number, drop in enumerate(drops, start=1):
        total += savings[drop.block].tau
        measured = saving_of(drop.trial)
        macs = 1.0 - drop.trial.macs / scene.graph.macs
        rows.append(
            (
                number,
                drop.block,
                drop.value,
                drop.score,
                macs,
                total,
                measured.tau,
                measured.low,
                measured.high,
            )
        )
    columns = (
        "dropped", "block", f"{kind.name} of the set" if kind.of_set else kind.name, "score when chosen",
        "MACs saved", "sum of tau", "measured saving", "low", "high",
    )  # fmt: skip
    return Table("Predicted and measured saving", columns, tuple(rows))


def of_rounds(drops: Sequence[Drop]) -> Table:
    """What each round of a joint selection chose, over what, and where that block stood in the first."""
    begun = drops[0].scores
    places = {name: place for place, name in enumerate(sorted(begun, key=begun.__getitem__), start=1)}
    rows: list[tuple[Cell, ...]] = []
    for number, drop in enumerate(drops, start=1):
        others = {name: score for name, score in drop.scores.items() if name != drop.block}
        next_best = min(others, key=others.__getitem__) if others else None
        rows.append(
            (
                number,
                drop.block,
                drop.score,
                next_best,
                others[next_best] if next_best is not None else None,
                begun[drop.block],
                places[drop.block],
            )
        )
    columns = (
        "round", "dropped", "score", "next best", "its score", "score in round 1", "place in round 1",
    )  # fmt: skip
    return Table("Rounds of the joint selection", columns, tuple(rows))


def of_ends(kind: Kind, joint: End, greedy: End) -> Table:
    """The two end sets, and by how much joint's is lower in value and in latency, or saves more."""
    rows: list[tuple[Cell, ...]] = []
    for name, end in (("joint", joint), ("greedy", greedy)):
        saving = saving_of(end.trial)
        blocks = ", ".join(end.blocks)
        rows.append(
            (name, blocks, end.value, _median_ms(end.trial), saving.tau, saving.low, saving.high),
        )
    gained: Cell = None
    if joint.value is not None and greedy.value is not None:
        gained = greedy.value - joint.value
    faster = _median_ms(greedy.trial) - _median_ms(joint.trial)
    more = saving_of(joint.trial).tau - saving_of(greedy.trial).tau
    rows.append(("gained by joint", None, gained, faster, more, None, None))
    predicted = f"{kind.name} of the set" if kind.of_set else f"{kind.name} (of blocks, not of sets)"
    columns = ("selection", "blocks", predicted, "latency (ms)", "measured saving", "low", "high")
    value = f"predicted {kind.name} and " if kind.of_set else ""
    return Table(f"Sets that joint and greedy end with: {value}measured latency", columns, tuple(rows))


def _median_ms(trial: Trial) -> float:
    assert trial.latency is not None
    return trial.latency.median_ms
