"""How images are made from a network alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Jitter = Literal["auto", "roll", "pad"]
"""How images are moved before a step: rolled, or cropped out of a black border; "auto" finds out which."""


@dataclass(frozen=True, slots=True)
class Synthesis:
    """Settings of DeepInversion (Yin et al., 2020, Eqs 2-4 and 8); the weights are the paper's alphas.

    ``steps`` are those of Adam for one batch of at most ``batch`` images, ``lr`` its rate, which falls to 0
    along a cosine. ``tv``, ``l2``, ``statistics`` and ``competition`` weigh the terms beside the
    cross-entropy, which has weight 1.

    ``jitter`` is how images are moved before each step: "roll" is the paper's, "pad" crops each out of a
    black border, as networks for small images are customarily trained; "auto" tries both for a moment and
    takes the one under which batches come nearer to the network's statistics.

    ``competition`` is 0 unless asked for. The paper competes with a student that learns from the images as
    they are made; here they are made before anything is pruned, so what stands in for the student is the
    original without its cheapest droppable block, not trained, whose disagreement is a weaker guide.
    """

    steps: int = 1000
    lr: float = 0.2
    batch: int = 125
    tv: float = 1e-3
    l2: float = 1e-4
    statistics: float = 1.0
    competition: float = 0.0
    jitter: Jitter = "auto"
