"""The report's tables of how long each layer takes, of the original beside the result. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from optpipe.types import Cell, LayerTime, LayerTimes, Table

TITLE = "Time by layer"
SLOWEST = 10


def note(found: LayerTimes) -> str:
    """What the tables mean, or why there are none; a sentence."""
    if found.failed:
        return f"No times of layers: {found.failed}."
    original, result = _total(found.original), _total(found.result)
    return (
        f"{original:.3f} ms in all layers of the original, {result:.3f} ms in those of the result: "
        f"medians of {found.repeats} inferences in a session that tells the time of each layer, which slows "
        "it down, so that they do not add up to the latency. Engines fuse layers: one here may be several of "
        "the network's."
    )


def tables(found: LayerTimes | None) -> tuple[Table, ...]:
    """By kind, and the slowest layers; none where nothing was told."""
    if found is None or not found.original or not found.result:
        return ()
    return _kinds(found), _slowest(found)


def _kinds(found: LayerTimes) -> Table:
    """The kinds of layers with the sums of their times, that which takes longest in the original first."""
    sums = [_sums(found.original), _sums(found.result)]
    totals = [_total(found.original), _total(found.result)]
    kinds = sorted({*sums[0], *sums[1]}, key=lambda kind: (-sums[0].get(kind, 0.0), kind))
    rows: list[tuple[Cell, ...]] = []
    for kind in kinds:
        cells: list[Cell] = [kind]
        for layers, sum_ms, total in zip((found.original, found.result), sums, totals, strict=True):
            count = sum(layer.kind == kind for layer in layers)
            cells += [count, sum_ms.get(kind, 0.0), _share(sum_ms.get(kind, 0.0), total)]
        rows.append(tuple(cells))
    columns = ("kind", *_six("layers"))
    return Table(f"{TITLE}: kinds", columns, tuple(rows))


def _slowest(found: LayerTimes) -> Table:
    """The slowest layers of each engine by rank: the same layer may have another name in the other."""
    totals = [_total(found.original), _total(found.result)]
    ranked = [
        sorted(layers, key=lambda layer: -layer.ms)[:SLOWEST] for layers in (found.original, found.result)
    ]
    rows: list[tuple[Cell, ...]] = []
    for rank, both in enumerate(zip_longest(*ranked), start=1):
        cells: list[Cell] = [rank]
        for layer, total in zip(both, totals, strict=True):
            cells += [None] * 3 if layer is None else _layer(layer, total)
        rows.append(tuple(cells))
    columns = ("rank", *_six("layer"))
    return Table(f"{TITLE}: the {SLOWEST} slowest", columns, tuple(rows))


def _layer(layer: LayerTime, total: float) -> list[Cell]:
    named = layer.name if layer.kind in layer.name else f"{layer.name} ({layer.kind})"
    return [named, layer.ms, _share(layer.ms, total)]


def _six(counted: str) -> tuple[str, ...]:
    """The columns of both engines."""
    return tuple(f"{which} {what}" for which in ("original", "result") for what in (counted, "ms", "share"))


def _sums(layers: Sequence[LayerTime]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for layer in layers:
        sums[layer.kind] = sums.get(layer.kind, 0.0) + layer.ms
    return sums


def _total(layers: Sequence[LayerTime]) -> float:
    return sum(layer.ms for layer in layers)


def _share(value: float, total: float) -> str:
    return f"{value / total:.1%}" if total else "-"
