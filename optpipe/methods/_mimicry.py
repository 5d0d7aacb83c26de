"""The recovery that methods without labels share: the original's features and its stages' are mimicked."""

from __future__ import annotations

from optpipe.types import Tune

MIMIC = Tune(
    steps=1200,
    lr=0.1,
    nesterov=True,
    schedule="cosine",
    warmup=0.05,
    stage_weight=1.0,
    augment="shift_cutmix",
    autocast="auto",
)
"""PRACTISE's recovery (Eq. 34) as optpipe has it; what it deviates in stands at the top of that method."""
