"""Which rows ``benchmarks/gpu.py`` measures, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from benchmarks import eager
from benchmarks.contenders import Compiled, Contender, Eager, Subject
from benchmarks.gpu_tables import Kind, Row, tau_order
from optpipe.types import Precision

Case = tuple[str, Precision, int]
"""A network with its precision and batch."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: ``seconds`` bound the timing of a row, ``minutes`` the whole.

    ``depths`` are the numbers of blocks dropped together; ``every_eager`` times the drops on all ways of
    torch eager, not only on the last.
    """

    batches: tuple[int, ...]
    precisions: tuple[Precision, ...]
    depths: tuple[int, ...]
    seconds: float
    min_pairs: int
    every_eager: bool
    minutes: float | None = None


SCALES = {
    "quick": Scale((64, 1), ("fp16", "fp32"), (2, 3, 5), 1.0, 40, False, 9.0),
    "full": Scale((64, 1), ("fp16", "fp32"), (2, 3, 4, 5), 5.0, 40, True),
    "smoke": Scale((4, 1), ("fp16", "fp32"), (2,), 0.02, 8, False),
}


@dataclass(frozen=True, slots=True)
class Task:
    """A row to be measured: ``alike`` are a single drop's blocks, ``count`` how many are dropped."""

    case: Case
    contender: Contender
    kind: Kind
    count: int = 0
    alike: tuple[str, ...] = ()

    def row(self, dropped: tuple[str, ...] = ()) -> Row:
        """The row without what is measured."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        network, wanted, batch = self.case
        return Row(
            network=network,
            precision=wanted,
            batch=batch,
            engine=self.contender.name,
            kind=self.kind,
            count=self.count,
            dropped=dropped,
            alike=self.alike,
            parameters=0,
            macs=0,
            at=at,
            seconds=0.0,
        )


def plan(
    scale: Scale,
    device: str,
    engines: Mapping[Precision, Sequence[Compiled]],
    subjects: Mapping[str, Subject],
) -> list[Task]:
    """All rows, the most telling first.

    That is, in the first precision the originals on torch eager, which takes seconds, and on the backends;
    what blocks cost in the first case; the originals in the other precisions; the rest.
    """
    cases = [(n, p, b) for p in scale.precisions for b in scale.batches for n in subjects]
    ways = [Eager(variant) for variant in eager.variants(device)]
    ranked: list[tuple[int, Task]] = []
    for case in cases:
        network, wanted, _ = case
        built = engines[wanted]
        first = wanted == cases[0][1]
        ranked += [(0 if first else 3, Task(case, way, "original")) for way in ways]
        ranked += [(1 if first else 3, Task(case, engine, "original")) for engine in built]
        dropping: list[Contender] = [*built, *(ways if scale.every_eager else ways[-1:])]
        for contender in dropping:
            groups = subjects[network].alike
            drops = [Task(case, contender, "single", 1, alike) for alike in groups]
            blocks = sum(map(len, groups))
            drops += [Task(case, contender, "depth", count) for count in scale.depths if count <= blocks]
            ranked += [(2 if case == cases[0] else 4, drop) for drop in drops]
    return [task for _, task in sorted(ranked, key=lambda pair: pair[0])]


def to_drop(rows: Sequence[Row], task: Task, tasks: Sequence[Task]) -> tuple[str, ...] | None:
    """The blocks that a task drops; None where that takes savings that have not been measured.

    Several blocks are those of the largest savings on the task's engine.
    """
    if task.kind != "depth":
        return task.alike[:1]
    keys = {
        other.row().key
        for other in tasks
        if (other.kind, other.contender.name, other.case) == ("single", task.contender.name, task.case)
    }
    singles = [row for row in rows if row.key in keys and row.latency is not None]
    if len(singles) < len(keys):
        return None
    blocks = [block for row in sorted(singles, key=tau_order) for block in row.alike]
    return tuple(blocks[: task.count])
