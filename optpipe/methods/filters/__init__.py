"""Plain filter pruning: the rival that PRACTISE and other methods are compared with.

Every channel group loses the same share of its channels, those of the lowest score: filters of small norm (Li
et al., "Pruning Filters for Efficient ConvNets"), filters that others stand for (He et al., "Filter Pruning
via Geometric Median"), channels of small batch-norm scale, or random ones. ``style`` says whether only what
lies inside blocks is narrowed or the residual streams too ("normal" and "residual" in PRACTISE, Section 6 and
Fig. 8). No image is looked at before the recovery.

The share is the smallest whose network meets the budget as it is built and timed. For a latency budget only
channel counts are left that the target executes well, so that no time is given away and the rival is at its
best; ``rounding = "none"`` leaves what the ratio says.

The recovery is PRACTISE's: the original's features, and those of its stages, are mimicked. Features that are
compared need their channels: with "residual" the streams that are to be narrowed must not be among them,
``[recover] stage_weight = 0``.
"""

from __future__ import annotations

from optpipe.methods._mimicry import MIMIC
from optpipe.methods.filters.config import Config
from optpipe.methods.filters.limits import check
from optpipe.methods.filters.selection import search

__all__ = ["NEEDS_LABELS", "RECOVER", "Config", "check", "search"]

NEEDS_LABELS = False

RECOVER = MIMIC
