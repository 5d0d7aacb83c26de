"""The settings of plain filter pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from optpipe.methods._norms import Norm

Criterion = Norm | Literal["batch_norm"]
Style = Literal["normal", "residual"]


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of ``[method]``.

    ``criterion``: what a filter is scored by; low goes first. "l1" and "l2" are the filter's norms, "fpgm"
    its distances to the layer's other filters, "batch_norm" the scale of the batch-norm behind it, "random" a
    number drawn from the run's seed.

    ``style``: "normal" narrows what lies inside blocks alone, the groups whose channels enter no sum;
    "residual" the streams too. A group stays whole where the recovery compares its channels with the
    original's; with "residual" and nothing else to narrow than with "normal" the run is refused.

    ``rounding``: "engine" leaves, for a latency budget, only channel counts that the target executes well, as
    they are measured, and moves no group by more than a quarter of its width for that; "none" leaves any. A
    budget in MACs or parameters rounds nothing: there every channel counts. ``builds``: how many networks are
    built at most, beside those that show which counts are good.
    """

    criterion: Criterion = "l1"
    style: Style = "normal"
    rounding: Literal["engine", "none"] = "engine"
    builds: int = 12
