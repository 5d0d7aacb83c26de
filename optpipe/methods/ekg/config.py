"""The settings of EKG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from optpipe.methods.ekg.reward import Guide
from optpipe.methods.ekg.scores import Score


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of ``[method]``.

    ``score``: "taylor" is EKG's (Eq. 9), "gbn" the same on a filter's own output, "l1", "l2" and "fpgm"
    look at the weights, "random" at nothing. ``guide``: whose outputs the reward holds a candidate against
    beside the labels: nobody's, the original's, or the ensemble's (Table 2). ``ratio``: the share of a
    layer's filters that a step removes. ``score_images`` and ``tuning_images``: images of each class for the
    reward (D_val) and for the epoch before the search (D_subset), disjoint. ``tries``: how many layers a step
    evaluates at the most, the cheapest first; 0 leaves it to the threshold.

    ``widths``: "measured" steps to channel counts that the target executes well, "any" by ``ratio`` alone;
    "auto" is "measured" for a latency budget that those counts can meet. ``select``: the candidate of the
    highest reward, or of the least reward lost for what it saves; "auto" is the latter for a latency budget.
    ``timed``: whether every accepted step is built and timed, or for budgets in MACs or parameters only the
    last. ``autocast``: "auto" evaluates in bfloat16 where the hardware does so natively.
    """

    score: Score = "taylor"
    guide: Guide = "ensemble"
    ratio: float = 0.2
    score_images: int = 32
    tuning_images: int = 256
    tries: int = 0
    widths: Literal["auto", "any", "measured"] = "auto"
    select: Literal["auto", "reward", "reward_per_saving"] = "auto"
    timed: Literal["every", "last"] = "every"
    autocast: Literal["auto", "off", "bf16"] = "auto"
