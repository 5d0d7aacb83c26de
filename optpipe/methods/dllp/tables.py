"""What the search shows in the report, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from optpipe import graph
from optpipe.methods._meter import Meter
from optpipe.methods.dllp.family import Tried
from optpipe.types import Cell, Table


def tried(found: Sequence[Tried], taken: Tried, meter: Meter, score: str) -> Table:
    """The networks of the family that were built, largest first."""
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        verdict = "meets the budget" if one.meets else "does not meet the budget"
        rows.append(
            (
                one.nested.threshold,
                sum(one.nested.counts),
                one.nested.predicted,
                one.reading.ratio,
                one.reading.low,
                one.reading.high,
                "taken: the largest that does" if one is taken else verdict,
            )
        )
    what = "log-odds" if score == "posterior" else "magnitude"
    columns = (
        f"threshold on {what}",
        "channels",
        "predicted cost",
        f"{meter.what} left",
        "low",
        "high",
        "verdict",
    )
    return Table("Networks of the family that were tried", columns, tuple(rows))


def units(masks: graph.Masks, probabilities: Sequence[Tensor], kept: Sequence[Tensor], score: str) -> Table:
    """theta of the units of each set, and how many of them are gone."""
    rows: list[tuple[Cell, ...]] = []
    for name, values, mask in zip(masks.names, probabilities, kept, strict=True):
        stay, gone = values[mask], values[~mask]
        rows.append(
            (
                name,
                values.numel(),
                int(mask.sum()),
                1.0 - float(mask.float().mean()),
                float(values.mean()),
                float(stay.min()) if stay.numel() else None,
                float(gone.max()) if gone.numel() else None,
            )
        )
    what = "theta" if score == "posterior" else "magnitude"
    unit = "channels" if masks.granularity == "filter" else "weights"
    columns = (
        "layer",
        unit,
        "kept",
        "sparsity",
        f"mean {what}",
        f"lowest {what} kept",
        f"highest {what} gone",
    )
    return Table(f"{what.capitalize()} of {unit} by layer", columns, tuple(rows))
